"""How far a rank sees: which keys it needs, from whom, and how much work they are. Intervals only, no tiles.

`direct` transport sends these ranges, a ring stops early because of them, and they are cheap enough for the cost model
and the simulation of 1,024 ranks.
"""

import functools
from bisect import bisect_right

from .sequence import Mask, RowRegions, ShardedSequence
from .tiles import RegionSegment, split_at_regions

Ranges = tuple[tuple[int, int], ...]  # half-open


def _visible_interval(part: RegionSegment, regions: RowRegions, mask: Mask) -> tuple[int, int]:
    """Return the first and last global token that any query of the part may see."""
    region = part.region
    first = regions.doc_starts[region]
    if mask.window is not None:
        first = max(first, part.start - mask.window + 1)
    if regions.prefix_ends[region]:
        return first, regions.prefix_ends[region] - 1
    return first, part.last if mask.causal else regions.doc_ends[region] - 1


def merge_ranges(ranges: list[tuple[int, int]]) -> Ranges:
    """Sort half-open ranges and merge those that overlap or touch."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


@functools.lru_cache(maxsize=2048)
def visible_kv_ranges(sequence: ShardedSequence, mask: Mask, ring_rank: int) -> Ranges:
    """Return the global token ranges `[first, stop)` that the queries of a ring rank see, in any batch row.

    Exact for segments of step 1; for stripes each query sees a part of its range.
    """
    ranges = []
    for _, _, regions in sequence.row_groups(mask, 1):
        for part in split_at_regions(sequence.ring_segments(ring_rank), regions):
            first, last = _visible_interval(part, regions, mask)
            ranges.append((first, last + 1))
    return merge_ranges(ranges)


def needed_kv_ranges(sequence: ShardedSequence, mask: Mask, ring_rank: int, source: int) -> Ranges:
    """Return the local token ranges of ring rank `source`'s shard that `ring_rank` sees.

    Both ranks compute them, so that no request has to be sent.
    """
    visible = visible_kv_ranges(sequence, mask, ring_rank)
    starts = [start for start, _ in visible]
    ranges = []
    offset = 0
    for segment in sequence.ring_segments(source):
        last = segment.start + segment.step * (segment.length - 1)
        for start, stop in visible[max(0, bisect_right(starts, segment.start) - 1) : bisect_right(starts, last)]:
            first = max(0, -((segment.start - start) // segment.step))
            end = min(segment.length, -((segment.start - stop) // segment.step))
            if first < end:
                ranges.append((offset + first, offset + end))
        offset += segment.length
    return merge_ranges(ranges)


@functools.lru_cache(maxsize=64)
def max_hops(sequence: ShardedSequence, mask: Mask, inner_ring_size: int) -> tuple[int, int]:
    """Return the largest distance on the outer and on the inner ring from any ring rank back to a key that it sees.

    There is one inner ring per node; with `inner_ring_size` equal to the ring there is no outer ring.
    """
    size, inner = sequence.ring_size, inner_ring_size
    num_nodes = size // inner
    outer_hops, inner_hops = 0, 0
    for rank in range(size):
        sources: set[int] = set()
        for start, stop in visible_kv_ranges(sequence, mask, rank):
            sources |= sequence.owners(start, stop - 1)
            if len(sources) == size:
                break
        for source in sources:
            outer_hops = max(outer_hops, (rank // inner - source // inner) % num_nodes)
            inner_hops = max(inner_hops, (rank - source) % inner)
        if (outer_hops, inner_hops) == (num_nodes - 1, inner - 1):
            break
    return outer_hops, inner_hops


def rank_work(sequence: ShardedSequence, mask: Mask, ring_rank: int, num_rows: int = 1) -> int:
    """Return the visible pairs of one ring rank by closed formula, without a plan: load balance at 1,024 ranks."""
    total = 0
    for _, rows, regions in sequence.row_groups(mask, num_rows):
        for part in split_at_regions(sequence.ring_segments(ring_rank), regions):
            doc_start, prefix_end = regions.doc_starts[part.region], regions.prefix_ends[part.region]
            pairs_behind = _clamped_sum(part.start - doc_start + 1, part.step, part.length, mask.window)
            pairs_ahead = 0
            if prefix_end or not mask.causal:
                end = prefix_end or regions.doc_ends[part.region]
                pairs_ahead = (2 * end - 2 - part.start - part.last) * part.length // 2
            total += (pairs_behind + pairs_ahead) * rows
    return total


def _clamped_sum(first: int, step: int, count: int, ceiling: int | None) -> int:
    """Sum of `min(first + step * i, ceiling)` over i < count."""
    num_below = count
    if ceiling is not None:
        num_below = min(count, max(0, -((first - ceiling) // step)))
    at_ceiling = 0 if ceiling is None else (count - num_below) * ceiling
    return num_below * first + step * num_below * (num_below - 1) // 2 + at_ceiling
