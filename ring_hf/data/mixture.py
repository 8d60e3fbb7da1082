"""Mixtures: which spans of which documents are trained on, how often, and in what order.

All of it is arithmetic on the lengths of documents, with a seed: every process makes the same plan, and so does a run
that continues. Per source, in this order:

1. Documents below `min_length` are left out; what is above the longest span is cut, dropped or truncated.
2. `length_weights` repeats or thins out documents by length. The result is one epoch of the source.
3. `max_tokens` thins out the epoch, in an order of the seed.
4. With weights, whole epochs are taken, each in a new order, and of the last one as much as the share still needs:
   the end is at the span that is nearest to the asked number of tokens.

Then the spans of all sources are shuffled together, unless there is one source that is read once as it is.

A span is a row `[document, start, stop]` of an int64 array.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .source_spec import OVERLONG, MixtureSpec, SourceSpec


@dataclass(frozen=True)
class SourcePlan:
    """What is read of one source.

    Args:
        spec: its settings.
        lengths: tokens of each of its documents, `[num_documents]`.
        span_length: the longest span.
        epoch: the spans of one epoch, `[num_spans, 3]`.
        spans: those that are trained on, `[num_spans, 3]`, with repetitions.
    """

    spec: SourceSpec
    lengths: np.ndarray
    span_length: int
    epoch: np.ndarray
    spans: np.ndarray

    @property
    def tokens_of_epoch(self) -> int:
        return count_tokens(self.epoch)

    @property
    def num_tokens(self) -> int:
        return count_tokens(self.spans)

    @property
    def num_epochs(self) -> float:
        return self.num_tokens / self.tokens_of_epoch


@dataclass(frozen=True)
class MixturePlan:
    """What is read of all sources.

    Args:
        sources: one plan for each.
        spans: all spans in their order, `[num_spans, 3]`; documents are counted through all sources.
    """

    sources: tuple[SourcePlan, ...]
    spans: np.ndarray


@dataclass(frozen=True)
class OverlongOutcome:
    """What one choice of `overlong` keeps of a source: numbers of documents, and of tokens."""

    whole: int
    shortened: int
    dropped: int
    kept_tokens: int
    tokens: int


def plan_mixture(lengths: Sequence[np.ndarray], mixture: MixtureSpec, length: int) -> MixturePlan:
    """Plan a mixture.

    Args:
        lengths: of the documents of each source, in tokens.
        mixture (`MixtureSpec`): the sources and their shares.
        length: tokens of a sequence.

    Raises:
        ValueError: if nothing is left of a source, or its share is less than one of its spans.
    """
    is_plain = is_read_as_it_is(mixture)
    epochs = []
    for number, (spec, source_lengths) in enumerate(zip(mixture.sources, lengths, strict=True)):
        generator = np.random.default_rng([mixture.seed, number])
        epochs.append(plan_epoch(np.asarray(source_lengths), spec, length, generator, keeps_documents=is_plain))
    selected = _select(epochs, mixture)
    plans = tuple(
        SourcePlan(spec, np.asarray(source_lengths), spec.span_length(length), epoch, spans)
        for spec, source_lengths, epoch, spans in zip(mixture.sources, lengths, epochs, selected, strict=True)
    )
    offsets = np.cumsum([0, *map(len, lengths)])
    spans = np.concatenate(
        [plan.spans + np.array([offset, 0, 0]) for plan, offset in zip(plans, offsets[:-1], strict=True)]
    )
    if not is_plain:
        spans = np.random.default_rng([mixture.seed, len(plans)]).permutation(spans)
    return MixturePlan(plans, spans)


def is_read_as_it_is(mixture: MixtureSpec) -> bool:
    """Return whether there is one source of which every document is read once and in order."""
    (first, *others) = mixture.sources
    return not (
        others
        or mixture.has_weights
        or mixture.tokens is not None
        or first.length_weights
        or first.max_tokens is not None
        or first.max_length is not None
        or first.overlong != "cut"
    )


def plan_epoch(
    lengths: np.ndarray, spec: SourceSpec, length: int, generator: np.random.Generator, keeps_documents: bool = False
) -> np.ndarray:
    """Return the spans of one epoch of a source, `[num_spans, 3]`.

    Args:
        lengths: tokens of each document.
        spec (`SourceSpec`): its settings.
        length: tokens of a sequence.
        generator: decides which documents `length_weights` and `max_tokens` choose.
        keeps_documents: leave it to packing to cut long documents.

    Raises:
        ValueError: if nothing is left.
    """
    span_length = spec.span_length(length)
    copies = np.where(lengths >= spec.min_length, repetitions(lengths, spec, generator), 0)
    if spec.overlong == "drop":
        copies[lengths > span_length] = 0
    documents = np.repeat(np.arange(len(lengths)), copies)
    if spec.overlong == "truncate":
        ends = np.minimum(lengths[documents], span_length)
        spans = np.stack([documents, np.zeros_like(ends), ends], axis=1)
    elif keeps_documents:
        spans = np.stack([documents, np.zeros_like(documents), lengths[documents]], axis=1)
    else:
        spans = _cut(documents, lengths, span_length)
    if not len(spans):
        raise ValueError(_explain_nothing_left(lengths, spec, span_length))
    if spec.max_tokens is None or count_tokens(spans) <= spec.max_tokens:
        return spans
    order = generator.permutation(len(spans))
    sums = np.cumsum(_sizes(spans)[order])
    count = int(np.searchsorted(sums, spec.max_tokens, side="right"))
    if not count:
        raise ValueError(
            f"data source {spec.name!r}: max_tokens={spec.max_tokens} is below the {sums[0]} tokens of a span. Raise "
            "it, or lower max_length."
        )
    return spans[np.sort(order[:count])]


def repetitions(lengths: np.ndarray, spec: SourceSpec, generator: np.random.Generator) -> np.ndarray:
    """Return how often each document is read in an epoch.

    Of n documents with a fractional weight w, n times the fraction, rounded, are read once more; the generator chooses
    which.
    """
    copies = np.ones(len(lengths), dtype=np.int64)
    ranges = sorted(spec.length_weights.items())
    for (least, weight), (below, _) in itertools.pairwise([*ranges, (np.inf, 0.0)]):
        (members,) = np.nonzero((lengths >= least) & (lengths < below))
        whole, fraction = divmod(float(weight), 1.0)
        copies[members] = int(whole)
        copies[generator.permutation(members)[: round(fraction * len(members))]] += 1
    return copies


def overlong_outcomes(lengths: np.ndarray, span_length: int, min_length: int = 1) -> dict[str, OverlongOutcome]:
    """Return what each choice of `overlong` keeps of documents that have at least `min_length` tokens."""
    lengths = lengths[lengths >= min_length]
    is_long = lengths > span_length
    whole, num_long = int((~is_long).sum()), int(is_long.sum())
    tokens, tokens_of_short = int(lengths.sum()), int(lengths[~is_long].sum())
    kept = {"cut": tokens, "drop": tokens_of_short, "truncate": tokens_of_short + num_long * span_length}
    return {
        choice: OverlongOutcome(
            whole,
            0 if choice == "drop" else num_long,
            num_long if choice == "drop" else 0,
            kept[choice],
            tokens,
        )
        for choice in OVERLONG
    }


def count_tokens(spans: np.ndarray) -> int:
    """Return the number of tokens in spans."""
    return int(_sizes(spans).sum())


def _sizes(spans: np.ndarray) -> np.ndarray:
    return spans[:, 2] - spans[:, 1]


def _cut(documents: np.ndarray, lengths: np.ndarray, span_length: int) -> np.ndarray:
    num_spans = -(-lengths[documents] // span_length)
    owner = np.repeat(np.arange(len(documents)), num_spans)
    starts = (np.arange(len(owner)) - np.repeat(np.cumsum(num_spans) - num_spans, num_spans)) * span_length
    ends = np.minimum(starts + span_length, lengths[documents[owner]])
    return np.stack([documents[owner], starts, ends], axis=1)


def _select(epochs: Sequence[np.ndarray], mixture: MixtureSpec) -> list[np.ndarray]:
    """Return the spans of each source that are trained on."""
    sizes = np.array([count_tokens(epoch) for epoch in epochs], dtype=float)
    shares = np.array(mixture.shares) if mixture.has_weights else sizes / sizes.sum()
    if mixture.tokens is not None:
        total = float(mixture.tokens)
    elif not mixture.has_weights:
        return list(epochs)
    else:
        totals = sizes / shares
        total = float(totals.min() if mixture.stop == "first_exhausted" else totals.max())
    selected = []
    for number, (spec, epoch, share) in enumerate(zip(mixture.sources, epochs, shares, strict=True)):
        generator = np.random.default_rng([mixture.seed, number, 1])
        spans = select_spans(epoch, round(share * total), generator)
        if not len(spans):
            raise ValueError(
                f"data source {spec.name!r}: its share, {share:.3g} of {total:,.0f} tokens, is less than half of a "
                "document. Raise mixture_tokens or its weight, or remove the source."
            )
        selected.append(spans)
    return selected


def select_spans(epoch: np.ndarray, num_tokens: int, generator: np.random.Generator) -> np.ndarray:
    """Return spans of about `num_tokens`: whole epochs, each in a new order, and the beginning of one more.

    The sum is within half a span of `num_tokens`.
    """
    orders = []
    remaining = num_tokens
    size = count_tokens(epoch)
    while remaining >= size:
        orders.append(generator.permutation(epoch))
        remaining -= size
    last = generator.permutation(epoch)
    sums = np.concatenate([[0], np.cumsum(_sizes(last))])
    orders.append(last[: int(np.argmin(np.abs(sums - remaining)))])
    return np.concatenate(orders)


def _explain_nothing_left(lengths: np.ndarray, spec: SourceSpec, span_length: int) -> str:
    longest = int(lengths.max()) if len(lengths) else 0
    short, long = int((lengths < spec.min_length).sum()), int((lengths > span_length).sum())
    return (
        f"data source {spec.name!r}: nothing is left of {len(lengths)} documents. {short} have less than min_length="
        f"{spec.min_length} tokens, {long} more than {span_length} (overlong: {spec.overlong}); the longest has "
        f"{longest}. Change these settings, or length_weights={dict(spec.length_weights)}."
    )
