"""Tiles: which keys of one block the queries of one shard see. The only place where layouts meet masks.

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
    """Local queries `q:q+num_q` of batch rows `row:row+num_rows` against keys `k:k+num_k` of the current block.

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
        """Number of visible pairs in one batch row."""
        return band.area(self.num_q, self.num_k, self.lo, self.hi)


@dataclass(frozen=True, slots=True)
class RegionSegment:
    """The part of a segment in one region: local tokens `offset..offset + length - 1`, global `start + step * i`."""

    region: int
    offset: int
    start: int
    length: int
    step: int

    @property
    def last(self) -> int:
        """The last global token."""
        return self.start + self.step * (self.length - 1)


def split_at_regions(shard: Iterable[Segment], regions: RowRegions) -> Iterator[RegionSegment]:
    """Cut the segments of a shard at the starts of regions, in local order."""
    starts = regions.starts
    offset = 0
    for segment in shard:
        begin = 0
        for region in range(bisect_right(starts, segment.start) - 1, len(starts) - 1):
            end = min(segment.length, -((segment.start - starts[region + 1]) // segment.step))
            if end > begin:
                start = segment.start + segment.step * begin
                yield RegionSegment(region, offset + begin, start, end - begin, segment.step)
                begin = end
            if begin == segment.length:
                break
        offset += segment.length


def make_tiles(
    q_shard: Iterable[Segment],
    k_block: Iterable[Segment],
    regions: RowRegions,
    mask: Mask,
    row: int = 0,
    num_rows: int = 1,
) -> list[Tile]:
    """Return the fused tiles of one shard's queries against one block's keys, for rows with these regions."""

    def doc_start(part: RegionSegment) -> int:
        return regions.doc_starts[part.region]

    keys_by_document: dict[int, list[RegionSegment]] = {}
    for part in split_at_regions(k_block, regions):
        keys_by_document.setdefault(doc_start(part), []).append(part)
    queries_in_order = sorted(split_at_regions(q_shard, regions), key=doc_start)

    tiles: list[Tile] = []
    for document, queries in itertools.groupby(queries_in_order, key=doc_start):
        document_tiles: list[Tile] = []
        for q, k in itertools.product(queries, keys_by_document.get(document, ())):
            distance = q.start - k.start
            in_prefix = regions.prefix_ends[q.region] and regions.prefix_ends[k.region]
            hi = distance // q.step if mask.causal and not in_prefix else None
            lo = -((mask.window - 1 - distance) // q.step) if mask.window is not None else None
            trimmed = band.trim(q.length, k.length, lo, hi)
            if trimmed is not None:
                first_q, num_q, first_k, num_k, lo, hi = trimmed
                document_tiles.append(
                    Tile(row, num_rows, q.offset + first_q, num_q, k.offset + first_k, num_k, lo, hi)
                )
        tiles += _fuse_all(document_tiles)
    return tiles


def _fuse_all(tiles: list[Tile]) -> list[Tile]:
    fused = True
    while fused:
        fused = False
        for (m, a), (n, b) in itertools.combinations(enumerate(tiles), 2):
            joined = _fuse(a, b)
            if joined is not None:
                tiles = [tile for index, tile in enumerate(tiles) if index not in (m, n)] + [joined]
                fused = True
                break
    return tiles


def _fuse(a: Tile, b: Tile) -> Tile | None:
    """Return one tile over the common bounding box, if a single band in it shows exactly the pairs of `a` and `b`."""
    bounds = []
    for bound_a, bound_b in ((a.lo, b.lo), (a.hi, b.hi)):
        # Relative to the local origin instead of the tile's corner, so that the two can be compared.
        distinct = {x + tile.k - tile.q for x, tile in ((bound_a, a), (bound_b, b)) if x is not None}
        if len(distinct) > 1:
            return None
        bounds.append(distinct.pop() if distinct else None)
    q, k = min(a.q, b.q), min(a.k, b.k)
    num_q = max(a.q + a.num_q, b.q + b.num_q) - q
    num_k = max(a.k + a.num_k, b.k + b.num_k) - k

    def visible_area(q: int, num_q: int, k: int, num_k: int) -> int:
        lo, hi = (None if x is None else x + q - k for x in bounds)
        return band.area(num_q, num_k, lo, hi)

    if visible_area(q, num_q, k, num_k) != a.area + b.area or any(
        visible_area(tile.q, tile.num_q, tile.k, tile.num_k) != tile.area for tile in (a, b)
    ):
        return None
    lo, hi = (None if x is None else x + q - k for x in bounds)
    trimmed = band.trim(num_q, num_k, lo, hi)
    assert trimmed is not None
    first_q, num_q, first_k, num_k, lo, hi = trimmed
    return Tile(a.row, a.num_rows, q + first_q, num_q, k + first_k, num_k, lo, hi)
