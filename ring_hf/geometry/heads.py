"""Ulysses in integers: which query and key/value heads each of u ranks attends with (arXiv 2309.14509).

Query heads are assigned in *units*: neighbouring heads that share one key/value head. With K key/value heads for at
least u ranks a unit is the whole group; with fewer, groups are halved (or cut otherwise) and several ranks get a copy
of the same key/value head. Heads need not divide evenly: among all unit sizes, the one that gives the busiest rank the
fewest query heads is taken, and among those the largest, which copies least.

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
        fetched: key/value heads that the rank does not hold from the previous chunk: all of them or none.
        finished: key/value heads that the next chunk does not need, so that their gradients are complete.
    """

    share: HeadShare
    fetched: tuple[int, ...]
    finished: tuple[int, ...]


def head_split(num_heads: int, num_kv_heads: int, ulysses: int) -> tuple[HeadShare, ...]:
    """Return the share of each of `ulysses` ranks; one may be empty if heads and ranks do not fit."""
    group_size = num_heads // num_kv_heads
    assert num_heads == group_size * num_kv_heads

    def busiest_num_heads(unit: int) -> int:
        return -(-(num_heads // unit) // ulysses) * unit

    divisors = (size for size in range(1, group_size + 1) if group_size % size == 0)
    unit = min(divisors, key=lambda size: (busiest_num_heads(size), -size))
    num_units = num_heads // unit
    shares = []
    for rank in range(ulysses):
        first, last = rank * num_units // ulysses, (rank + 1) * num_units // ulysses
        kv = tuple(n * unit // group_size for n in range(first, last))
        shares.append(HeadShare(first * unit, (last - first) * unit, _merge_repeated(kv)))
    return tuple(shares)


def chunk_heads(share: HeadShare, num_chunks: int) -> tuple[HeadChunk, ...]:
    """Cut a share into `num_chunks` chunks, as equal as units allow; some are empty if it has fewer query heads."""
    num_units = len(share.kv)
    unit = share.num_q // num_units if num_units else 0
    if num_chunks <= num_units:
        cuts = [n * num_units // num_chunks * unit for n in range(num_chunks + 1)]
    else:  # each unit gets its part of the chunks, and cuts its heads into these
        cuts = [0] * (num_chunks + 1 if not num_units else 1)
        for number in range(num_units):
            parts = (number + 1) * num_chunks // num_units - number * num_chunks // num_units
            cuts += [number * unit + n * unit // parts for n in range(1, parts + 1)]
    shares = []
    for first, last in itertools.pairwise(cuts):
        kv = _merge_repeated(share.kv[first // unit : -(-last // unit)]) if last > first else ()
        shares.append(HeadShare(share.q_start + first, last - first, kv))
    nothing = HeadShare(0, 0, ())
    neighbours = zip([nothing, *shares], shares, [*shares[1:], nothing], strict=False)
    return tuple(
        HeadChunk(own, () if own.kv == before.kv else own.kv, () if own.kv == after.kv else own.kv)
        for before, own, after in neighbours
    )


def max_head_chunks(num_heads: int, num_kv_heads: int, ulysses: int) -> int:
    """Return the query heads of the busiest rank: with more chunks some would be empty. Without Ulysses 1."""
    return max(share.num_q for share in head_split(num_heads, num_kv_heads, ulysses)) if ulysses > 1 else 1


def check_head_chunks(num_chunks: int, num_heads: int, num_kv_heads: int, ulysses: int) -> None:
    """Check that Ulysses can exchange the heads in `num_chunks` chunks.

    Raises:
        ValueError: if there are fewer than 1, more than the busiest rank has query heads, or no heads are exchanged.
    """
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
    max_chunks = max_head_chunks(num_heads, num_kv_heads, ulysses)
    if num_chunks > max_chunks:
        raise ValueError(
            f"head_chunks={num_chunks} is more than the {max_chunks} query heads that the busiest of "
            f"ulysses_size={ulysses} ranks attends with ({num_heads} heads, {num_kv_heads} key/value heads). Set "
            f"head_chunks to at most {max_chunks}."
        )


def auto_ulysses(num_heads: int, num_kv_heads: int, num_ranks: int, ranks_per_node: int) -> int:
    """Return the largest Ulysses size inside a node that divides heads evenly and copies no head needlessly.

    It divides `num_ranks`, `ranks_per_node` and the query heads, and divides the key/value heads or is a multiple of
    them.
    """

    def fits(size: int) -> bool:
        if num_ranks % size or ranks_per_node % size or num_heads % size:
            return False
        return num_kv_heads % size == 0 or size % num_kv_heads == 0

    return max(size for size in range(1, min(num_ranks, ranks_per_node) + 1) if fits(size))


def _merge_repeated(kv: tuple[int, ...]) -> tuple[int, ...]:
    """List each of consecutive units' key/value heads once, if all of them serve the same number of units."""
    return tuple(sorted(set(kv))) if len({kv.count(head) for head in kv}) == 1 else kv
