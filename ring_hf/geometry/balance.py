"""The balanced layout: chunks of packed documents dealt so that all ranks get equal tokens and near-equal work.

Zigzag balances one long document; with documents packed into the sequence, the work of a chunk depends on where in its
documents it lies. Longest processing time first (Graham 1969) with a fixed number of chunks per rank deals the
heaviest chunk to the rank with the least work so far, then chunks are swapped between the busiest rank and others as
long as that helps. WLB-LLM (Wang et al. 2025, arXiv 2503.17924) balances by area too, per document and on the host.

The answer depends on the documents alone, so that every rank finds the same one without asking. It counts causal work:
layers with other masks run on the same layout. As few chunks as possible, since each makes tiles of its own.
"""

import functools
import heapq
import itertools
from bisect import bisect_right

Rows = tuple[tuple[int, ...], ...]
MOST_CHUNKS = 32  # per rank
_GOOD = 1.01  # busiest rank over mean: not worth finer chunks
_SWAPS_PER_RANK = 4


@functools.lru_cache(maxsize=16)
def balanced_owners(length: int, ring_size: int, documents: Rows) -> tuple[int, ...]:
    """Owner of each of the equal chunks that `length` tokens are cut into.

    Args:
        documents: per batch row the cumulative boundaries `(0, ..., length)`; empty for one document.
    """
    best: tuple[float, tuple[int, ...]] | None = None
    chunks = 2
    while best is None or (chunks <= MOST_CHUNKS and length % (chunks * ring_size) == 0 and best[0] > _GOOD):
        areas = _chunk_areas(length, chunks * ring_size, documents or ((0, length),))
        imbalance, owners = _deal(areas, ring_size)
        if best is None or imbalance < best[0]:
            best = imbalance, owners
        chunks *= 2
    return best[1]


def _chunk_areas(length: int, count: int, documents: Rows) -> list[int]:
    """Causally visible pairs of the queries in each of `count` chunks, summed over batch rows."""
    size = length // count
    totals = [0] * count
    for bounds in documents:
        before = list(itertools.accumulate(((b - a) * (b - a + 1) // 2 for a, b in itertools.pairwise(bounds))))
        seen = 0
        for chunk in range(count):
            edge = (chunk + 1) * size
            document = bisect_right(bounds, edge) - 1
            inside = edge - bounds[document]
            upto = (before[document - 1] if document else 0) + inside * (inside + 1) // 2
            totals[chunk] += upto - seen
            seen = upto
    return totals


def _deal(areas: list[int], ring_size: int) -> tuple[float, tuple[int, ...]]:
    """`(busiest over mean, owner of each chunk)` with the same number of chunks for every rank."""
    share = len(areas) // ring_size
    hands: list[list[int]] = [[] for _ in range(ring_size)]
    least = [(0, rank) for rank in range(ring_size)]
    for chunk in sorted(range(len(areas)), key=lambda chunk: (-areas[chunk], chunk)):
        least_work, rank = heapq.heappop(least)
        hands[rank].append(chunk)
        if len(hands[rank]) < share:
            heapq.heappush(least, (least_work + areas[chunk], rank))
    work = [sum(areas[chunk] for chunk in hand) for hand in hands]
    enough = _GOOD * sum(work) / ring_size
    for _ in range(_SWAPS_PER_RANK * ring_size):
        if max(work) <= enough or not _swap(areas, hands, work):
            break
    owners = [0] * len(areas)
    for rank, hand in enumerate(hands):
        for chunk in hand:
            owners[chunk] = rank
    return max(work) * ring_size / sum(work), tuple(owners)


def _swap(areas: list[int], hands: list[list[int]], work: list[int]) -> bool:
    """Swaps two chunks of the busiest and the idlest rank so that the busier of the two gets least; False if none."""
    busy, idle = max(range(len(work)), key=work.__getitem__), min(range(len(work)), key=work.__getitem__)
    gap = work[busy] - work[idle]
    best, pair = gap, None
    for a, b in itertools.product(range(len(hands[busy])), range(len(hands[idle]))):
        moved = areas[hands[busy][a]] - areas[hands[idle][b]]
        if 0 < moved < gap and abs(gap - 2 * moved) < best:
            best, pair = abs(gap - 2 * moved), (a, b)
    if pair is None:
        return False
    a, b = pair
    moved = areas[hands[busy][a]] - areas[hands[idle][b]]
    hands[busy][a], hands[idle][b] = hands[idle][b], hands[busy][a]
    work[busy] -= moved
    work[idle] += moved
    return True
