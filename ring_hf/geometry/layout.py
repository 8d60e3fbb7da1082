"""Which global token lives on which rank.

A rank's shard is a list of *segments*, each an arithmetic progression of global token indices. Four layouts:
contiguous (Ring Attention, Liu et al. 2023, arXiv 2310.01889), zigzag (chunks r and 2R-1-r, the load balance of
Llama 3's and ring-flash-attention's head-tail order), striped (Brandon et al. 2023, arXiv 2311.09431) and balanced
(chunks dealt by the work that packed documents make of them, see `balance`). A layout is data: into how many equal
chunks the sequence is cut and which rank owns chunk n. Everything else follows.

Ranks form a ring of R, and every place of the ring may be shared by u ranks that exchange heads instead of keys and
values (Ulysses, Jacobs et al. 2023, arXiv 2309.14509): the layout deals to the places, and the tokens of a place are
cut, in local order, into u equal parts. Rank = place * u + part, so that the ranks of one place are neighbours.

Letters: s global sequence length, R places of the ring, u ranks of a place. No torch here: pure integers.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .balance import MOST_CHUNKS, Rows, balanced_owners


@dataclass(frozen=True, slots=True)
class Segment:
    """`length` global token indices `start, start + step, start + 2 * step, ...`."""

    start: int
    length: int
    step: int = 1

    @property
    def range(self) -> range:
        return range(self.start, self.start + self.step * self.length, self.step)

    @property
    def slice(self) -> slice:
        """Index of this segment along a global sequence dim."""
        return slice(self.start, self.start + self.step * self.length, self.step)


def _static(rule: Callable[[int, int], int], chunks_per_rank: int) -> Callable[[int, int, Rows], tuple[int, ...]]:
    def owners(length: int, ring_size: int, rows: Rows) -> tuple[int, ...]:
        return tuple(rule(chunk, ring_size) for chunk in range(chunks_per_rank * ring_size))

    return owners


@dataclass(frozen=True)
class Layout:
    """At least `chunks_per_rank` equal chunks per rank; `owners(length, ring size, documents)` says whose each is.

    With `interleaved` a chunk is one token and the owners repeat themselves to the end of the sequence.
    """

    chunks_per_rank: int
    owners: Callable[[int, int, Rows], tuple[int, ...]]
    interleaved: bool = False
    finest: int = 0  # chunks per rank worth padding for when the sequence is long


_TABLE = {
    "contiguous": Layout(1, _static(lambda chunk, ring_size: chunk, 1)),
    "zigzag": Layout(2, _static(lambda chunk, ring_size: min(chunk, 2 * ring_size - 1 - chunk), 2)),
    "striped": Layout(1, _static(lambda chunk, ring_size: chunk, 1), interleaved=True),
    "balanced": Layout(2, balanced_owners, finest=MOST_CHUNKS),
}
LAYOUTS = tuple(_TABLE)
_PADDING = 64  # finer chunks may cost at most 1 / 64 of the tokens in padding


def layout_rule(name: str) -> Layout:
    """The rule called `name`. Raises `ValueError` if there is none."""
    if name not in _TABLE:
        raise ValueError(f"layout={name!r} is not known. Choose one of {', '.join(LAYOUTS)}.")
    return _TABLE[name]


def ring_size_of(num_ranks: int, ulysses: int) -> int:
    """Places of the ring. Raises `ValueError` unless `ulysses` divides `num_ranks`."""
    if ulysses < 1 or num_ranks % ulysses:
        raise ValueError(
            f"ulysses_size={ulysses} does not divide the {num_ranks} ranks that share a sequence. Choose a divisor: "
            "their quotient is the size of the ring."
        )
    return num_ranks // ulysses


def num_chunks(layout: str, num_ranks: int, ulysses: int = 1) -> int:
    """Pieces a sequence is dealt in: the fewest tokens that leave no rank empty."""
    ring_size = ring_size_of(num_ranks, ulysses)
    chunks = layout_rule(layout).chunks_per_rank if ring_size > 1 else 1
    return ring_size * math.lcm(chunks, ulysses)


def multiple(layout: str, num_ranks: int, ulysses: int = 1) -> int:
    """The global length must be a multiple of this (1 when there is one rank)."""
    return num_chunks(layout, num_ranks, ulysses)


def padded_length(layout: str, num_tokens: int, num_ranks: int, ulysses: int = 1) -> int:
    """`num_tokens` rounded up to the layout's multiple; in the balanced layout to a larger one if that is cheap."""
    unit = multiple(layout, num_ranks, ulysses)
    chunks = layout_rule(layout).chunks_per_rank
    while num_ranks > ulysses and 2 * chunks <= layout_rule(layout).finest and 2 * unit * _PADDING <= num_tokens:
        chunks, unit = 2 * chunks, 2 * unit
    return -(-num_tokens // unit) * unit


def check_length(layout: str, length: int, num_ranks: int, ulysses: int = 1) -> None:
    """Raises `ValueError` unless a sequence of `length` tokens can be dealt to `num_ranks` ranks."""
    unit = multiple(layout, num_ranks, ulysses)
    if length <= 0 or length % unit:
        shared = f"{num_ranks} ranks" + (f" (ring of {num_ranks // ulysses} x ulysses {ulysses})" * (ulysses > 1))
        raise ValueError(
            f"A sequence of {length} tokens cannot be dealt to {shared} in the {layout} layout: the length "
            f"must be a multiple of {unit}. Pad it to {max(unit, padded_length(layout, length, num_ranks, ulysses))} "
            "(ContextParallelCollator does)."
        )


def segments(
    layout: str, length: int, num_ranks: int, rank: int, ulysses: int = 1, documents: Rows = ()
) -> tuple[Segment, ...]:
    """The shard of `rank`, in local order.

    Args:
        documents: per batch row the cumulative boundaries; only the balanced layout looks at them.

    Raises:
        ValueError: if `length` is not a multiple of `multiple(...)`, or there is no such rank or layout.
    """
    check_length(layout, length, num_ranks, ulysses)
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank={rank} is not one of {num_ranks} ranks. Ranks count from 0 to {num_ranks - 1}.")
    place, part = divmod(rank, ulysses)
    size = length // num_ranks
    shard = ring_segments(layout, length, num_ranks // ulysses, place, documents)
    return slice_segments(shard, part * size, (part + 1) * size)


def ring_segments(layout: str, length: int, ring_size: int, place: int, documents: Rows = ()) -> tuple[Segment, ...]:
    """The tokens of one place of the ring, in local order."""
    if ring_size == 1:
        return (Segment(0, length),)
    rule = layout_rule(layout)
    if rule.interleaved:
        return (Segment(place, length // ring_size, ring_size),)
    owners = rule.owners(length, ring_size, documents)
    size = length // len(owners)
    found: list[Segment] = []
    for chunk, owner in enumerate(owners):
        if owner != place:
            continue
        if found and found[-1].start + found[-1].length == chunk * size:
            found[-1] = Segment(found[-1].start, found[-1].length + size)
        else:
            found.append(Segment(chunk * size, size))
    return tuple(found)


def slice_segments(shard: Iterable[Segment], start: int, stop: int) -> tuple[Segment, ...]:
    """Local tokens `start..stop - 1` of a shard, as segments."""
    found = []
    place = 0
    for segment in shard:
        first, last = max(start - place, 0), min(stop - place, segment.length)
        if first < last:
            found.append(Segment(segment.start + first * segment.step, last - first, segment.step))
        place += segment.length
    return tuple(found)


def owners(layout: str, length: int, ring_size: int, first: int, last: int, documents: Rows = ()) -> set[int]:
    """Places of the ring that hold any of the global tokens `first..last` (inclusive)."""
    if ring_size == 1:
        return {0}
    rule = layout_rule(layout)
    dealt = rule.owners(length, ring_size, documents)
    if rule.interleaved:
        return set(range(ring_size)) if last - first >= ring_size else {n % ring_size for n in range(first, last + 1)}
    size = length // len(dealt)
    if (last - first) // size >= len(dealt) - 1:
        return set(range(ring_size))
    return set(dealt[first // size : last // size + 1])


def shard_index(
    layout: str, length: int, num_ranks: int, rank: int, ulysses: int = 1, documents: Rows = ()
) -> list[int]:
    """Global index (= position) of each local token of `rank`."""
    shard = segments(layout, length, num_ranks, rank, ulysses, documents)
    return [token for segment in shard for token in segment.range]


def unshard_index(layout: str, length: int, num_ranks: int, ulysses: int = 1, documents: Rows = ()) -> list[int]:
    """Where global token n sits in the concatenation of all shards: the inverse of all `shard_index` together."""
    inverse = [0] * length
    place = 0
    for rank in range(num_ranks):
        for segment in segments(layout, length, num_ranks, rank, ulysses, documents):
            inverse[segment.slice] = range(place, place + segment.length)
            place += segment.length
    return inverse
