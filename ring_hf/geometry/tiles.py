"""Tiles: what one shard's queries see of one block of keys. The only place where layouts meet masks.

Two segments with the same step p, `q = a + p i` and `k = b + p j`, under "same document, k <= q, q - k < window" leave
a band `lo <= j - i <= hi` with `hi = floor((a - b) / p)` and `lo = ceil((a - b - window + 1) / p)`; documents,
prefixes and chunks only cut segments into shorter ones. So every rank's work on any block is a short list of tiles,
and neighbouring tiles that form one band over concatenated slices are fused: a zigzag rank's own block is one causal
call.
"""

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from . import band
from .layout import Segment
from .sequence import Mask, RowRegions


@dataclass(frozen=True, slots=True)
class Tile:
    """Local queries `q:q+num_q` of batch rows `row:row+num_rows` against keys `k:k+num_k` of the block at hand.

    Query `q + i` sees key `k + j` iff `lo <= j - i <= hi` (None: no bound).
    """

    row: int
    num_rows: int
    q: int
    num_q: int
    k: int
    num_k: int
    lo: band.Bound
    hi: band.Bound

    @property
    def area(self) -> int:
        """Visible pairs in one batch row."""
        return band.area(self.num_q, self.num_k, self.lo, self.hi)


@dataclass(frozen=True, slots=True)
class Part:
    """The cut of a segment by one region: local tokens `place..place + length - 1`, global `start + step * i`."""

    region: int
    place: int
    start: int
    length: int
    step: int

    @property
    def last(self) -> int:
        """The last global token."""
        return self.start + self.step * (self.length - 1)


def cut(shard: Iterable[Segment], regions: RowRegions) -> Iterator[Part]:
    """A shard cut at the starts of regions, in local order."""
    starts = regions.starts
    place = 0
    for segment in shard:
        begin = 0
        for region in range(bisect_right(starts, segment.start) - 1, len(starts) - 1):
            end = min(segment.length, -((segment.start - starts[region + 1]) // segment.step))
            if end > begin:
                start = segment.start + segment.step * begin
                yield Part(region, place + begin, start, end - begin, segment.step)
                begin = end
            if begin == segment.length:
                break
        place += segment.length


def tiles(
    q_shard: Iterable[Segment],
    k_block: Iterable[Segment],
    regions: RowRegions,
    mask: Mask,
    row: int = 0,
    num_rows: int = 1,
) -> list[Tile]:
    """Fused tiles of one shard's queries against one block's keys, for rows that are cut into `regions`."""
    keys: dict[int, list[Part]] = {}
    for part in cut(k_block, regions):
        keys.setdefault(regions.firsts[part.region], []).append(part)

    def document(part: Part) -> int:
        return regions.firsts[part.region]

    found: list[Tile] = []
    for first, queries in itertools.groupby(sorted(cut(q_shard, regions), key=document), key=document):
        in_document: list[Tile] = []
        for q, k in itertools.product(queries, keys.get(first, ())):
            apart = q.start - k.start
            mutual = regions.reaches[q.region] and regions.reaches[k.region]
            hi = apart // q.step if mask.causal and not mutual else None
            lo = -((mask.window - 1 - apart) // q.step) if mask.window is not None else None
            trimmed = band.trim(q.length, k.length, lo, hi)
            if trimmed is not None:
                first_q, num_q, first_k, num_k, lo, hi = trimmed
                in_document.append(Tile(row, num_rows, q.place + first_q, num_q, k.place + first_k, num_k, lo, hi))
        found += _fuse_all(in_document)
    return found


def _fuse_all(parts: list[Tile]) -> list[Tile]:
    fused = True
    while fused:
        fused = False
        for (m, a), (n, b) in itertools.combinations(enumerate(parts), 2):
            joined = _fuse(a, b)
            if joined is not None:
                parts = [tile for place, tile in enumerate(parts) if place not in (m, n)] + [joined]
                fused = True
                break
    return parts


def _fuse(a: Tile, b: Tile) -> Tile | None:
    """One tile over the common bounding box, if a single band there shows exactly the pairs of `a` and `b`."""
    bounds = []
    for of_a, of_b in ((a.lo, b.lo), (a.hi, b.hi)):
        # Relative to the local origin instead of the tile's corner, so that the two can be compared.
        known = {x + tile.k - tile.q for x, tile in ((of_a, a), (of_b, b)) if x is not None}
        if len(known) > 1:
            return None
        bounds.append(known.pop() if known else None)
    q, k = min(a.q, b.q), min(a.k, b.k)
    num_q = max(a.q + a.num_q, b.q + b.num_q) - q
    num_k = max(a.k + a.num_k, b.k + b.num_k) - k

    def shown(q: int, num_q: int, k: int, num_k: int) -> int:
        lo, hi = (None if x is None else x + q - k for x in bounds)
        return band.area(num_q, num_k, lo, hi)

    if shown(q, num_q, k, num_k) != a.area + b.area or any(
        shown(t.q, t.num_q, t.k, t.num_k) != t.area for t in (a, b)
    ):
        return None
    lo, hi = (None if x is None else x + q - k for x in bounds)
    trimmed = band.trim(num_q, num_k, lo, hi)
    assert trimmed is not None
    first_q, num_q, first_k, num_k, lo, hi = trimmed
    return Tile(a.row, a.num_rows, q + first_q, num_q, k + first_k, num_k, lo, hi)
