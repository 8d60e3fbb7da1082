"""Work and traffic between every pair of ring places by closed formulas, without a plan.

`work_matrix` counts the visible pairs between one place's queries and another's keys, `need_matrix` the keys of one
place that another sees at all. The order in which a transport brings blocks together changes neither, so these two say
what every algorithm computes and moves: quickly enough for 1,024 places, and for the choice of a transport per batch.

Every query q sees one interval of keys, `max(first, q - window + 1) .. reach - 1 | q | end - 1` (in a prefix, under a
causal mask, under a full one). A chunk of consecutive tokens therefore needs one interval, too, and only its two ends
reach into other chunks. In the striped layout (R places) the keys of place m up to token x number
`floor((x - m) / R) + 1`, which takes two values over m: a sum over queries is a difference array over places.

Letters: s sequence length, R places of the ring, w window.
"""

import bisect
import itertools
from dataclasses import dataclass

from ..geometry.band import area
from ..geometry.dependencies import Ranges, merged
from ..geometry.sequence import Mask, RowRegions, ShardedSequence

Matrix = list[list[int]]


@dataclass(frozen=True, slots=True)
class _Chunk:
    start: int
    stop: int
    place: int


def work_matrix(sequence: ShardedSequence, mask: Mask, num_rows: int = 1) -> Matrix:
    """`[place][source]`: visible pairs between the queries of `place` and the keys of `source`, over all rows."""
    size = sequence.ring_size
    work = [[0] * size for _ in range(size)]
    chunks = _chunks(sequence)
    for _, rows, regions in sequence.row_groups(mask, num_rows):
        if chunks is None:
            _add_striped(work, regions, mask, rows)
        else:
            _add_chunks(work, chunks, regions, mask, rows)
    return work


def total_work(sequence: ShardedSequence, mask: Mask, num_rows: int = 1) -> int:
    """Visible pairs of the whole batch."""
    return sum(_totals(regions, mask)[-1] * rows for _, rows, regions in sequence.row_groups(mask, num_rows))


def need_matrix(sequence: ShardedSequence, mask: Mask) -> Matrix:
    """`[place][source]`: tokens of `source` whose keys any query of `place` sees in any row; 0 for its own."""
    size = sequence.ring_size
    seen: list[list[tuple[int, int]]] = [[] for _ in range(size)]
    chunks = _chunks(sequence)
    for _, _, regions in sequence.row_groups(mask, 1):
        for place in range(size):
            if chunks is None:
                seen[place] += _striped_intervals(regions, mask, place, size)
        for chunk in chunks or ():
            seen[chunk.place].append(_interval(regions, mask, chunk))
    need = []
    for place, intervals in enumerate(seen):
        row = _count_striped(intervals, size) if chunks is None else _count(merged(intervals), size, chunks)
        row[place] = 0
        need.append(row)
    return need


def _chunks(sequence: ShardedSequence) -> list[_Chunk] | None:
    """All runs of consecutive tokens in global order, or None if the layout deals single tokens."""
    found = []
    for place in range(sequence.ring_size):
        for segment in sequence.ring_segments(place):
            if segment.step != 1:
                return None
            found.append(_Chunk(segment.start, segment.start + segment.length, place))
    return sorted(found, key=lambda chunk: chunk.start)


def _low(mask: Mask, first: int, query: int) -> int:
    """First key that a query sees."""
    return first if mask.window is None else max(first, query - mask.window + 1)


def _high(mask: Mask, regions: RowRegions, region: int, query: int) -> int:
    """Last key that a query sees."""
    if not mask.causal:
        return regions.ends[region] - 1
    return max(query, regions.reaches[region] - 1)


def _region(regions: RowRegions, token: int) -> int:
    return bisect.bisect_right(regions.starts, token) - 1


def _interval(regions: RowRegions, mask: Mask, chunk: _Chunk) -> tuple[int, int]:
    head, tail = _region(regions, chunk.start), _region(regions, chunk.stop - 1)
    return _low(mask, regions.firsts[head], chunk.start), _high(mask, regions, tail, chunk.stop - 1) + 1


def _count(ranges: Ranges, size: int, chunks: list[_Chunk]) -> list[int]:
    """Tokens in these ranges that each place holds."""
    row = [0] * size
    for first, stop in ranges:
        number = bisect.bisect_right(chunks, first, key=lambda chunk: chunk.start) - 1
        while number < len(chunks) and chunks[number].start < stop:
            chunk = chunks[number]
            row[chunk.place] += min(stop, chunk.stop) - max(first, chunk.start)
            number += 1
    return row


def _count_striped(intervals: list[tuple[int, int]], size: int) -> list[int]:
    change = [0] * (size + 1)
    for first, stop in merged(intervals):
        for token, sign in ((stop - 1, 1), (first - 1, -1)):
            turn, place = divmod(token, size)
            change[0] += sign * turn
            change[place + 1] -= sign
    return list(itertools.accumulate(change[:size]))


def _add_chunks(work: Matrix, chunks: list[_Chunk], regions: RowRegions, mask: Mask, rows: int) -> None:
    starts = [chunk.start for chunk in chunks]
    inner = _totals(regions, mask)
    for chunk in chunks:
        # Documents that lie in the chunk see nothing else: their totals, from the running sum.
        region, last = _region(regions, chunk.start), _region(regions, chunk.stop - 1)
        while region <= last:
            stop = _inside(regions, region, last, chunk)
            if stop > region:
                work[chunk.place][chunk.place] += (inner[stop] - inner[region]) * rows
                region = stop
                continue
            first, end = max(chunk.start, regions.starts[region]), min(chunk.stop, regions.starts[region + 1])
            _add_part(work[chunk.place], chunks, starts, regions, mask, region, first, end, rows)
            region += 1


def _inside(regions: RowRegions, region: int, last: int, chunk: _Chunk) -> int:
    """One past the last of the regions from `region` on whose documents lie wholly in the chunk."""
    if regions.firsts[region] < chunk.start or regions.ends[region] > chunk.stop:
        return region
    return last + 1 if regions.ends[last] <= chunk.stop else bisect.bisect_left(regions.firsts, regions.firsts[last])


def _totals(regions: RowRegions, mask: Mask) -> list[int]:
    """Running sum over regions of all pairs that their queries see."""
    counts = [0]
    for start, stop, first, end, reach in zip(
        regions.starts, regions.starts[1:], regions.firsts, regions.ends, regions.reaches, strict=False
    ):
        high = None if mask.causal and not reach else (reach if mask.causal else end) - start - 1
        length, before = stop - start, start - first
        if high is None and (mask.window is None or mask.window >= stop - first):
            counts.append(length * before + length * (length + 1) // 2)
            continue
        # Keys from `first` on, relative to the region's first query: j - i between these bounds.
        width = before + (length if high is None else high + 1)
        low = None if mask.window is None else 1 - mask.window + before
        counts.append(area(length, width, low, before if high is None else None))
    return list(itertools.accumulate(counts))


def _add_part(
    row: list[int],
    chunks: list[_Chunk],
    starts: list[int],
    regions: RowRegions,
    mask: Mask,
    region: int,
    first: int,
    stop: int,
    rows: int,
) -> None:
    """Pairs of the queries `first..stop - 1` of one region with the keys of every chunk."""
    low = _low(mask, regions.firsts[region], first)
    high = _high(mask, regions, region, stop - 1)
    open_end = not mask.causal or regions.reaches[region] > 0
    for number in range(bisect.bisect_right(starts, low) - 1, bisect.bisect_right(starts, high)):
        chunk = chunks[number]
        key, end = max(chunk.start, regions.firsts[region]), min(chunk.stop, high + 1)
        hi = None if open_end or end - 1 <= first else first - key
        lo = None if mask.window is None or key > stop - 1 - mask.window else first - key - mask.window + 1
        seen = (stop - first) * (end - key) if lo is None and hi is None else area(stop - first, end - key, lo, hi)
        row[chunk.place] += seen * rows


def _add_striped(work: Matrix, regions: RowRegions, mask: Mask, rows: int) -> None:
    size = len(work)
    for place, row in enumerate(work):
        change = [0] * (size + 1)

        def keys_up_to(token: int, count: int, runs: bool, sign: int, change: list[int] = change) -> None:
            """Adds the keys up to `token` as `count` queries count them; with `runs` it moves on with the query."""
            if count <= 0:
                return
            turn, place_of = divmod(token, size)
            change[0] += sign * (count * turn + (count * (count - 1) // 2 if runs else 0))
            change[place_of + 1] -= sign * count

        for region, (start, stop) in enumerate(itertools.pairwise(regions.starts)):
            query = start + (place - start) % size
            if query >= stop:
                continue
            count = (stop - 1 - query) // size + 1
            first = regions.firsts[region]
            runs = mask.causal and not regions.reaches[region]
            keys_up_to(query if runs else _high(mask, regions, region, query), count, runs, 1)
            # Queries whose window still reaches back to the first key of the document.
            early = count
            if mask.window is not None:
                early = min(count, max(0, (first + mask.window - 1 - query) // size + 1))
                keys_up_to(query + early * size - mask.window, count - early, True, -1)
            keys_up_to(first - 1, early, False, -1)
        for source, seen in enumerate(itertools.accumulate(change[:size])):
            row[source] += seen * rows


def _striped_intervals(regions: RowRegions, mask: Mask, place: int, size: int) -> list[tuple[int, int]]:
    """What a stripe sees, without the gaps that a window shorter than the stripe leaves: as `reach.needed` has it."""
    found = []
    for region, (start, stop) in enumerate(itertools.pairwise(regions.starts)):
        query = start + (place - start) % size
        if query < stop:
            last = query + (stop - 1 - query) // size * size
            found.append((_low(mask, regions.firsts[region], query), _high(mask, regions, region, last) + 1))
    return found
