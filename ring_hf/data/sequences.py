"""From the sources of a run to packed sequences: read, hold out, tokenise, plan the mixture, pack.

train, heldout = load_mixture(args.mixture(), tokenizer, length, args.heldout_fraction)
sequences = train.pack(args.packing)
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from .bad_rows import BAD_ROW_FEATURES
from .example_weights import check_weighting, weigh_examples
from .formats import FormatSettings, find_format, tokenize_source
from .mixture import MixturePlan, count_tokens, is_read_as_it_is, plan_mixture
from .packing import DocumentSpan, pack_documents, pack_spans
from .run_options import DataArguments, SourceArguments
from .source_spec import MixtureSpec, SourceSpec
from .sources import load_rows, stream_rows
from .splits import split_documents
from .streaming import BadRowCounter, StreamedSequences
from .tokens import concatenate_tokens, num_tokens


@dataclass(frozen=True)
class TokenizedMixture:
    """The documents of all sources as tokens, and the plan of what is read of them."""

    tokens: Dataset
    plan: MixturePlan
    spec: MixtureSpec

    def pack(self, args: DataArguments) -> Dataset:
        """Return packed sequences; see `pack_documents`."""
        is_plain = is_read_as_it_is(self.spec) and self.spec.sources[0].min_length == 1
        return pack_documents(
            self.tokens,
            args.max_length,
            args.packing,
            args.mask_boundaries,
            args.attend_across_documents,
            None if is_plain else self.plan.spans,
        )

    def pack_spans(self, args: DataArguments) -> list[list[DocumentSpan]]:
        """Return the spans of every packed sequence, as `pack` joins them, without tokens."""
        return pack_spans(self.plan.spans, args.max_length, args.packing)

    @property
    def plan_tokens(self) -> int:
        """Tokens that are trained on."""
        return count_tokens(self.plan.spans)


def load_source(spec: SourceSpec) -> Dataset:
    """Return the rows of a source.

    Raises:
        ValueError: if its format does not exist, or a row cannot be read.
    """
    columns = find_format(spec.format).row_columns(spec.renamed)
    return load_rows(spec.source, columns, spec.split, spec.encoding, spec.errors)


def load_sample(sources: Sequence[SourceSpec], num_documents: int) -> list[Dataset]:
    """Return the first rows of every source, without reading the others.

    Raises:
        ValueError: if a source holds none.
    """
    samples = []
    for spec in sources:
        columns = find_format(spec.format).row_columns(spec.renamed)
        bad_rows = BadRowCounter(spec)
        stream = stream_rows(spec.source, columns, spec.split, spec.encoding, spec.errors).filter(bad_rows.is_good)
        rows = [{key: row[key] for key in row if key not in BAD_ROW_FEATURES} for row in stream.take(num_documents)]
        if not rows:
            raise ValueError(f"data source {spec.name!r} holds no rows that can be used.")
        samples.append(Dataset.from_list(rows))
    return samples


def tokenize_rows(spec: SourceSpec, rows: Dataset, tokenizer: Any, num_proc: int | None = None) -> Dataset:
    """Return the rows of a source as a tokenised dataset."""
    settings = FormatSettings(spec.name, spec.errors, num_proc, spec.options)
    return tokenize_source(rows, tokenizer, spec.format, settings)


def load_splits(args: SourceArguments) -> tuple[list[Dataset], list[tuple[SourceSpec, Dataset]]]:
    """Return the rows to train on, by source, and the held-out ones with the source they come from.

    The latter are of `heldout_data`, or a fraction of every source; none if `heldout_fraction` is 0.

    Raises:
        ValueError: if rows are to be held out of a source whose format joins the rows of a document.
    """
    sources = args.mixture().sources
    rows = [load_source(spec) for spec in sources]
    if args.heldout_data is not None:
        return rows, [(spec, load_source(spec)) for spec in args.heldout_sources()]
    train, heldout = [], []
    for spec, source_rows in zip(sources, rows, strict=True):
        if args.heldout_fraction and find_format(spec.format).joins_rows:
            raise ValueError(
                f"data source {spec.name!r}: heldout_fraction={args.heldout_fraction} would hold out single rows, and "
                f"format {spec.format} joins the rows of a document. Name a source of its own as heldout_data, or set "
                "heldout_fraction: 0."
            )
        train_rows, heldout_rows = split_documents(source_rows, args.heldout_fraction)
        train.append(train_rows)
        if heldout_rows is not None:
            heldout.append((spec, heldout_rows))
    return train, heldout


def tokenize_heldout(
    heldout: Sequence[tuple[SourceSpec, Dataset]], tokenizer: Any, num_proc: int | None = None
) -> Dataset | None:
    """Return the held-out documents of all sources as one tokenised dataset, or None if there are none."""
    tokens = [tokenize_rows(spec, rows, tokenizer, num_proc) for spec, rows in heldout]
    return concatenate_tokens(tokens) if tokens else None


def mix_sources(
    rows: Sequence[Dataset], mixture: MixtureSpec, tokenizer: Any, length: int, num_proc: int | None = None
) -> TokenizedMixture:
    """Tokenise the rows of every source of a mixture and plan what is read of them in sequences of `length` tokens."""
    tokens = [
        tokenize_rows(spec, source_rows, tokenizer, num_proc)
        for spec, source_rows in zip(mixture.sources, rows, strict=True)
    ]
    lengths = [np.array(num_tokens(dataset), dtype=np.int64) for dataset in tokens]
    return TokenizedMixture(concatenate_tokens(tokens), plan_mixture(lengths, mixture, length), mixture)


def check_whole_examples(args: DataArguments) -> None:
    """Raise `ValueError` if a document could be cut whose weights are those of the whole one."""
    check_weighting(args.loss_weighting)
    if args.loss_weighting == "tokens":
        return
    reasons = {
        "streaming=True": args.streaming,
        "packing=stream": args.packing == "stream",
        **{
            f"overlong={spec.overlong} of data source {spec.name!r}": spec.overlong != "drop"
            for spec in args.mixture().sources
        },
    }
    if given := [reason for reason, is_given in reasons.items() if is_given]:
        raise ValueError(
            f"loss_weighting=examples with {given[0]}: a document counts as a whole, so none may be cut. Set "
            "overlong: drop and packing: best_fit or separate, without streaming; or loss_weighting: tokens."
        )


def load_sequences(args: DataArguments, tokenizer: Any) -> tuple[Dataset | StreamedSequences, Dataset | None]:
    """Return training and held-out sequences of at most `max_length` tokens; the former may be a stream.

    Held-out documents are packed once each. Those too short or too long are treated as in training.
    """
    check_whole_examples(args)
    train: Dataset | StreamedSequences
    if args.streaming:
        train = StreamedSequences(args, tokenizer)
        heldout_rows = [(spec, load_source(spec)) for spec in args.heldout_sources()]
    else:
        rows, heldout_rows = load_splits(args)
        train = _pack(mix_sources(rows, args.mixture(), tokenizer, args.max_length, args.num_proc), args)
    if not heldout_rows:
        return train, None
    specs = tuple(
        dataclasses.replace(spec, name=f"{spec.name} (held out)", weight=None, length_weights={}, max_tokens=None)
        for spec, _ in heldout_rows
    )
    mixture = mix_sources(
        [rows for _, rows in heldout_rows], MixtureSpec(specs), tokenizer, args.max_length, args.num_proc
    )
    heldout = _pack(mixture, args)
    if args.max_heldout_sequences is not None:
        heldout = heldout.select(range(min(args.max_heldout_sequences, len(heldout))))
    return train, heldout


def _pack(mixture: TokenizedMixture, args: DataArguments) -> Dataset:
    if args.loss_weighting == "examples":
        mixture = dataclasses.replace(mixture, tokens=weigh_examples(mixture.tokens, args.num_proc))
    return mixture.pack(args)
