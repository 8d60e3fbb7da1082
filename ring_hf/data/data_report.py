"""The report on a mixture before training: what is read, what is left out, how full sequences are, how even ranks are.

All numbers are counts of the plan that training follows; nothing is estimated, but for the balance over ranks, which
is that of some sequences.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..geometry import LAYOUTS, Mask, ShardedSequence, padded_length, rank_work
from .mixture import OverlongOutcome, SourcePlan, overlong_outcomes
from .packing import IGNORED, DocumentSpan
from .run_options import DataArguments
from .sequences import TokenizedMixture
from .tokens import LABELS, read_row

BALANCE_SEQUENCES = 32  # sequences whose balance is computed


@dataclass(frozen=True)
class LengthBucket:
    """Documents with `least` to `2 * least - 1` tokens."""

    least: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class SourceReport:
    """One source: its documents, what the choices of `overlong` would keep, and what is trained on.

    `short_documents` and `short_tokens` are those below `min_length`; `outcomes` are of the others, by choice.
    """

    name: str
    source: str
    format: str
    overlong: str
    span_length: int
    min_length: int
    documents: int
    tokens: int
    longest: int
    short_documents: int
    short_tokens: int
    histogram: tuple[LengthBucket, ...]
    outcomes: dict[str, OverlongOutcome]
    epoch_tokens: int
    trained_tokens: int
    epochs: float
    asked_share: float | None
    share: float


@dataclass(frozen=True)
class LayoutBalance:
    """Work of the busiest rank over the mean, of some sequences: their mean and the worst of them."""

    layout: str
    mean: float
    worst: float


@dataclass(frozen=True)
class DataReport:
    """A mixture as training will see it.

    `padding` is the share of padding if every sequence were filled to `max_length`. A step is one update of the
    weights; `steps` is the number that reads every sequence once.
    """

    sources: tuple[SourceReport, ...]
    max_length: int
    packing: str
    attend_across_documents: bool
    is_sample: bool
    sequences: int
    spans: int
    tokens: int
    targets: int
    padding: float
    sequences_per_step: int
    steps: int
    max_steps: int | None
    context_parallel_size: int
    balance: tuple[LayoutBalance, ...]

    @property
    def passes(self) -> float | None:
        """How often the run reads the mixture, if `max_steps` is given."""
        return None if self.max_steps is None else self.max_steps * self.sequences_per_step / self.sequences


def make_report(
    mixture: TokenizedMixture,
    args: DataArguments,
    context_parallel_size: int = 1,
    sequences_per_step: int = 1,
    max_steps: int | None = None,
    is_sample: bool = False,
) -> DataReport:
    """Report on a mixture.

    Args:
        mixture: tokens and plan.
        args (`DataArguments`): how they are packed.
        context_parallel_size: ranks that share a sequence.
        sequences_per_step: of all replicas and micro-batches.
        max_steps: of the run; default: it reads the mixture once.
        is_sample: whether the documents are only the first of each source.
    """
    sequences = mixture.pack_spans(args)
    lengths = [[len(span) for span in parts] for parts in sequences]
    total = mixture.plan_tokens
    shares = mixture.spec.shares if mixture.spec.has_weights else [None] * len(mixture.plan.sources)
    return DataReport(
        sources=tuple(
            _report_source(plan, share, total) for plan, share in zip(mixture.plan.sources, shares, strict=True)
        ),
        max_length=args.max_length,
        packing=args.packing,
        attend_across_documents=args.attend_across_documents,
        is_sample=is_sample,
        sequences=len(sequences),
        spans=sum(map(len, sequences)),
        tokens=total,
        targets=count_targets(mixture, sequences, args.mask_boundaries),
        padding=1 - total / (len(sequences) * args.max_length),
        sequences_per_step=sequences_per_step,
        steps=math.ceil(len(sequences) / sequences_per_step),
        max_steps=max_steps,
        context_parallel_size=context_parallel_size,
        balance=_balance(lengths, context_parallel_size, args.attend_across_documents),
    )


def length_histogram(lengths: np.ndarray) -> tuple[LengthBucket, ...]:
    """Return documents and tokens by powers of two of the length, from the shortest to the longest."""
    exponents = np.frexp(np.maximum(lengths, 1).astype(np.float64))[1] - 1
    return tuple(
        LengthBucket(2**exponent, int((exponents == exponent).sum()), int(lengths[exponents == exponent].sum()))
        for exponent in range(int(exponents.min()), int(exponents.max()) + 1)
    )


def count_targets(
    mixture: TokenizedMixture, sequences: Sequence[Sequence[DocumentSpan]], mask_boundaries: bool
) -> int:
    """Return the number of tokens that are predicted and have a loss.

    The first token of a sequence is never predicted; that of any other span is if `mask_boundaries` is off.
    """
    counts = 0
    by_document: dict[int, list[tuple[int, int]]] = {}
    has_labels = LABELS in mixture.tokens.column_names
    for parts in sequences:
        for number, span in enumerate(parts):
            start = span.start + (mask_boundaries or number == 0)
            if has_labels:
                by_document.setdefault(span.document, []).append((start, span.stop))
            else:
                counts += span.stop - start
    table = mixture.tokens.with_format("arrow")
    for document, ranges in by_document.items():
        has_loss = read_row(table, document).labels != IGNORED
        counts += sum(int(has_loss[start:stop].sum()) for start, stop in ranges)
    return counts


def _report_source(plan: SourcePlan, share: float | None, total: int) -> SourceReport:
    spec, lengths = plan.spec, plan.lengths
    is_short = lengths < spec.min_length
    return SourceReport(
        name=spec.name,
        source=spec.source,
        format=spec.format,
        overlong=spec.overlong,
        span_length=plan.span_length,
        min_length=spec.min_length,
        documents=len(lengths),
        tokens=int(lengths.sum()),
        longest=int(lengths.max()),
        short_documents=int(is_short.sum()),
        short_tokens=int(lengths[is_short].sum()),
        histogram=length_histogram(lengths),
        outcomes=overlong_outcomes(lengths, plan.span_length, spec.min_length),
        epoch_tokens=plan.tokens_of_epoch,
        trained_tokens=plan.num_tokens,
        epochs=plan.num_epochs,
        asked_share=share,
        share=plan.num_tokens / total,
    )


def _balance(
    sequences: Sequence[Sequence[int]], num_ranks: int, attend_across_documents: bool
) -> tuple[LayoutBalance, ...]:
    if num_ranks == 1:
        return ()
    chosen = np.unique(np.linspace(0, len(sequences) - 1, min(len(sequences), BALANCE_SEQUENCES)).astype(int))
    rows = []
    for layout in LAYOUTS:
        ratios = [
            busiest_over_mean([sum(sequences[i])] if attend_across_documents else sequences[i], layout, num_ranks)
            for i in chosen.tolist()
        ]
        rows.append(LayoutBalance(layout, sum(ratios) / len(ratios), max(ratios)))
    return tuple(rows)


def busiest_over_mean(documents: Sequence[int], layout: str, num_ranks: int) -> float:
    """Return the visible pairs of the busiest rank over the mean, in one sequence of documents of these lengths."""
    num_tokens = sum(documents)
    length = padded_length(layout, num_tokens, num_ranks)
    boundaries = None
    if len(documents) > 1:  # as the collator describes a row
        ends = [*itertools.accumulate(documents), *([length] if length > num_tokens else [])]
        boundaries = ((0, *ends),)
    sequence = ShardedSequence(layout, length, num_ranks, boundaries, (num_tokens,))
    work = [rank_work(sequence, Mask(), rank) for rank in range(num_ranks)]
    return max(work) * num_ranks / sum(work)
