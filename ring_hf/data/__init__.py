"""Documents -> tokens -> packed sequences: each step is a `datasets.Dataset` on disk, computed once and cached.

    documents = load_documents("books/*.txt")                       # or a folder, a hub dataset, "builtin"
    train, heldout = split_documents(documents, heldout_fraction=0.05)
    tokens = tokenize_documents(train, tokenizer)
    sequences = pack_documents(tokens, length=32768)                # input_ids, position_ids, labels

`load_sequences` does all of it for a mixture of sources, as a run's YAML describes them; `FORMATS` holds what a row of
a source may be. Nothing here depends on how a sequence is shared between processes: the collator does that, and it
finds the documents inside a sequence by the positions that start again at 0.
"""

from typing import TYPE_CHECKING

from ..exports import export_lazily

__all__ = [
    "FORMATS",
    "PACKINGS",
    "DataArguments",
    "DocumentSpan",
    "Format",
    "FormatSettings",
    "MixtureSpec",
    "RowColumns",
    "RowError",
    "SourceSpec",
    "StreamedSequences",
    "add_vision_vocabulary",
    "build_byte_tokenizer",
    "concatenate_tokens",
    "cut_into_chunks",
    "each_row",
    "load_documents",
    "load_rows",
    "load_sequences",
    "pack_best_fit",
    "pack_documents",
    "pack_separate",
    "pack_stream",
    "plan_mixture",
    "split_documents",
    "split_modalities",
    "tokenize_documents",
    "tokenize_source",
    "weigh_examples",
]

if TYPE_CHECKING:
    from .bad_rows import RowError
    from .byte_level import build_byte_tokenizer
    from .document_qa import cut_into_chunks
    from .example_weights import weigh_examples
    from .files import RowColumns
    from .formats import FORMATS, Format, FormatSettings, each_row, tokenize_source
    from .mixture import plan_mixture
    from .packing import PACKINGS, DocumentSpan, pack_best_fit, pack_documents, pack_separate, pack_stream
    from .run_options import DataArguments
    from .sequences import load_sequences
    from .source_spec import MixtureSpec, SourceSpec
    from .sources import load_documents, load_rows
    from .splits import split_documents
    from .streaming import StreamedSequences
    from .tokens import concatenate_tokens, tokenize_documents
    from .vision_codes import add_vision_vocabulary, split_modalities
else:  # the command line would wait for `datasets`
    __getattr__, __dir__ = export_lazily(
        __name__,
        {
            "bad_rows": ("RowError",),
            "byte_level": ("build_byte_tokenizer",),
            "document_qa": ("cut_into_chunks",),
            "example_weights": ("weigh_examples",),
            "files": ("RowColumns",),
            "formats": ("FORMATS", "Format", "FormatSettings", "each_row", "tokenize_source"),
            "mixture": ("plan_mixture",),
            "packing": (
                "PACKINGS",
                "DocumentSpan",
                "pack_best_fit",
                "pack_documents",
                "pack_separate",
                "pack_stream",
            ),
            "run_options": ("DataArguments",),
            "sequences": ("load_sequences",),
            "source_spec": ("MixtureSpec", "SourceSpec"),
            "sources": ("load_documents", "load_rows"),
            "splits": ("split_documents",),
            "streaming": ("StreamedSequences",),
            "tokens": ("concatenate_tokens", "tokenize_documents"),
            "vision_codes": ("add_vision_vocabulary", "split_modalities"),
        },
    )
