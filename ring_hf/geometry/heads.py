"""Ulysses in integers: which query and key/value heads each of u ranks attends with (arXiv 2309.14509).

Query heads are dealt in *units*: neighbouring heads that share one key/value head. With K key/value heads for at least
u ranks a unit is the whole group; with fewer, groups are halved (or cut otherwise) and several ranks get a copy of the
same key/value head. Heads need not divide evenly: the split that gives the busiest rank the fewest query heads is
taken, and among those the one with the largest units, which copies least.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadShare:
    """Query heads `q_start..q_start + num_q - 1`; each head in `kv` serves `num_q / len(kv)` of them."""

    q_start: int
    num_q: int
    kv: tuple[int, ...]


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
        equally_often = len({kv.count(head) for head in kv}) == 1
        shares.append(HeadShare(first * unit, (last - first) * unit, tuple(sorted(set(kv))) if equally_often else kv))
    return tuple(shares)


def auto_ulysses(num_heads: int, num_kv_heads: int, num_ranks: int, ranks_per_node: int) -> int:
    """The largest split inside a node that gives every rank the same number of heads and copies none needlessly.

    A divisor of `num_ranks` and of `ranks_per_node` that divides the query heads, and divides the key/value heads or
    is a multiple of them.
    """

    def fits(size: int) -> bool:
        together = num_ranks % size == 0 and ranks_per_node % size == 0
        return together and num_heads % size == 0 and (num_kv_heads % size == 0 or size % num_kv_heads == 0)

    return max(size for size in range(1, min(num_ranks, ranks_per_node) + 1) if fits(size))
