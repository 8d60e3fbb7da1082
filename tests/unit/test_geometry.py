"""Geometry against the dense boolean mask: layouts, bands, plans, work; and its speed class at 1,024 ranks."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_hf.geometry import (
    LAYOUTS,
    Mask,
    WholeSequence,
    area,
    make_plan,
    multiple,
    num_chunks,
    owners,
    padded_length,
    rank_work,
    segments,
    shard_index,
    split,
    trim,
    unshard_index,
)
from tests.dense import dense_mask


@st.composite
def batches(draw):
    layout, num_ranks = draw(st.sampled_from(LAYOUTS)), draw(st.integers(1, 6))
    unit = multiple(layout, num_ranks)
    length = unit * draw(st.integers(1, max(1, 30 // unit)))
    rows = draw(st.integers(1, 3))
    documents = tokens = None
    if draw(st.booleans()):
        inner = st.lists(st.integers(1, length), max_size=5)
        documents = tuple(tuple(sorted({0, length, *draw(inner)})) for _ in range(rows))
    if draw(st.booleans()):
        tokens = tuple(draw(st.integers(0, length)) for _ in range(rows))
    sequence = WholeSequence(layout, length, num_ranks, documents, tokens)
    return sequence, Mask(draw(st.booleans()), draw(st.none() | st.integers(1, 40))), rows


def covered_pairs(plan, sequence, rows: int) -> torch.Tensor:
    """How often each (row, query, key) is computed by a rank's plan, tile by tile and piece by piece."""
    counts = torch.zeros(rows, sequence.length, sequence.length, dtype=torch.int32)
    queries = torch.tensor(shard_index(sequence.layout, sequence.length, sequence.num_ranks, plan.rank))
    for step in plan.steps:
        keys = torch.tensor(shard_index(sequence.layout, sequence.length, sequence.num_ranks, step.source))
        for tile in step.tiles:
            in_tile = torch.zeros(tile.num_q, tile.num_k, dtype=torch.int32)
            for piece, n in ((p, n) for p in split(tile.num_q, tile.num_k, tile.lo, tile.hi) for n in range(p.count)):
                apart = torch.arange(piece.num_k)[None, :] - torch.arange(piece.num_q)[:, None]
                seen = torch.ones_like(apart, dtype=torch.bool)
                if piece.kind == "causal":
                    seen = apart <= 0
                elif piece.kind == "anticausal":
                    seen = (apart <= 0).flip(0, 1)
                q, k = piece.q + n * piece.stride, piece.k + n * piece.stride
                assert q >= 0 and k >= 0 and q + piece.num_q <= tile.num_q and k + piece.num_k <= tile.num_k
                in_tile[q : q + piece.num_q, k : k + piece.num_k] += seen.int()
            assert in_tile.sum() == tile.area
            at = queries[tile.q : tile.q + tile.num_q, None], keys[None, tile.k : tile.k + tile.num_k]
            for row in range(tile.row, tile.row + tile.num_rows):
                counts[row][at] += in_tile
    return counts


@settings(max_examples=2000)
@given(batches())
def test_plans_cover_every_visible_pair_exactly_once(case):
    sequence, mask, rows = case
    seen = dense_mask(sequence, mask, rows)
    total = torch.zeros_like(seen, dtype=torch.int32)
    for rank in range(sequence.num_ranks):
        plan = make_plan(sequence, mask, rank, rows)
        counts = covered_pairs(plan, sequence, rows)
        total += counts
        assert plan.work == counts.sum() == rank_work(sequence, mask, rank, rows)
        assert [step.source for step in plan.steps] == [
            (rank - hop) % sequence.num_ranks for hop in range(len(plan.steps))
        ]
        for step in plan.steps:
            read = {key for start, stop in step.kv_ranges for key in range(start, stop)}
            assert read == {key for tile in step.tiles for key in range(tile.k, tile.k + tile.num_k)}
    assert torch.equal(total, seen.int())
    # All ranks stop exchanging after the same hop.
    assert len({make_plan(sequence, mask, rank, rows).hops for rank in range(sequence.num_ranks)}) == 1


@settings(max_examples=2000)
@given(st.integers(1, 9), st.integers(1, 9), st.none() | st.integers(-12, 12), st.none() | st.integers(-12, 12))
def test_bands_match_brute_force(num_q, num_k, lo, hi):
    pairs = {
        (i, j)
        for i, j in itertools.product(range(num_q), range(num_k))
        if (lo is None or j - i >= lo) and (hi is None or j - i <= hi)
    }
    assert area(num_q, num_k, lo, hi) == len(pairs)
    trimmed = trim(num_q, num_k, lo, hi)
    assert (trimmed is None) == (not pairs)
    if trimmed is not None:
        q, rows, k, columns, low, high = trimmed
        assert {i for i, _ in pairs} == set(range(q, q + rows)) and {j for _, j in pairs} == set(range(k, k + columns))
        assert area(rows, columns, low, high) == len(pairs)


@settings(max_examples=300)
@given(batches())
def test_flat_integers_describe_the_same_sequence(case):
    sequence, _, _ = case
    ints = sequence.to_ints()
    assert WholeSequence.from_ints(sequence.layout, sequence.length, sequence.num_ranks, *ints) == sequence


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("units", [1, 3, 4])
def test_unshard_inverts_shard(layout, num_ranks, units):
    length = units * multiple(layout, num_ranks)
    dealt = [token for rank in range(num_ranks) for token in shard_index(layout, length, num_ranks, rank)]
    assert sorted(dealt) == list(range(length))
    assert [dealt[place] for place in unshard_index(layout, length, num_ranks)] == list(range(length))
    for rank in range(num_ranks):
        mine = shard_index(layout, length, num_ranks, rank)
        assert len(mine) == length // num_ranks
        assert all(rank in owners(layout, length, num_ranks, token, token) for token in mine)
        picked = [
            token for segment in segments(layout, length, num_ranks, rank) for token in range(length)[segment.slice]
        ]
        assert picked == mine


def test_layouts_deal_the_tokens_of_the_papers():
    assert shard_index("contiguous", 8, 2, 1) == [4, 5, 6, 7]
    assert shard_index("zigzag", 8, 2, 0) == [0, 1, 6, 7]
    assert shard_index("zigzag", 8, 2, 1) == [2, 3, 4, 5]
    assert shard_index("striped", 8, 2, 1) == [1, 3, 5, 7]
    assert (num_chunks("zigzag", 4), multiple("zigzag", 4), multiple("zigzag", 1)) == (8, 8, 1)
    assert padded_length("zigzag", 9, 4) == 16 and padded_length("striped", 9, 4) == 12


def test_zigzag_steps_are_the_published_ones():
    # Own block one causal call; earlier ranks: all queries x half the keys; later ranks: half the queries x all keys.
    steps = make_plan(WholeSequence("zigzag", 80, 4), Mask(), 1).steps
    assert [step.source for step in steps] == [1, 0, 3, 2]
    found = [[(t.q, t.num_q, t.k, t.num_k, t.lo, t.hi) for t in step.tiles] for step in steps]
    assert found == [[(0, 20, 0, 20, None, 0)], [(0, 20, 0, 10, None, None)], *[[(10, 10, 0, 20, None, None)]] * 2]


def test_striped_steps_are_the_published_ones():
    # Visible iff y <= x when the queries' rank is not before the keys' rank, else y < x: a row and a column fewer.
    sequence = WholeSequence("striped", 40, 4)
    plans = [make_plan(sequence, Mask(), rank) for rank in range(4)]
    for rank, step in [(plan.rank, step) for plan in plans for step in plan.steps]:
        (tile,) = step.tiles
        expected = (0, 10, 0, 10, None, 0) if rank >= step.source else (1, 9, 0, 9, None, 0)
        assert (tile.q, tile.num_q, tile.k, tile.num_k, tile.lo, tile.hi) == expected


@pytest.mark.parametrize("num_ranks", [2, 3, 8, 1024])
def test_causal_imbalance_follows_the_closed_formulas(num_ranks):
    chunk = 10
    length = num_ranks * chunk

    def imbalance(layout: str) -> float:
        work = [rank_work(WholeSequence(layout, length, num_ranks), Mask(), rank) for rank in range(num_ranks)]
        assert sum(work) == length * (length + 1) // 2
        return max(work) * num_ranks / sum(work)

    assert imbalance("zigzag") == 1.0
    # (2 - 1/R) and R (c + 1) / (R c + 1), the first with its exact diagonal term.
    assert imbalance("contiguous") == pytest.approx(((2 * num_ranks - 1) * chunk + 1) / (length + 1))
    assert imbalance("striped") == pytest.approx(num_ranks * (chunk + 1) / (length + 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plans_of_1024_ranks_have_the_right_total_work(layout):
    sequence = WholeSequence(layout, 8192, 1024)
    for rank in (0, 1, 511, 1023):
        plan = make_plan(sequence, Mask(), rank)
        assert plan.hops == 1023
        assert plan.work == rank_work(sequence, Mask(), rank)


def test_window_ends_the_ring_early():
    assert make_plan(WholeSequence("contiguous", 64, 8), Mask(window=8), 3).hops == 1
    assert make_plan(WholeSequence("contiguous", 64, 8), Mask(window=10), 3).hops == 2
    assert make_plan(WholeSequence("contiguous", 64, 8), Mask(window=1), 3).hops == 0


def test_documents_inside_one_rank_need_no_exchange():
    sequence = WholeSequence("contiguous", 64, 8, (tuple(range(0, 65, 8)),))
    assert make_plan(sequence, Mask(), 3).hops == 0


def test_many_documents_are_planned_as_few_tiles():
    sequence = WholeSequence("zigzag", 2**20, 8, (tuple(range(0, 2**20, 128)) + (2**20,),))
    plan = make_plan(sequence, Mask(), 5)
    assert len(plan.steps[0].tiles) == 1024 and plan.hops == 0
    assert plan.work == 1024 * 128 * 129 // 2


def test_right_padding_is_set_apart_only_where_it_matters():
    padded = WholeSequence("zigzag", 16, 2, None, (11, 16))
    assert padded.boundaries(0, causal=True) == (0, 16) and padded.boundaries(0, causal=False) == (0, 11, 16)
    packed = WholeSequence("zigzag", 16, 2, ((0, 4, 16),), (11,))
    assert packed.boundaries(0, causal=True) == (0, 4, 11, 16)
    # Rows of different length then share their tiles, and one kernel call serves both.
    assert [tile.num_rows for tile in make_plan(padded, Mask(), 0, 2).steps[0].tiles] == [2]


REFUSALS = {
    "layout": (
        lambda: multiple("zigzig", 2),
        r"layout='zigzig' is not known\. Choose one of contiguous, zigzag, striped",
    ),
    "length": (
        lambda: WholeSequence("zigzag", 10, 4),
        r"10 tokens cannot be dealt to 4 ranks.*multiple of 8\. Pad it to 16",
    ),
    "rank": (lambda: segments("zigzag", 8, 2, 2), r"rank=2 is not one of 2 ranks"),
    "window": (lambda: Mask(window=0), r"window=0 must be at least 1"),
    "documents": (lambda: WholeSequence("zigzag", 8, 2, ((0, 5),)), r"row 0 must rise from 0 to the padded length 8"),
    "falling": (lambda: WholeSequence("zigzag", 8, 2, ((0, 5, 5, 8),)), r"must rise from 0"),
    "rows": (lambda: WholeSequence("zigzag", 8, 2, ((0, 8),), (8, 8)), r"describe 1 rows and num_tokens 2"),
    "tokens": (lambda: WholeSequence("zigzag", 8, 2, None, (9,)), r"Row 0 claims 9 tokens in a sequence of 8"),
    "plan": (
        lambda: make_plan(WholeSequence("zigzag", 8, 2, None, (8,)), Mask(), 0, 2),
        r"batch has 2 rows.*description 1",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_geometry_refuses(name):
    call, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        call()
