"""Bands: the only shape that a mask takes in this package.

Inside a tile of `num_q x num_k` pairs, query i sees key j iff `lo <= j - i <= hi`; None means no bound. Causal
attention has `hi`, a sliding window has `lo`. All functions are closed formulas over integers.

`split` cuts a band into blocks that any causal attention kernel runs without a mask: *full* rectangles, *causal* ones
(key j <= query i, aligned at the top left) and *anticausal* ones (key j >= query i), which become causal when queries
and keys are flipped end to end. A band with two edges becomes blocks as high as the band is wide, each of them an
anticausal square with a causal one beside it, repeated at a fixed stride: cost O(rows x width), no mask in memory.
"""

from dataclasses import dataclass
from typing import Literal

Bound = int | None


@dataclass(frozen=True, slots=True)
class CausalBlock:
    """`count` rectangles of pairs that a causal kernel can run; number n is shifted by `n * stride` along both dims.

    Attributes:
        q, num_q: first query, relative to the tile, and number of queries.
        k, num_k: the same for keys.
        kind: which pairs of a rectangle are visible.
    """

    q: int
    num_q: int
    k: int
    num_k: int
    kind: Literal["full", "causal", "anticausal"]
    count: int = 1
    stride: int = 0


def _num_pairs_up_to(num_q: int, num_k: int, bound: int) -> int:
    """Number of pairs with j - i <= bound."""

    def clamped_sum(x: int) -> int:  # sum of clamp(t, 0, num_k) over t <= x
        if x <= 0:
            return 0
        if x <= num_k:
            return x * (x + 1) // 2
        return num_k * (num_k + 1) // 2 + (x - num_k) * num_k

    return clamped_sum(bound + num_q) - clamped_sum(bound)


def area(num_q: int, num_k: int, lo: Bound, hi: Bound) -> int:
    """Number of visible pairs."""
    if lo is not None and hi is not None and lo > hi:
        return 0
    upper = num_q * num_k if hi is None else _num_pairs_up_to(num_q, num_k, hi)
    return upper - (0 if lo is None else _num_pairs_up_to(num_q, num_k, lo - 1))


def trim(num_q: int, num_k: int, lo: Bound, hi: Bound) -> tuple[int, int, int, int, Bound, Bound] | None:
    """Drop rows and columns without a visible pair, and bounds that exclude nothing.

    Returns:
        `(first_q, num_q, first_k, num_k, lo, hi)` with the band relative to the new corner, or None if no pair is
        visible.
    """
    first_q = 0 if hi is None else max(0, -hi)
    last_q = num_q if lo is None else min(num_q, num_k - lo)
    first_k = 0 if lo is None else max(0, lo)
    last_k = num_k if hi is None else min(num_k, num_q + hi)
    if first_q >= last_q or first_k >= last_k or (lo is not None and hi is not None and lo > hi):
        return None
    num_q, num_k, shift = last_q - first_q, last_k - first_k, first_q - first_k
    lo = None if lo is None or lo + shift <= 1 - num_q else lo + shift
    hi = None if hi is None or hi + shift >= num_k - 1 else hi + shift
    return first_q, num_q, first_k, num_k, lo, hi


def split(num_q: int, num_k: int, lo: Bound, hi: Bound) -> list[CausalBlock]:
    """Return blocks that together hold every visible pair of the band exactly once."""
    trimmed = trim(num_q, num_k, lo, hi)
    if trimmed is None:
        return []
    q, num_q, k, num_k, lo, hi = trimmed
    if lo is None and hi is None:
        return [CausalBlock(q, num_q, k, num_k, "full")]
    if lo is None:
        assert hi is not None
        return _split_one_edge(q, num_q, k, num_k, hi, "causal")
    if hi is None:
        return _split_one_edge(q, num_q, k, num_k, num_k - num_q - lo, "anticausal")
    return _split_two_edges(q, num_q, k, num_k, lo, hi)


def _split_one_edge(
    q: int, num_q: int, k: int, num_k: int, num_full: int, kind: Literal["causal", "anticausal"]
) -> list[CausalBlock]:
    """Split a trimmed band with one edge: all rows see `num_full` columns, the rest is a triangle in the corner."""
    full_k, edge_k = (k, k + num_full) if kind == "causal" else (k + num_k - num_full, k)
    blocks = [CausalBlock(q, num_q, edge_k, num_k - num_full, kind)]
    if num_full:
        blocks.append(CausalBlock(q, num_q, full_k, num_full, "full"))
    return blocks


def _split_two_edges(q: int, num_q: int, k: int, num_k: int, lo: int, hi: int) -> list[CausalBlock]:
    width = hi - lo + 1

    def is_whole(row: int) -> bool:
        return row + lo >= 0 and row + hi + width - 1 < num_k and row + width <= num_q

    blocks: list[CausalBlock] = []
    row = 0
    while row < num_q:
        count = 0
        while is_whole(row + count * width):
            count += 1
        if count:
            blocks.append(CausalBlock(q + row, width, k + row + lo, width, "anticausal", count, width))
            if width > 1:
                first_k = k + row + hi + 1
                blocks.append(CausalBlock(q + row + 1, width - 1, first_k, width - 1, "causal", count, width))
            row += count * width
            continue
        # The edge of the tile cuts this block: its two halves are bands with one edge each.
        height = min(width, num_q - row)
        first, middle, end = max(0, row + lo), min(num_k, row + hi + 1), min(num_k, row + hi + height)
        halves = (first, middle, row + lo - first, None), (middle, end, None, row + hi - middle)
        for begin, stop, half_lo, half_hi in halves:
            for block in split(height, stop - begin, half_lo, half_hi):
                blocks.append(
                    CausalBlock(q + row + block.q, block.num_q, k + begin + block.k, block.num_k, block.kind)
                )
        row += height
    return blocks
