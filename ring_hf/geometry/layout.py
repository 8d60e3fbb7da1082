"""Which global token lives on which rank.

A rank's shard is a list of *segments*, each an arithmetic progression of global token indices. Four layouts:
contiguous (Ring Attention, Liu et al. 2023, arXiv 2310.01889), zigzag (chunks r and 2R-1-r, the load balance of
Llama 3's and ring-flash-attention's head-tail order), striped (Brandon et al. 2023, arXiv 2311.09431) and balanced
(chunks assigned by the work that packed documents make of them, see `balance`). A layout is data: into how many equal
chunks the sequence is cut and which rank owns chunk n. Everything else follows.

R ring ranks form the ring, and each of them may be a group of u ranks that exchange heads instead of keys and values
(Ulysses, Jacobs et al. 2023, arXiv 2309.14509). The layout assigns chunks to ring ranks; the tokens of a ring rank are
cut, in local order, into u equal parts. Rank = ring rank * u + part, so that a Ulysses group has neighbouring ranks.

Letters: s global sequence length, R ring ranks, u ranks of a Ulysses group. No torch here: pure integers.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .balance import MAX_CHUNKS_PER_RANK, IntsPerRow, balanced_owners


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


Owners = Callable[[int, int, IntsPerRow], tuple[int, ...]]


def _static_owners(rule: Callable[[int, int], int], chunks_per_rank: int) -> Owners:
    def owners(length: int, ring_size: int, documents: IntsPerRow) -> tuple[int, ...]:
        return tuple(rule(chunk, ring_size) for chunk in range(chunks_per_rank * ring_size))

    return owners


@dataclass(frozen=True)
class Layout:
    """How a layout cuts and assigns a sequence.

    Attributes:
        chunks_per_rank: equal chunks per ring rank, at least.
        owners: `owners(length, ring_size, documents)` returns the ring rank of each chunk.
        interleaved: whether a chunk is one token and the owners repeat to the end of the sequence.
        max_chunks_per_rank: chunks per ring rank that are worth padding for when the sequence is long; 0 for none.
    """

    chunks_per_rank: int
    owners: Owners
    interleaved: bool = False
    max_chunks_per_rank: int = 0


_LAYOUTS = {
    "contiguous": Layout(1, _static_owners(lambda chunk, ring_size: chunk, 1)),
    "zigzag": Layout(2, _static_owners(lambda chunk, ring_size: min(chunk, 2 * ring_size - 1 - chunk), 2)),
    "striped": Layout(1, _static_owners(lambda chunk, ring_size: chunk, 1), interleaved=True),
    "balanced": Layout(2, balanced_owners, max_chunks_per_rank=MAX_CHUNKS_PER_RANK),
}
LAYOUTS = tuple(_LAYOUTS)
_MIN_CHUNK_MULTIPLES = 64  # finer chunks may cost at most 1 / 64 of the tokens in padding


def layout_rule(name: str) -> Layout:
    """Return the rule of a layout.

    Raises:
        ValueError: if there is no layout of that name.
    """
    if name not in _LAYOUTS:
        raise ValueError(f"layout={name!r} is not known. Choose one of {', '.join(LAYOUTS)}.")
    return _LAYOUTS[name]


def ring_size_of(num_ranks: int, ulysses: int) -> int:
    """Return the number of ring ranks.

    Raises:
        ValueError: if `ulysses` does not divide `num_ranks`.
    """
    if ulysses < 1 or num_ranks % ulysses:
        raise ValueError(
            f"ulysses_size={ulysses} does not divide the {num_ranks} ranks that share a sequence. Choose a divisor: "
            "their quotient is the size of the ring."
        )
    return num_ranks // ulysses


def length_multiple(layout: str, num_ranks: int, ulysses: int = 1) -> int:
    """Return the number of tokens that the global length must be a multiple of (1 when there is one rank).

    This is also the number of chunks that a sequence is cut into at least.

    Raises:
        ValueError: if there is no such layout, or `ulysses` does not divide `num_ranks`.
    """
    ring_size = ring_size_of(num_ranks, ulysses)
    chunks_per_rank = layout_rule(layout).chunks_per_rank if ring_size > 1 else 1
    return ring_size * math.lcm(chunks_per_rank, ulysses)


def padded_length(layout: str, num_tokens: int, num_ranks: int, ulysses: int = 1) -> int:
    """Round `num_tokens` up to the layout's multiple, in the balanced layout to a larger one if the padding is small.

    Raises:
        ValueError: if there is no such layout, or `ulysses` does not divide `num_ranks`.
    """
    multiple = length_multiple(layout, num_ranks, ulysses)
    rule = layout_rule(layout)
    chunks_per_rank = rule.chunks_per_rank
    while (
        num_ranks > ulysses
        and 2 * chunks_per_rank <= rule.max_chunks_per_rank
        and 2 * multiple * _MIN_CHUNK_MULTIPLES <= num_tokens
    ):
        chunks_per_rank, multiple = 2 * chunks_per_rank, 2 * multiple
    return -(-num_tokens // multiple) * multiple


def check_length(layout: str, length: int, num_ranks: int, ulysses: int = 1) -> None:
    """Check that a sequence can be sharded.

    Raises:
        ValueError: if `length` is not a positive multiple of `length_multiple(...)`.
    """
    multiple = length_multiple(layout, num_ranks, ulysses)
    if length <= 0 or length % multiple:
        ranks = f"{num_ranks} ranks"
        if ulysses > 1:
            ranks += f" (ring of {num_ranks // ulysses} x ulysses {ulysses})"
        padded = max(multiple, padded_length(layout, length, num_ranks, ulysses))
        raise ValueError(
            f"A sequence of {length} tokens cannot be sharded over {ranks} in the {layout} layout: the length "
            f"must be a multiple of {multiple}. Pad it to {padded} (ContextParallelCollator does)."
        )


def segments(
    layout: str, length: int, num_ranks: int, rank: int, ulysses: int = 1, documents: IntsPerRow = ()
) -> tuple[Segment, ...]:
    """Return the shard of `rank`, in local order.

    Args:
        documents: per batch row the cumulative boundaries; only the balanced layout depends on them.

    Raises:
        ValueError: if `length` is not a multiple of `length_multiple(...)`, or there is no such rank or layout.
    """
    check_length(layout, length, num_ranks, ulysses)
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank={rank} is not one of {num_ranks} ranks. Ranks count from 0 to {num_ranks - 1}.")
    ring_rank, part = divmod(rank, ulysses)
    shard_length = length // num_ranks
    ring_shard = ring_segments(layout, length, num_ranks // ulysses, ring_rank, documents)
    return slice_segments(ring_shard, part * shard_length, (part + 1) * shard_length)


def ring_segments(
    layout: str, length: int, ring_size: int, ring_rank: int, documents: IntsPerRow = ()
) -> tuple[Segment, ...]:
    """Return the tokens of one ring rank, in local order."""
    if ring_size == 1:
        return (Segment(0, length),)
    rule = layout_rule(layout)
    if rule.interleaved:
        return (Segment(ring_rank, length // ring_size, ring_size),)
    chunk_owners = rule.owners(length, ring_size, documents)
    chunk_size = length // len(chunk_owners)
    chunks = (
        Segment(chunk * chunk_size, chunk_size) for chunk, owner in enumerate(chunk_owners) if owner == ring_rank
    )
    return tuple(join_segments(chunks))


def join_segments(parts: Iterable[Segment]) -> list[Segment]:
    """Merge each run of consecutive tokens into one segment."""
    joined: list[Segment] = []
    for segment in parts:
        last = joined[-1] if joined else None
        if last is not None and last.step == segment.step == 1 and last.start + last.length == segment.start:
            joined[-1] = Segment(last.start, last.length + segment.length)
        else:
            joined.append(segment)
    return joined


def slice_segments(shard: Iterable[Segment], start: int, stop: int) -> tuple[Segment, ...]:
    """Return the local tokens `start..stop - 1` of a shard, as segments."""
    parts = []
    offset = 0
    for segment in shard:
        first, last = max(start - offset, 0), min(stop - offset, segment.length)
        if first < last:
            parts.append(Segment(segment.start + first * segment.step, last - first, segment.step))
        offset += segment.length
    return tuple(parts)


def owners(layout: str, length: int, ring_size: int, first: int, last: int, documents: IntsPerRow = ()) -> set[int]:
    """Return the ring ranks that hold any of the global tokens `first..last` (inclusive)."""
    if ring_size == 1:
        return {0}
    rule = layout_rule(layout)
    if rule.interleaved:
        if last - first >= ring_size:
            return set(range(ring_size))
        return {token % ring_size for token in range(first, last + 1)}
    chunk_owners = rule.owners(length, ring_size, documents)
    chunk_size = length // len(chunk_owners)
    if (last - first) // chunk_size >= len(chunk_owners) - 1:
        return set(range(ring_size))
    return set(chunk_owners[first // chunk_size : last // chunk_size + 1])


def shard_index(
    layout: str, length: int, num_ranks: int, rank: int, ulysses: int = 1, documents: IntsPerRow = ()
) -> list[int]:
    """Return the global index (= position) of each local token of `rank`.

    Raises:
        ValueError: as `segments` does.
    """
    shard = segments(layout, length, num_ranks, rank, ulysses, documents)
    return [token for segment in shard for token in segment.range]


def unshard_index(layout: str, length: int, num_ranks: int, ulysses: int = 1, documents: IntsPerRow = ()) -> list[int]:
    """Return for each global token its index in the concatenation of all shards, the inverse of all `shard_index`.

    Raises:
        ValueError: as `segments` does.
    """
    inverse = [0] * length
    offset = 0
    for rank in range(num_ranks):
        for segment in segments(layout, length, num_ranks, rank, ulysses, documents):
            inverse[segment.slice] = range(offset, offset + segment.length)
            offset += segment.length
    return inverse
