"""Who computes what in which ring step: the only place where layouts meet masks.

Two segments with the same step p, `q = a + p i` and `k = b + p j`, under "same document, k <= q, q - k < window" leave
a band `lo <= j - i <= hi` with `hi = floor((a - b) / p)` and `lo = ceil((a - b - window + 1) / p)`;
documents only cut segments into shorter ones. So every rank's work in every step is a short list of tiles, and
neighbouring tiles that form one band over concatenated slices are fused: a zigzag rank's own block is one causal call.
"""

import bisect
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from . import band
from .layout import Segment, owners
from .sequence import Mask, WholeSequence


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


@dataclass(frozen=True)
class Step:
    """What a rank does while it holds the keys and values of rank `source`."""

    source: int
    tiles: tuple[Tile, ...]

    @property
    def work(self) -> int:
        """Visible pairs, summed over batch rows."""
        return sum(tile.area * tile.num_rows for tile in self.tiles)

    @property
    def kv_ranges(self) -> list[tuple[int, int]]:
        """The `[start, stop)` ranges of the source's shard that any tile reads, merged and sorted."""
        merged: list[tuple[int, int]] = []
        for start, stop in sorted((tile.k, tile.k + tile.num_k) for tile in self.tiles):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((start, stop))
        return merged


@dataclass(frozen=True)
class Plan:
    """One rank's steps; step t holds the keys of rank `(rank - t) mod R`. Steps that no rank needs are left out."""

    rank: int
    num_ranks: int
    steps: tuple[Step, ...]

    @property
    def hops(self) -> int:
        """Exchanges with the neighbour: the same number on every rank."""
        return len(self.steps) - 1

    @property
    def work(self) -> int:
        return sum(step.work for step in self.steps)


@dataclass(frozen=True, slots=True)
class _Part:
    """The cut of a segment by one document: local tokens `place..place + length - 1`, global `start + step * i`."""

    document: int
    place: int
    start: int
    length: int
    step: int


def _cut(shard: Iterable[Segment], bounds: Sequence[int]) -> Iterator[_Part]:
    place = 0
    for segment in shard:
        first = bisect.bisect_right(bounds, segment.start) - 1
        begin = 0
        for document in range(first, len(bounds) - 1):
            end = min(segment.length, -((segment.start - bounds[document + 1]) // segment.step))
            if end > begin:
                start = segment.start + segment.step * begin
                yield _Part(document, place + begin, start, end - begin, segment.step)
                begin = end
            if begin == segment.length:
                break
        place += segment.length


def tiles(
    q_shard: Iterable[Segment],
    k_shard: Iterable[Segment],
    bounds: Sequence[int],
    mask: Mask,
    row: int = 0,
    num_rows: int = 1,
) -> list[Tile]:
    """Fused tiles of one shard's queries against one shard's keys for rows with document boundaries `bounds`."""
    keys: dict[int, list[_Part]] = {}
    for part in _cut(k_shard, bounds):
        keys.setdefault(part.document, []).append(part)
    found: list[Tile] = []
    for document, queries in itertools.groupby(sorted(_cut(q_shard, bounds), key=_document), key=_document):
        in_document: list[Tile] = []
        for q, k in itertools.product(queries, keys.get(document, ())):
            apart = q.start - k.start
            hi = apart // q.step if mask.causal else None
            lo = -((mask.window - 1 - apart) // q.step) if mask.window is not None else None
            trimmed = band.trim(q.length, k.length, lo, hi)
            if trimmed is not None:
                first_q, num_q, first_k, num_k, lo, hi = trimmed
                in_document.append(Tile(row, num_rows, q.place + first_q, num_q, k.place + first_k, num_k, lo, hi))
        found += _fuse_all(in_document)
    return found


def _document(part: _Part) -> int:
    return part.document


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


def _row_groups(sequence: WholeSequence, mask: Mask, num_rows: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Runs of neighbouring batch rows with equal document boundaries: `(first row, rows, boundaries)`."""
    if sequence.num_rows is None:
        yield 0, num_rows, (0, sequence.length)
        return
    first = 0
    all_bounds = (sequence.boundaries(row, mask.causal) for row in range(sequence.num_rows))
    for bounds, run in itertools.groupby(all_bounds):
        rows = sum(1 for _ in run)
        yield first, rows, bounds
        first += rows


def _num_steps(sequence: WholeSequence, mask: Mask) -> int:
    """1 + the farthest hop at which any rank still sees a key (from visible intervals: a bound for stripes)."""
    farthest = 0
    num_ranks = sequence.num_ranks
    for _, _, bounds in _row_groups(sequence, mask, 1):
        for rank in range(num_ranks):
            for part in _cut(sequence.segments(rank), bounds):
                last_query = part.start + part.step * (part.length - 1)
                first = bounds[part.document]
                if mask.window is not None:
                    first = max(first, part.start - mask.window + 1)
                last = last_query if mask.causal else bounds[part.document + 1] - 1
                for source in owners(sequence.layout, sequence.length, num_ranks, first, last):
                    farthest = max(farthest, (rank - source) % num_ranks)
            if farthest == num_ranks - 1:
                return num_ranks
    return farthest + 1


# A step uses one plan per kind of layer; a plan of 10,000 documents holds megabytes.
@functools.lru_cache(maxsize=16)
def make_plan(
    sequence: WholeSequence, mask: Mask, rank: int, num_rows: int = 1, num_queries: int | None = None
) -> Plan:
    """The plan of one rank, cached.

    Args:
        num_rows: batch rows B.
        num_queries: with one rank, the queries are the last `num_queries` tokens (decoding with a cache); default all.

    Raises:
        ValueError: if the batch has another number of rows than the sequence describes.
    """
    if sequence.num_rows not in (None, num_rows):
        raise ValueError(
            f"The batch has {num_rows} rows, its description {sequence.num_rows}. Build both from the same batch."
        )
    queries = sequence.segments(rank)
    if num_queries is not None and num_queries != sequence.length // sequence.num_ranks:
        assert sequence.num_ranks == 1
        queries = (Segment(sequence.length - num_queries, num_queries),)
    groups = list(_row_groups(sequence, mask, num_rows))
    steps = []
    for hop in range(_num_steps(sequence, mask)):
        source = (rank - hop) % sequence.num_ranks
        keys = sequence.segments(source)
        found = [tile for row, rows, bounds in groups for tile in tiles(queries, keys, bounds, mask, row, rows)]
        steps.append(Step(source, tuple(found)))
    return Plan(rank, sequence.num_ranks, tuple(steps))


def rank_work(sequence: WholeSequence, mask: Mask, rank: int, num_rows: int = 1) -> int:
    """Visible pairs of one rank by closed formula, without a plan: what load balance is made of at 1,024 ranks."""
    total = 0
    for _, rows, bounds in _row_groups(sequence, mask, num_rows):
        for part in _cut(sequence.segments(rank), bounds):
            first, last = bounds[part.document], bounds[part.document + 1] - 1
            behind = _clamped_sum(part.start - first + 1, part.step, part.length, mask.window)
            ahead = 0 if mask.causal else sum(last - token for token in _ends(part)) * part.length // 2
            total += (behind + ahead) * rows
    return total


def _ends(part: _Part) -> tuple[int, int]:
    return part.start, part.start + part.step * (part.length - 1)


def _clamped_sum(first: int, step: int, count: int, ceiling: int | None) -> int:
    """Sum of `min(first + step * i, ceiling)` over i < count."""
    below = count
    if ceiling is not None:
        below = min(count, max(0, -((first - ceiling) // step)))
    rest = 0 if ceiling is None else (count - below) * ceiling
    return below * first + step * below * (below - 1) // 2 + rest
