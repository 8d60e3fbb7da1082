"""Which global token lives on which rank.

A rank's shard is a list of *segments*, each an arithmetic progression of global token indices. Three layouts:
contiguous (Ring Attention, Liu et al. 2023, arXiv 2310.01889), zigzag (chunks r and 2R-1-r, the load balance of
Llama 3's and ring-flash-attention's head-tail order) and striped (Brandon et al. 2023, arXiv 2311.09431). A layout
is data: how many equal chunks the sequence is cut into and which rank owns chunk n. Everything else follows.

Letters: s global sequence length, R ranks, c = s / R tokens of one rank. No torch here: pure integers.
"""

from collections.abc import Callable
from dataclasses import dataclass


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


@dataclass(frozen=True)
class Layout:
    """`chunks_per_rank` consecutive pieces per rank, or one token each (`interleaved`) dealt round-robin."""

    chunks_per_rank: int
    owner: Callable[[int, int], int]
    interleaved: bool = False


_TABLE = {
    "contiguous": Layout(1, lambda chunk, num_ranks: chunk),
    "zigzag": Layout(2, lambda chunk, num_ranks: min(chunk, 2 * num_ranks - 1 - chunk)),
    "striped": Layout(1, lambda chunk, num_ranks: chunk % num_ranks, interleaved=True),
}
LAYOUTS = tuple(_TABLE)


def _layout(name: str) -> Layout:
    if name not in _TABLE:
        raise ValueError(f"layout={name!r} is not known. Choose one of {', '.join(LAYOUTS)}.")
    return _TABLE[name]


def num_chunks(layout: str, num_ranks: int) -> int:
    """Pieces a sequence is dealt in: the fewest tokens that leave no rank empty."""
    return _layout(layout).chunks_per_rank * num_ranks


def multiple(layout: str, num_ranks: int) -> int:
    """The global length must be a multiple of this (1 when there is one rank)."""
    return num_chunks(layout, num_ranks) if num_ranks > 1 else 1


def padded_length(layout: str, num_tokens: int, num_ranks: int) -> int:
    """`num_tokens` rounded up to the layout's multiple."""
    unit = multiple(layout, num_ranks)
    return -(-num_tokens // unit) * unit


def check_length(layout: str, length: int, num_ranks: int) -> None:
    """Raises `ValueError` unless a sequence of `length` tokens can be dealt to `num_ranks` ranks."""
    unit = multiple(layout, num_ranks)
    if length <= 0 or length % unit:
        raise ValueError(
            f"A sequence of {length} tokens cannot be dealt to {num_ranks} ranks in the {layout} layout: the length "
            f"must be a multiple of {unit}. Pad it to {max(unit, padded_length(layout, length, num_ranks))} "
            "(ContextParallelCollator does)."
        )


def segments(layout: str, length: int, num_ranks: int, rank: int) -> tuple[Segment, ...]:
    """The shard of `rank`, in local order. Raises `ValueError` if `length` is not a multiple of `multiple(...)`."""
    check_length(layout, length, num_ranks)
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank={rank} is not one of {num_ranks} ranks. Ranks count from 0 to {num_ranks - 1}.")
    if num_ranks == 1:
        return (Segment(0, length),)
    rule = _layout(layout)
    if rule.interleaved:
        return (Segment(rank, length // num_ranks, num_ranks),)
    pieces = num_chunks(layout, num_ranks)
    size = length // pieces
    owned = (rank, pieces - 1 - rank) if rule.chunks_per_rank == 2 else (rank,)
    assert all(rule.owner(chunk, num_ranks) == rank for chunk in owned)
    return tuple(Segment(chunk * size, size) for chunk in owned)


def owners(layout: str, length: int, num_ranks: int, first: int, last: int) -> set[int]:
    """Ranks that hold any of the global tokens `first..last` (inclusive)."""
    if num_ranks == 1:
        return {0}
    rule = _layout(layout)
    size = 1 if rule.interleaved else length // num_chunks(layout, num_ranks)
    chunks = range(first // size, last // size + 1)
    if len(chunks) >= num_chunks(layout, num_ranks):
        return set(range(num_ranks))
    return {rule.owner(chunk, num_ranks) for chunk in chunks}


def shard_index(layout: str, length: int, num_ranks: int, rank: int) -> list[int]:
    """Global index (= position) of each local token of `rank`."""
    return [token for segment in segments(layout, length, num_ranks, rank) for token in segment.range]


def unshard_index(layout: str, length: int, num_ranks: int) -> list[int]:
    """Where global token n sits in the concatenation of all shards: the inverse of all `shard_index` together."""
    inverse = [0] * length
    place = 0
    for rank in range(num_ranks):
        for segment in segments(layout, length, num_ranks, rank):
            inverse[segment.slice] = range(place, place + segment.length)
            place += segment.length
    return inverse
