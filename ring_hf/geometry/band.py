"""Bands: the only shape a mask ever has here.

Inside a tile of `num_q x num_k` pairs, query i sees key j iff `lo <= j - i <= hi`; a bound that is None does not bind.
Causal attention has `hi`, a sliding window has `lo`. All functions are closed formulas over integers.

`split` cuts a band into pieces that any causal attention kernel runs without a mask: *full* rectangles, *causal*
ones (key j <= query i, aligned at the top left) and *anticausal* ones (key j >= query i), which are causal after
flipping queries and keys end to end. A band with two edges becomes blocks as high as the band is wide, each an
anticausal square and a causal one beside it, repeated at a fixed stride: cost O(rows x width), no mask in memory.
"""

from dataclasses import dataclass
from typing import Literal

Bound = int | None


@dataclass(frozen=True, slots=True)
class Piece:
    """`count` rectangles, the n-th shifted by `n * stride` both ways; `kind` says which pairs see each other."""

    q: int
    num_q: int
    k: int
    num_k: int
    kind: Literal["full", "causal", "anticausal"]
    count: int = 1
    stride: int = 0


def _pairs_up_to(num_q: int, num_k: int, bound: int) -> int:
    """Number of pairs with j - i <= bound."""

    def summed(x: int) -> int:  # sum of clamp(t, 0, num_k) over t <= x
        if x <= 0:
            return 0
        if x <= num_k:
            return x * (x + 1) // 2
        return num_k * (num_k + 1) // 2 + (x - num_k) * num_k

    return summed(bound + num_q) - summed(bound)


def area(num_q: int, num_k: int, lo: Bound, hi: Bound) -> int:
    """Number of visible pairs."""
    if lo is not None and hi is not None and lo > hi:
        return 0
    upper = num_q * num_k if hi is None else _pairs_up_to(num_q, num_k, hi)
    return upper - (0 if lo is None else _pairs_up_to(num_q, num_k, lo - 1))


def trim(num_q: int, num_k: int, lo: Bound, hi: Bound) -> tuple[int, int, int, int, Bound, Bound] | None:
    """Drop rows and columns without a visible pair, and bounds that do not bind.

    Returns `(first_q, num_q, first_k, num_k, lo, hi)`, the band relative to the new corner, or None if none is seen.
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


def split(num_q: int, num_k: int, lo: Bound, hi: Bound) -> list[Piece]:
    """Pieces that together hold every visible pair of a trimmed band exactly once."""
    trimmed = trim(num_q, num_k, lo, hi)
    if trimmed is None:
        return []
    q, num_q, k, num_k, lo, hi = trimmed
    if lo is None and hi is None:
        return [Piece(q, num_q, k, num_k, "full")]
    if lo is None:
        assert hi is not None
        return _one_edge(q, num_q, k, num_k, hi, "causal")
    if hi is None:
        return _one_edge(q, num_q, k, num_k, num_k - num_q - lo, "anticausal")
    return _two_edges(q, num_q, k, num_k, lo, hi)


def _one_edge(
    q: int, num_q: int, k: int, num_k: int, extra: int, kind: Literal["causal", "anticausal"]
) -> list[Piece]:
    """A trimmed band with one edge: `extra` columns seen by every row, then a triangle that starts at the corner."""
    full_k, edge_k = (k, k + extra) if kind == "causal" else (k + num_k - extra, k)
    pieces = [Piece(q, num_q, edge_k, num_k - extra, kind)]
    if extra:
        pieces.append(Piece(q, num_q, full_k, extra, "full"))
    return pieces


def _two_edges(q: int, num_q: int, k: int, num_k: int, lo: int, hi: int) -> list[Piece]:
    width = hi - lo + 1

    def is_whole(row: int) -> bool:
        return row + lo >= 0 and row + hi + width - 1 < num_k and row + width <= num_q

    pieces: list[Piece] = []
    row = 0
    while row < num_q:
        count = 0
        while is_whole(row + count * width):
            count += 1
        if count:
            pieces.append(Piece(q + row, width, k + row + lo, width, "anticausal", count, width))
            if width > 1:
                pieces.append(Piece(q + row + 1, width - 1, k + row + hi + 1, width - 1, "causal", count, width))
            row += count * width
            continue
        # A block cut by the edge of the tile: its two halves are bands with one edge each.
        height = min(width, num_q - row)
        first, middle, end = max(0, row + lo), min(num_k, row + hi + 1), min(num_k, row + hi + height)
        for begin, stop, low, high in ((first, middle, row + lo, None), (middle, end, None, row + hi)):
            inner = split(
                height, stop - begin, None if low is None else low - begin, None if high is None else high - begin
            )
            pieces += [Piece(q + row + p.q, p.num_q, k + begin + p.k, p.num_k, p.kind) for p in inner]
        row += height
    return pieces
