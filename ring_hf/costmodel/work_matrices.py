"""Work and traffic between every pair of ring ranks by closed formulas, without a plan.

`work_matrix` counts the visible pairs between one ring rank's queries and another's keys, `kv_needed_matrix` the keys
of one ring rank that another sees at all. The order in which a transport brings blocks together changes neither, so
these two determine what every algorithm computes and sends, and are fast enough for 1,024 ring ranks and for choosing
a transport per batch.

Every query q sees one interval of keys, `max(first, q - window + 1) .. prefix end - 1 | q | document end - 1` (in a
prefix, under a causal mask, under a full one). A chunk of consecutive tokens therefore also needs one interval, and
only its two ends reach into other chunks. In the striped layout (R ring ranks) the keys of ring rank m up to token x
number `floor((x - m) / R) + 1`, which takes two values over m: a sum over queries is a difference array over ring
ranks.

Letters: s sequence length, R ring ranks, w window.
"""

import bisect
import itertools
from dataclasses import dataclass

from ..geometry.band import area
from ..geometry.dependencies import Ranges, merge_ranges
from ..geometry.sequence import Mask, RowRegions, ShardedSequence

Matrix = list[list[int]]


@dataclass(frozen=True, slots=True)
class _Chunk:
    start: int
    stop: int
    ring_rank: int


def work_matrix(sequence: ShardedSequence, mask: Mask, num_rows: int = 1) -> Matrix:
    """Return `[ring rank][source]`: visible pairs of the rank's queries and the source's keys, over all rows."""
    size = sequence.ring_size
    work = [[0] * size for _ in range(size)]
    chunks = _chunks(sequence)
    for _, rows, regions in sequence.row_groups(mask, num_rows):
        if chunks is None:
            _add_striped_work(work, regions, mask, rows)
        else:
            _add_chunk_work(work, chunks, regions, mask, rows)
    return work


def total_work(sequence: ShardedSequence, mask: Mask, num_rows: int = 1) -> int:
    """Return the visible pairs of the whole batch."""
    return sum(_cumulative_work(regions, mask)[-1] * rows for _, rows, regions in sequence.row_groups(mask, num_rows))


def kv_needed_matrix(sequence: ShardedSequence, mask: Mask) -> Matrix:
    """Return `[ring rank][source]`: tokens of the source that the rank's queries see in any row; 0 for its own."""
    size = sequence.ring_size
    intervals_of: list[list[tuple[int, int]]] = [[] for _ in range(size)]
    chunks = _chunks(sequence)
    for _, _, regions in sequence.row_groups(mask, 1):
        if chunks is None:
            for rank in range(size):
                intervals_of[rank] += _striped_intervals(regions, mask, rank, size)
        for chunk in chunks or ():
            intervals_of[chunk.ring_rank].append(_chunk_interval(regions, mask, chunk))
    kv_needed = []
    for rank, intervals in enumerate(intervals_of):
        ranges = merge_ranges(intervals)
        row = _count_striped(ranges, size) if chunks is None else _count_in_chunks(ranges, size, chunks)
        row[rank] = 0
        kv_needed.append(row)
    return kv_needed


def _chunks(sequence: ShardedSequence) -> list[_Chunk] | None:
    """All runs of consecutive tokens in global order, or None if the layout assigns single tokens."""
    chunks = []
    for rank in range(sequence.ring_size):
        for segment in sequence.ring_segments(rank):
            if segment.step != 1:
                return None
            chunks.append(_Chunk(segment.start, segment.start + segment.length, rank))
    return sorted(chunks, key=lambda chunk: chunk.start)


def _first_key(mask: Mask, doc_start: int, query: int) -> int:
    """First key that a query sees."""
    return doc_start if mask.window is None else max(doc_start, query - mask.window + 1)


def _last_key(mask: Mask, regions: RowRegions, region: int, query: int) -> int:
    """Last key that a query sees."""
    if not mask.causal:
        return regions.doc_ends[region] - 1
    return max(query, regions.prefix_ends[region] - 1)


def _region_of(regions: RowRegions, token: int) -> int:
    return bisect.bisect_right(regions.starts, token) - 1


def _chunk_interval(regions: RowRegions, mask: Mask, chunk: _Chunk) -> tuple[int, int]:
    """The half-open interval of keys that a chunk's queries see."""
    first, last = _region_of(regions, chunk.start), _region_of(regions, chunk.stop - 1)
    start = _first_key(mask, regions.doc_starts[first], chunk.start)
    return start, _last_key(mask, regions, last, chunk.stop - 1) + 1


def _count_in_chunks(ranges: Ranges, size: int, chunks: list[_Chunk]) -> list[int]:
    """Tokens in these ranges that each ring rank holds."""
    counts = [0] * size
    for first, stop in ranges:
        index = bisect.bisect_right(chunks, first, key=lambda chunk: chunk.start) - 1
        while index < len(chunks) and chunks[index].start < stop:
            chunk = chunks[index]
            counts[chunk.ring_rank] += min(stop, chunk.stop) - max(first, chunk.start)
            index += 1
    return counts


def _count_striped(ranges: Ranges, size: int) -> list[int]:
    change = [0] * (size + 1)
    for first, stop in ranges:
        for token, sign in ((stop - 1, 1), (first - 1, -1)):
            turn, rank = divmod(token, size)
            change[0] += sign * turn
            change[rank + 1] -= sign
    return list(itertools.accumulate(change[:size]))


def _add_chunk_work(work: Matrix, chunks: list[_Chunk], regions: RowRegions, mask: Mask, rows: int) -> None:
    chunk_starts = [chunk.start for chunk in chunks]
    cumulative = _cumulative_work(regions, mask)
    for chunk in chunks:
        # Documents inside the chunk see nothing else: their totals, from the running sum.
        region, last = _region_of(regions, chunk.start), _region_of(regions, chunk.stop - 1)
        while region <= last:
            stop = _end_of_inside(regions, region, last, chunk)
            if stop > region:
                work[chunk.ring_rank][chunk.ring_rank] += (cumulative[stop] - cumulative[region]) * rows
                region = stop
                continue
            first, end = max(chunk.start, regions.starts[region]), min(chunk.stop, regions.starts[region + 1])
            _add_region_work(work[chunk.ring_rank], chunks, chunk_starts, regions, mask, region, first, end, rows)
            region += 1


def _end_of_inside(regions: RowRegions, region: int, last: int, chunk: _Chunk) -> int:
    """One past the last of the regions from `region` on whose documents are wholly in the chunk."""
    doc_starts, doc_ends = regions.doc_starts, regions.doc_ends
    if doc_starts[region] < chunk.start or doc_ends[region] > chunk.stop:
        return region
    return last + 1 if doc_ends[last] <= chunk.stop else bisect.bisect_left(doc_starts, doc_starts[last])


def _cumulative_work(regions: RowRegions, mask: Mask) -> list[int]:
    """Running sum over regions of all pairs that their queries see, starting with 0."""
    counts = [0]
    for region, (start, stop) in enumerate(itertools.pairwise(regions.starts)):
        doc_start, prefix_end = regions.doc_starts[region], regions.prefix_ends[region]
        length, before = stop - start, start - doc_start
        is_causal = mask.causal and not prefix_end
        if is_causal and (mask.window is None or mask.window >= stop - doc_start):
            counts.append(length * before + length * (length + 1) // 2)
            continue
        # Keys from `doc_start` on, relative to the region's first query: j - i between these bounds.
        end = stop if is_causal else prefix_end if mask.causal else regions.doc_ends[region]
        lo = None if mask.window is None else 1 - mask.window + before
        counts.append(area(length, end - doc_start, lo, before if is_causal else None))
    return list(itertools.accumulate(counts))


def _add_region_work(
    work_row: list[int],
    chunks: list[_Chunk],
    chunk_starts: list[int],
    regions: RowRegions,
    mask: Mask,
    region: int,
    first: int,
    stop: int,
    rows: int,
) -> None:
    """Add the pairs of the queries `first..stop - 1` of one region with the keys of every chunk."""
    doc_start = regions.doc_starts[region]
    first_key = _first_key(mask, doc_start, first)
    last_key = _last_key(mask, regions, region, stop - 1)
    same_last_key = not mask.causal or regions.prefix_ends[region] > 0  # for all of these queries
    num_q = stop - first
    first_chunk = bisect.bisect_right(chunk_starts, first_key) - 1
    for chunk in chunks[first_chunk : bisect.bisect_right(chunk_starts, last_key)]:
        key, end = max(chunk.start, doc_start), min(chunk.stop, last_key + 1)
        hi = None if same_last_key or end - 1 <= first else first - key
        lo = None if mask.window is None or key > stop - 1 - mask.window else first - key - mask.window + 1
        pairs = num_q * (end - key) if lo is None and hi is None else area(num_q, end - key, lo, hi)
        work_row[chunk.ring_rank] += pairs * rows


def _add_striped_work(work: Matrix, regions: RowRegions, mask: Mask, rows: int) -> None:
    size = len(work)
    for rank, work_row in enumerate(work):
        change = [0] * (size + 1)

        def add_keys_up_to(token: int, count: int, advances: bool, sign: int, change: list[int] = change) -> None:
            """Add the keys up to `token` for `count` queries; with `advances`, `token` moves on with each query."""
            if count <= 0:
                return
            turn, token_rank = divmod(token, size)
            change[0] += sign * (count * turn + (count * (count - 1) // 2 if advances else 0))
            change[token_rank + 1] -= sign * count

        for region, (start, stop) in enumerate(itertools.pairwise(regions.starts)):
            query = start + (rank - start) % size
            if query >= stop:
                continue
            count = (stop - 1 - query) // size + 1
            doc_start = regions.doc_starts[region]
            is_causal = mask.causal and not regions.prefix_ends[region]
            last_key = query if is_causal else _last_key(mask, regions, region, query)
            add_keys_up_to(last_key, count, is_causal, 1)
            # Queries whose window still reaches back to the first key of the document.
            num_early = count
            if mask.window is not None:
                num_early = min(count, max(0, (doc_start + mask.window - 1 - query) // size + 1))
                add_keys_up_to(query + num_early * size - mask.window, count - num_early, True, -1)
            add_keys_up_to(doc_start - 1, num_early, False, -1)
        for source, pairs in enumerate(itertools.accumulate(change[:size])):
            work_row[source] += pairs * rows


def _striped_intervals(regions: RowRegions, mask: Mask, rank: int, size: int) -> list[tuple[int, int]]:
    """The keys that a stripe sees, in one interval per region, as in `needed_kv_ranges`.

    Gaps that a window shorter than the stripe's step leaves are included.
    """
    intervals = []
    for region, (start, stop) in enumerate(itertools.pairwise(regions.starts)):
        query = start + (rank - start) % size
        if query < stop:
            last = query + (stop - 1 - query) // size * size
            first_key = _first_key(mask, regions.doc_starts[region], query)
            intervals.append((first_key, _last_key(mask, regions, region, last) + 1))
    return intervals
