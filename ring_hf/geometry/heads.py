"""Ulysses in integers: which query and key/value heads each of u ranks attends with (arXiv 2309.14509).

Query heads are dealt in *units*: neighbouring heads that share one key/value head. With K key/value heads for at least
u ranks a unit is the whole group; with fewer, groups are halved (or cut otherwise) and several ranks get a copy of the
same key/value head. Heads need not divide evenly: the split that gives the busiest rank the fewest query heads is
taken, and among those the one with the largest units, which copies least.

A rank may attend with its share a few heads at a time (headwise chunking, Ghadia et al. 2026, arXiv 2602.21196).
Chunks are whole units where there are enough of them. More chunks than units cut units, and the chunks of one unit
follow each other, so that its key/value head is sent to the rank once.
"""

import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class HeadShare:
    """Query heads `q_start..q_start + num_q - 1`; each head in `kv` serves `num_q / len(kv)` of them."""

    q_start: int
    num_q: int
    kv: tuple[int, ...]

    @property
    def queries(self) -> tuple[int, ...]:
        return tuple(range(self.q_start, self.q_start + self.num_q))


@dataclass(frozen=True)
class HeadChunk:
    """Part of a rank's share that it attends with at a time.

    Attributes:
        share: its heads.
        fetched: the key/value heads that the rank does not hold from the chunk before: all or none.
        finished: the key/value heads that the chunk after does not need, so that their gradients are complete.
    """

    share: HeadShare
    fetched: tuple[int, ...]
    finished: tuple[int, ...]


def head_split(num_heads: int, num_kv_heads: int, ulysses: int) -> tuple[HeadShare, ...]:
    """The share of each of `ulysses` ranks; one may be empty if heads and ranks do not fit."""
    group = num_heads // num_kv_heads
    assert num_heads == group * num_kv_heads

    def busiest(unit: int) -> int:
        return -(-(num_heads // unit) // ulysses) * unit

    unit = min((size for size in range(1, group + 1) if group % size == 0), key=lambda size: (busiest(size), -size))
    units = num_heads // unit
    shares = []
    for rank in range(ulysses):
        first, last = rank * units // ulysses, (rank + 1) * units // ulysses
        kv = tuple(n * unit // group for n in range(first, last))
        shares.append(HeadShare(first * unit, (last - first) * unit, _merged(kv)))
    return tuple(shares)


def chunk_heads(share: HeadShare, num_chunks: int) -> tuple[HeadChunk, ...]:
    """A share in so many chunks, as equal as units allow; some are empty if it has fewer query heads."""
    units = len(share.kv)
    unit = share.num_q // units if units else 0
    if num_chunks <= units:
        cuts = [n * units // num_chunks * unit for n in range(num_chunks + 1)]
    else:  # each unit gets its part of the chunks, and cuts its heads into these
        cuts = [0] * (num_chunks + 1 if not units else 1)
        for number in range(units):
            parts = (number + 1) * num_chunks // units - number * num_chunks // units
            cuts += [number * unit + n * unit // parts for n in range(1, parts + 1)]
    shares = [
        HeadShare(share.q_start + first, last - first, _merged(share.kv[first // unit : -(-last // unit)]))
        if last > first
        else HeadShare(share.q_start + first, 0, ())
        for first, last in itertools.pairwise(cuts)
    ]
    none = HeadShare(0, 0, ())
    around = zip([none, *shares], shares, [*shares[1:], none], strict=False)
    return tuple(
        HeadChunk(own, () if own.kv == before.kv else own.kv, () if own.kv == after.kv else own.kv)
        for before, own, after in around
    )


def most_head_chunks(num_heads: int, num_kv_heads: int, ulysses: int) -> int:
    """The query heads of the busiest rank: more chunks than these would be empty. Without Ulysses 1."""
    return max(share.num_q for share in head_split(num_heads, num_kv_heads, ulysses)) if ulysses > 1 else 1


def check_head_chunks(num_chunks: int, num_heads: int, num_kv_heads: int, ulysses: int) -> None:
    """Raises `ValueError` unless Ulysses' heads can be exchanged in so many chunks."""
    if num_chunks == 1:
        return
    if num_chunks < 1:
        raise ValueError(
            f"head_chunks={num_chunks} must be a whole number of at least 1; 1 exchanges all heads at once."
        )
    if ulysses == 1:
        raise ValueError(
            f"head_chunks={num_chunks} cuts the exchange of heads, but with ulysses_size=1 no heads are exchanged. "
            "Set ulysses_size to at least 2, or leave head_chunks out."
        )
    most = most_head_chunks(num_heads, num_kv_heads, ulysses)
    if num_chunks > most:
        raise ValueError(
            f"head_chunks={num_chunks} is more than the {most} query heads that the busiest of ulysses_size={ulysses} "
            f"ranks attends with ({num_heads} heads, {num_kv_heads} key/value heads). Set head_chunks to at most "
            f"{most}."
        )


def auto_ulysses(num_heads: int, num_kv_heads: int, num_ranks: int, ranks_per_node: int) -> int:
    """The largest split inside a node that gives every rank the same number of heads and copies none needlessly.

    A divisor of `num_ranks` and of `ranks_per_node` that divides the query heads, and divides the key/value heads or
    is a multiple of them.
    """

    def fits(size: int) -> bool:
        together = num_ranks % size == 0 and ranks_per_node % size == 0
        return together and num_heads % size == 0 and (num_kv_heads % size == 0 or size % num_kv_heads == 0)

    return max(size for size in range(1, min(num_ranks, ranks_per_node) + 1) if fits(size))


def _merged(kv: tuple[int, ...]) -> tuple[int, ...]:
    """Key/value heads of units in a row, each once if all serve equally many of the units."""
    return tuple(sorted(set(kv))) if len({kv.count(head) for head in kv}) == 1 else kv
