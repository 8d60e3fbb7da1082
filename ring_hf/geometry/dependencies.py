"""How far a rank sees: the keys it needs, from whom, and how much work they make. Intervals only, no tiles.

These are what `direct` communication is made of, where a ring may stop early, and what the cost model and the
simulation of 1,024 ranks can afford to ask.
"""

import functools
from bisect import bisect_right

from .sequence import Mask, RowRegions, ShardedSequence
from .tiles import Part, cut

Ranges = tuple[tuple[int, int], ...]


def _sees(part: Part, regions: RowRegions, mask: Mask) -> tuple[int, int]:
    """First and last global token that any query of the part may see."""
    region = part.region
    first = regions.firsts[region]
    if mask.window is not None:
        first = max(first, part.start - mask.window + 1)
    if regions.reaches[region]:
        return first, regions.reaches[region] - 1
    return first, part.last if mask.causal else regions.ends[region] - 1


def merged(ranges: list[tuple[int, int]]) -> Ranges:
    """Half-open ranges sorted, those that overlap or touch made one."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return tuple(joined)


@functools.lru_cache(maxsize=2048)
def visible(sequence: ShardedSequence, mask: Mask, rank: int) -> Ranges:
    """Global token ranges `[first, stop)` that the queries of ring rank `rank` see, in any batch row.

    Exact for segments of step 1; for stripes each query sees a part of its range.
    """
    seen = []
    for _, _, regions in sequence.row_groups(mask, 1):
        for part in cut(sequence.ring_segments(rank), regions):
            first, last = _sees(part, regions, mask)
            seen.append((first, last + 1))
    return merged(seen)


def needed(sequence: ShardedSequence, mask: Mask, rank: int, source: int) -> Ranges:
    """Local token ranges of ring rank `source`'s shard that ring rank `rank` sees.

    Both sides can compute it, so that nobody has to ask.
    """
    seen = visible(sequence, mask, rank)
    starts = [start for start, _ in seen]
    found = []
    place = 0
    for segment in sequence.ring_segments(source):
        last = segment.start + segment.step * (segment.length - 1)
        for start, stop in seen[max(0, bisect_right(starts, segment.start) - 1) : bisect_right(starts, last)]:
            first = max(0, -((segment.start - start) // segment.step))
            end = min(segment.length, -((segment.start - stop) // segment.step))
            if first < end:
                found.append((place + first, place + end))
        place += segment.length
    return merged(found)


@functools.lru_cache(maxsize=64)
def farthest(sequence: ShardedSequence, mask: Mask, inner: int) -> tuple[int, int]:
    """Greatest number of places, on the outer and on the inner ring, from any rank back to a key that it sees.

    Of a ring of `inner` there is one per node; with `inner` equal to the ring there is no outer ring.
    """
    size = sequence.ring_size
    far = (0, 0)
    most = (size // inner - 1, inner - 1)
    for rank in range(size):
        sources: set[int] = set()
        for start, stop in visible(sequence, mask, rank):
            sources |= sequence.owners(start, stop - 1)
            if len(sources) == size:
                break
        for source in sources:
            outer = (rank // inner - source // inner) % (size // inner)
            far = max(far[0], outer), max(far[1], (rank - source) % inner)
        if far == most:
            break
    return far


def rank_work(sequence: ShardedSequence, mask: Mask, rank: int, num_rows: int = 1) -> int:
    """Visible pairs of one ring rank by closed formula, without a plan: load balance at 1,024 ranks."""
    total = 0
    for _, rows, regions in sequence.row_groups(mask, num_rows):
        for part in cut(sequence.ring_segments(rank), regions):
            first, reach = regions.firsts[part.region], regions.reaches[part.region]
            behind = _clamped_sum(part.start - first + 1, part.step, part.length, mask.window)
            end = reach if reach else regions.ends[part.region] if not mask.causal else None
            ahead = 0 if end is None else (2 * end - 2 - part.start - part.last) * part.length // 2
            total += (behind + ahead) * rows
    return total


def _clamped_sum(first: int, step: int, count: int, ceiling: int | None) -> int:
    """Sum of `min(first + step * i, ceiling)` over i < count."""
    below = count
    if ceiling is not None:
        below = min(count, max(0, -((first - ceiling) // step)))
    rest = 0 if ceiling is None else (count - below) * ceiling
    return below * first + step * below * (below - 1) // 2 + rest
