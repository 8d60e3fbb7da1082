"""Plans against the dense boolean mask, the routes of blocks and gradients, and plans of 1,024 ranks."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_hf.geometry import (
    LAYOUTS,
    CausalBlock,
    Mask,
    ShardedSequence,
    length_multiple,
    make_plan,
    needed_kv_ranges,
    rank_work,
    sent_tokens,
    split,
)
from ring_hf.testing import dense_mask


@st.composite
def batches(draw):
    """A sequence, a mask and a number of rows; every feature of the geometry, alone and together."""
    layout, ring_size, ulysses = draw(st.sampled_from(LAYOUTS)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    unit = length_multiple(layout, ring_size * ulysses, ulysses)
    length = unit * draw(st.integers(1, max(1, 30 // unit)))
    rows = draw(st.integers(1, 3))
    documents = tokens = prefixes = chunk = None
    if draw(st.booleans()):
        inner = st.lists(st.integers(1, length), max_size=5)
        documents = tuple(tuple(sorted({0, length, *draw(inner)})) for _ in range(rows))
    if draw(st.booleans()):
        tokens = tuple(draw(st.integers(0, length)) for _ in range(rows))
    causal, kind = draw(st.booleans()), draw(st.sampled_from(("plain", "prefix", "chunk")))
    if kind == "chunk":
        chunk = draw(st.integers(1, length))
    if kind == "prefix" and causal:
        bounds = documents if documents is not None else ((0, length),) * rows
        prefixes = tuple(tuple(draw(st.integers(0, b - a)) for a, b in itertools.pairwise(row)) for row in bounds)
    sequence = ShardedSequence(layout, length, ring_size * ulysses, documents, tokens, prefixes, ulysses)
    return sequence, Mask(causal, draw(st.none() | st.integers(1, 40)), chunk), rows


def transports(ring_size: int) -> list[tuple[str, int]]:
    """Every `(transport, inner)` that a ring of this size can run."""
    inner = [("double_ring", n) for n in range(2, ring_size) if ring_size % n == 0]
    return [("ring", 1), ("allgather", 1), ("direct", 1), *inner]


def tokens_of(sequence: ShardedSequence, rank: int) -> list[int]:
    return [token for segment in sequence.ring_segments(rank) for token in segment.range]


def keys_of(sequence: ShardedSequence, block) -> list[int]:
    shards = {part.rank: tokens_of(sequence, part.rank) for part in block}
    return [token for part in block for token in shards[part.rank][part.start : part.stop]]


def visible_pairs(block: CausalBlock) -> torch.Tensor:
    """Boolean `[num_q, num_k]` of one rectangle."""
    distance = torch.arange(block.num_k)[None, :] - torch.arange(block.num_q)[:, None]
    if block.kind == "full":
        return torch.ones_like(distance, dtype=torch.bool)
    return distance <= 0 if block.kind == "causal" else (distance <= 0).flip(0, 1)


def covered_pairs(plan, sequence, rows: int) -> torch.Tensor:
    """Count how often a rank's plan computes each (row, query, key), tile by tile and block by block."""
    counts = torch.zeros(rows, sequence.length, sequence.length, dtype=torch.int32)
    queries = torch.tensor(tokens_of(sequence, plan.rank))
    for step in plan.steps:
        keys = torch.tensor(keys_of(sequence, step.block))
        assert len(keys) == step.num_keys
        for tile in step.tiles:
            in_tile = torch.zeros(tile.num_q, tile.num_k, dtype=torch.int32)
            for block in split(tile.num_q, tile.num_k, tile.lo, tile.hi):
                visible = visible_pairs(block).int()
                for n in range(block.count):
                    q, k = block.q + n * block.stride, block.k + n * block.stride
                    assert q >= 0 and k >= 0 and q + block.num_q <= tile.num_q and k + block.num_k <= tile.num_k
                    in_tile[q : q + block.num_q, k : k + block.num_k] += visible
            assert in_tile.sum() == tile.area
            global_index = queries[tile.q : tile.q + tile.num_q, None], keys[None, tile.k : tile.k + tile.num_k]
            for row in range(tile.row, tile.row + tile.num_rows):
                counts[row][global_index] += in_tile
    return counts


@settings(max_examples=2000)
@given(batches(), st.data())
def test_plans_cover_every_visible_pair_exactly_once(case, data):
    sequence, mask, rows = case
    transport, inner = data.draw(st.sampled_from(transports(sequence.ring_size)))
    visible = dense_mask(sequence, mask, rows)
    total = torch.zeros_like(visible, dtype=torch.int32)
    plans = [make_plan(sequence, mask, rank, rows, None, transport, inner) for rank in range(sequence.ring_size)]
    for plan in plans:
        counts = covered_pairs(plan, sequence, rows)
        total += counts
        assert plan.work == counts.sum() == rank_work(sequence, mask, plan.rank, rows)
    assert torch.equal(total, visible.int())
    # All ranks exchange in the same steps.
    assert len({len(plan.steps) for plan in plans}) == 1


@pytest.mark.parametrize("window", [None, 3, 20])
@pytest.mark.parametrize(
    "ring_size, transport, inner", [(n, *transport) for n in range(1, 9) for transport in transports(n)]
)
def test_moves_bring_every_block_and_return_every_gradient(ring_size, transport, inner, window):
    """Follow all messages: blocks must be those of the plan, and each shard's sum must get every rank's share once."""
    sequence, mask = ShardedSequence("contiguous", 8 * ring_size, ring_size), Mask(window=window)
    plans = [make_plan(sequence, mask, rank, 1, None, transport, inner) for rank in range(ring_size)]
    if transport not in ("ring", "double_ring"):
        assert all(plan.steps[0].block[0].rank == plan.rank or transport == "allgather" for plan in plans)
        return
    num_steps = len(plans[0].steps)
    arrived = {(plan.rank, 0): plan.steps[0].block for plan in plans}
    for move in sorted(plans[0].moves, key=lambda move: move.send_step):
        for plan in plans:
            key = plan.peer(move.outer, move.inner), move.recv_step
            assert key not in arrived
            arrived[key] = arrived[plan.rank, move.send_step]
    assert arrived == {(plan.rank, n): step.block for plan in plans for n, step in enumerate(plan.steps)}
    # Shares (owner, rank that computed it) of the sums that arrive at a rank for a step.
    sums: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for move in plans[0].gradient_moves:
        sent = {}
        for plan in plans:
            share = (plan.steps[move.send_step].block[0].rank, plan.rank)
            sent[plan.peer(move.outer, move.inner)] = [share, *sums.pop((plan.rank, move.send_step), [])]
        for rank, shares in sent.items():
            sums.setdefault((rank, move.recv_step), []).extend(shares)
    visitors = {
        plan.rank: [
            other.rank
            for other in plans
            if plan.rank != other.rank and any(step.block[0].rank == plan.rank for step in other.steps)
        ]
        for plan in plans
    }
    assert sums == {} if num_steps == 1 else set(sums) == {(rank, num_steps) for rank in range(ring_size)}
    for (rank, _), shares in sums.items():
        assert sorted(shares) == [(rank, visitor) for visitor in visitors[rank]]


@settings(max_examples=500)
@given(batches())
def test_needed_keys_are_exactly_those_that_are_seen(case):
    sequence, mask, rows = case
    visible_to_query = dense_mask(sequence, mask, rows).any(0)
    for rank, source in itertools.product(range(sequence.ring_size), repeat=2):
        source_tokens = torch.tensor(tokens_of(sequence, source))
        visible = visible_to_query[tokens_of(sequence, rank)][:, source_tokens].any(0)
        needed = torch.zeros_like(visible)
        for start, stop in needed_kv_ranges(sequence, mask, rank, source):
            assert 0 <= start < stop <= len(source_tokens)
            needed[start:stop] = True
        assert not (visible & ~needed).any()
        if sequence.layout != "striped":
            assert torch.equal(visible, needed)


def test_direct_sends_what_the_mask_needs():
    window, ranks, length = 1024, 8, 65536
    dense = ShardedSequence("contiguous", length, ranks)
    assert sum(map(sum, sent_tokens(dense, Mask(window=window), "direct"))) == (window - 1) * (ranks - 1)
    # Zigzag has twice the borders, two of them inside one rank.
    zigzag = ShardedSequence("zigzag", length, ranks)
    assert sum(map(sum, sent_tokens(zigzag, Mask(window=window), "direct"))) == (window - 1) * (2 * ranks - 2)
    packed = ShardedSequence("contiguous", length, ranks, (tuple(range(0, length + 1, length // ranks)),))
    assert sum(map(sum, sent_tokens(packed, Mask(), "direct"))) == 0
    ring = sent_tokens(dense, Mask(), "ring")
    assert ring == [[length // ranks] * (ranks - 1) + [0]] * ranks
    # Dense causal: later ranks need all of the earlier ones, half of what a ring moves.
    assert sum(map(sum, sent_tokens(dense, Mask(), "direct"))) * 2 == sum(map(sum, ring))


def test_gathered_keys_in_global_order_make_few_tiles():
    plan = make_plan(ShardedSequence("zigzag", 128, 8), Mask(), 3, transport="allgather")
    tiles = [(tile.q, tile.num_q, tile.k, tile.num_k, tile.hi) for tile in plan.steps[0].tiles]
    assert tiles == [(0, 8, 0, 32, 24), (8, 8, 0, 104, 96)]


def test_zigzag_steps_are_the_published_ones():
    # Own block one causal call; earlier ranks: all queries x half the keys; later ranks: half the queries x all keys.
    steps = make_plan(ShardedSequence("zigzag", 80, 4), Mask(), 1).steps
    assert [step.block[0].rank for step in steps] == [1, 0, 3, 2]
    tiles = [[(t.q, t.num_q, t.k, t.num_k, t.lo, t.hi) for t in step.tiles] for step in steps]
    assert tiles == [[(0, 20, 0, 20, None, 0)], [(0, 20, 0, 10, None, None)], *[[(10, 10, 0, 20, None, None)]] * 2]


def test_striped_steps_are_the_published_ones():
    # Key y is visible to query x iff y <= x, or y < x (a row and a column fewer) if the queries' rank is smaller.
    sequence = ShardedSequence("striped", 40, 4)
    plans = [make_plan(sequence, Mask(), rank) for rank in range(4)]
    for rank, step in [(plan.rank, step) for plan in plans for step in plan.steps]:
        (tile,) = step.tiles
        expected = (0, 10, 0, 10, None, 0) if rank >= step.block[0].rank else (1, 9, 0, 9, None, 0)
        assert (tile.q, tile.num_q, tile.k, tile.num_k, tile.lo, tile.hi) == expected


@pytest.mark.parametrize("num_ranks", [2, 3, 8, 1024])
def test_causal_imbalance_follows_the_closed_formulas(num_ranks):
    chunk = 10
    length = num_ranks * chunk

    def imbalance(layout: str) -> float:
        work = [rank_work(ShardedSequence(layout, length, num_ranks), Mask(), rank) for rank in range(num_ranks)]
        assert sum(work) == length * (length + 1) // 2
        return max(work) * num_ranks / sum(work)

    assert imbalance("zigzag") == 1.0
    # (2 - 1/R) and R (c + 1) / (R c + 1), the first with its exact diagonal term.
    assert imbalance("contiguous") == pytest.approx(((2 * num_ranks - 1) * chunk + 1) / (length + 1))
    assert imbalance("striped") == pytest.approx(num_ranks * (chunk + 1) / (length + 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plans_of_1024_ranks_have_the_right_total_work(layout):
    sequence = ShardedSequence(layout, 8192, 1024)
    for rank in (0, 1, 511, 1023):
        plan = make_plan(sequence, Mask(), rank)
        assert len(plan.steps) == 1024
        assert plan.work == rank_work(sequence, Mask(), rank)


def test_window_ends_the_ring_early():
    steps = {w: len(make_plan(ShardedSequence("contiguous", 64, 8), Mask(window=w), 3).steps) for w in (1, 8, 10)}
    assert steps == {1: 1, 8: 2, 10: 3}
    double = make_plan(
        ShardedSequence("contiguous", 64, 8), Mask(window=10), 3, transport="double_ring", inner_ring_size=2
    )
    assert len(double.steps) == 4


def test_documents_inside_one_rank_need_no_exchange():
    sequence = ShardedSequence("contiguous", 64, 8, (tuple(range(0, 65, 8)),))
    assert len(make_plan(sequence, Mask(), 3).steps) == 1


def test_many_documents_are_planned_as_few_tiles():
    sequence = ShardedSequence("zigzag", 2**20, 8, (tuple(range(0, 2**20, 128)) + (2**20,),))
    plan = make_plan(sequence, Mask(), 5)
    assert len(plan.steps[0].tiles) == 1024 and len(plan.steps) == 1
    assert plan.work == 1024 * 128 * 129 // 2
