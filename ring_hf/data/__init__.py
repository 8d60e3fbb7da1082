"""Documents -> tokens -> packed sequences: each step is a `datasets.Dataset` on disk, computed once and cached.

    documents = load_documents("books/*.txt")                       # or a folder, a hub dataset, "builtin"
    train, heldout = split_documents(documents, heldout_fraction=0.05)
    tokens = tokenize_documents(train, tokenizer)
    sequences = pack_documents(tokens, length=32768)                # input_ids, position_ids, labels

Nothing here depends on how a sequence is shared between processes: the collator does that, and it finds the documents
inside a sequence by the positions that start again at 0.
"""

from .bad_rows import RowError
from .byte_level import build_byte_tokenizer
from .files import RowColumns
from .formats import FORMATS, Format, FormatSettings, each_row, tokenize_source
from .packing import PACKINGS, DocumentSpan, pack_best_fit, pack_documents, pack_separate, pack_stream
from .sources import load_documents, load_rows
from .splits import split_documents
from .tokens import concatenate_tokens, tokenize_documents

__all__ = [
    "FORMATS",
    "PACKINGS",
    "DocumentSpan",
    "Format",
    "FormatSettings",
    "RowColumns",
    "RowError",
    "build_byte_tokenizer",
    "concatenate_tokens",
    "each_row",
    "load_documents",
    "load_rows",
    "pack_best_fit",
    "pack_documents",
    "pack_separate",
    "pack_stream",
    "split_documents",
    "tokenize_documents",
    "tokenize_source",
]
