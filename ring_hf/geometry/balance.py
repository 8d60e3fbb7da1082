"""The balanced layout: each rank gets as many chunks of the packed documents as every other, and near-equal work.

Zigzag balances one long document; with documents packed into the sequence, the work of a chunk depends on where in its
documents it lies. Longest processing time first (Graham 1969) with a fixed number of chunks per rank assigns the
heaviest chunk to the rank with the least work so far, then swaps chunks between the busiest rank and the idlest as
long as that helps. WLB-LLM (Wang et al. 2025, arXiv 2503.17924) also balances by area, per document and on the host.

The result depends on the documents alone, so that all ranks compute the same one without communication. It counts
causal work: layers with other masks run on the same layout. It uses as few chunks as possible, since each of them
makes tiles of its own.
"""

import functools
import heapq
import itertools
from bisect import bisect_right

IntsPerRow = tuple[tuple[int, ...], ...]  # one tuple per batch row
MAX_CHUNKS_PER_RANK = 32
_GOOD_IMBALANCE = 1.01  # work of the busiest rank over the mean that is not worth finer chunks
_SWAPS_PER_RANK = 4


@functools.lru_cache(maxsize=16)
def balanced_owners(length: int, ring_size: int, documents: IntsPerRow) -> tuple[int, ...]:
    """Return the ring rank that owns each of the equal chunks into which `length` tokens are cut.

    Args:
        documents: per batch row the cumulative boundaries `(0, ..., length)`; empty for one document.
    """
    best: tuple[float, tuple[int, ...]] | None = None
    chunks_per_rank = 2
    while best is None or (
        chunks_per_rank <= MAX_CHUNKS_PER_RANK
        and length % (chunks_per_rank * ring_size) == 0
        and best[0] > _GOOD_IMBALANCE
    ):
        areas = _chunk_areas(length, chunks_per_rank * ring_size, documents or ((0, length),))
        imbalance, owners = _assign_chunks(areas, ring_size)
        if best is None or imbalance < best[0]:
            best = imbalance, owners
        chunks_per_rank *= 2
    return best[1]


def _chunk_areas(length: int, num_chunks: int, documents: IntsPerRow) -> list[int]:
    """Causally visible pairs of the queries in each chunk, summed over batch rows."""
    chunk_size = length // num_chunks
    areas = [0] * num_chunks
    for bounds in documents:
        # Pairs of all documents up to and including each one.
        cumulative = list(itertools.accumulate((b - a) * (b - a + 1) // 2 for a, b in itertools.pairwise(bounds)))
        pairs_before = 0
        for chunk in range(num_chunks):
            end = (chunk + 1) * chunk_size
            document = bisect_right(bounds, end) - 1
            num_inside = end - bounds[document]
            pairs_up_to = (cumulative[document - 1] if document else 0) + num_inside * (num_inside + 1) // 2
            areas[chunk] += pairs_up_to - pairs_before
            pairs_before = pairs_up_to
    return areas


def _assign_chunks(areas: list[int], ring_size: int) -> tuple[float, tuple[int, ...]]:
    """Return `(busiest rank over mean, owner of each chunk)`; every rank gets the same number of chunks."""
    chunks_per_rank = len(areas) // ring_size
    chunks_of: list[list[int]] = [[] for _ in range(ring_size)]
    ranks_by_work = [(0, rank) for rank in range(ring_size)]
    for chunk in sorted(range(len(areas)), key=lambda chunk: (-areas[chunk], chunk)):
        least_work, rank = heapq.heappop(ranks_by_work)
        chunks_of[rank].append(chunk)
        if len(chunks_of[rank]) < chunks_per_rank:
            heapq.heappush(ranks_by_work, (least_work + areas[chunk], rank))
    work = [sum(areas[chunk] for chunk in chunks) for chunks in chunks_of]
    good_enough = _GOOD_IMBALANCE * sum(work) / ring_size
    for _ in range(_SWAPS_PER_RANK * ring_size):
        if max(work) <= good_enough or not _swap_chunks(areas, chunks_of, work):
            break
    owners = [0] * len(areas)
    for rank, chunks in enumerate(chunks_of):
        for chunk in chunks:
            owners[chunk] = rank
    return max(work) * ring_size / sum(work), tuple(owners)


def _swap_chunks(areas: list[int], chunks_of: list[list[int]], work: list[int]) -> bool:
    """Swap the chunks of the busiest and the idlest rank that even out their work best; return False if none do."""
    busiest = max(range(len(work)), key=work.__getitem__)
    idlest = min(range(len(work)), key=work.__getitem__)
    gap = work[busiest] - work[idlest]
    best_gap, best_pair = gap, None
    for a, b in itertools.product(range(len(chunks_of[busiest])), range(len(chunks_of[idlest]))):
        difference = areas[chunks_of[busiest][a]] - areas[chunks_of[idlest][b]]
        if 0 < difference < gap and abs(gap - 2 * difference) < best_gap:
            best_gap, best_pair = abs(gap - 2 * difference), (a, b)
    if best_pair is None:
        return False
    a, b = best_pair
    difference = areas[chunks_of[busiest][a]] - areas[chunks_of[idlest][b]]
    chunks_of[busiest][a], chunks_of[idlest][b] = chunks_of[idlest][b], chunks_of[busiest][a]
    work[busiest] -= difference
    work[idlest] += difference
    return True
