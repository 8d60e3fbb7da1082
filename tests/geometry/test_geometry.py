"""Layouts, balance, bands, heads and refusals of the geometry. Plans are in `test_plan.py`."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_hf.geometry import (
    LAYOUTS,
    Mask,
    ShardedSequence,
    area,
    auto_ulysses,
    check_head_chunks,
    chunk_heads,
    head_split,
    length_multiple,
    make_plan,
    padded_length,
    rank_work,
    segments,
    shard_index,
    trim,
    unshard_index,
)


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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ring_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("ulysses", [1, 2, 3])
@pytest.mark.parametrize("units", [1, 3, 4])
def test_unshard_inverts_shard(layout, ring_size, ulysses, units):
    num_ranks = ring_size * ulysses
    length = units * length_multiple(layout, num_ranks, ulysses)
    sequence = ShardedSequence(layout, length, num_ranks, ulysses=ulysses)
    shards = [shard_index(layout, length, num_ranks, rank, ulysses) for rank in range(num_ranks)]
    tokens = list(itertools.chain(*shards))
    assert sorted(tokens) == list(range(length))
    assert [tokens[index] for index in unshard_index(layout, length, num_ranks, ulysses)] == list(range(length))
    for rank, shard in enumerate(shards):
        assert len(shard) == sequence.shard_length
        assert all(sequence.owners(token, token) == {rank // ulysses} for token in shard)
        assert shard == [token for segment in sequence.segments(rank) for token in range(length)[segment.slice]]


def test_layouts_assign_the_tokens_of_the_papers():
    assert shard_index("contiguous", 8, 2, 1) == [4, 5, 6, 7]
    assert shard_index("zigzag", 8, 2, 0) == [0, 1, 6, 7]
    assert shard_index("zigzag", 8, 2, 1) == [2, 3, 4, 5]
    assert shard_index("striped", 8, 2, 1) == [1, 3, 5, 7]
    assert (length_multiple("zigzag", 4), length_multiple("zigzag", 1)) == (8, 1)
    assert padded_length("zigzag", 9, 4) == 16 and padded_length("striped", 9, 4) == 12


def test_ulysses_cuts_each_ring_shard():
    sequence = ShardedSequence("zigzag", 16, 4, ulysses=2)
    assert [[t for s in sequence.segments(rank) for t in s.range] for rank in range(4)] == [
        [0, 1, 2, 3],
        [12, 13, 14, 15],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]
    assert [t for s in sequence.ring_segments(0) for t in s.range] == [0, 1, 2, 3, 12, 13, 14, 15]
    assert (length_multiple("zigzag", 6, 3), length_multiple("zigzag", 4, 4), length_multiple("striped", 4, 2)) == (
        12,
        4,
        4,
    )


@given(st.integers(2, 9), st.lists(st.integers(1, 999), max_size=60), st.sampled_from((64, 96, 1024)))
def test_balanced_assigns_equal_tokens_and_is_never_worse_than_zigzag(ring_size, cuts, per_rank):
    length = ring_size * per_rank
    documents = (tuple(sorted({0, length, *(n * length // 1000 for n in cuts)})),)

    def busiest(layout: str) -> int:
        sequence = ShardedSequence(layout, length, ring_size, documents)
        shard_lengths = [sum(s.length for s in sequence.ring_segments(rank)) for rank in range(ring_size)]
        assert set(shard_lengths) == {per_rank}
        return max(rank_work(sequence, Mask(), rank) for rank in range(ring_size))

    assert busiest("balanced") <= busiest("zigzag") * 1.01


def test_balanced_is_zigzag_for_one_document_and_balances_many():
    balanced, zigzag = (ShardedSequence(layout, 4096, 8) for layout in ("balanced", "zigzag"))
    assert {balanced.segments(n) for n in range(8)} == {zigzag.segments(n) for n in range(8)}
    generator = random.Random(3)
    for count in (5, 40, 200):
        bounds = tuple(sorted({0, 65536, *(generator.randrange(1, 65536) for _ in range(count - 1))}))
        sequence = ShardedSequence("balanced", 65536, 8, (bounds,))
        work = [rank_work(sequence, Mask(), rank) for rank in range(8)]
        assert max(work) * 8 / sum(work) <= 1.02


def test_long_balanced_sequences_are_padded_for_finer_chunks():
    assert padded_length("balanced", 100, 4) == 104
    assert padded_length("balanced", 65535, 8) == 65536 and padded_length("balanced", 60001, 8) % 256 == 0


@pytest.mark.parametrize("heads, kv_heads", [(8, 4), (8, 2), (9, 3), (8, 1), (8, 8), (6, 2), (32, 8)])
@pytest.mark.parametrize("ulysses", [1, 2, 3, 4, 8])
def test_every_head_is_computed_once_with_its_own_keys(heads, kv_heads, ulysses):
    shares = head_split(heads, kv_heads, ulysses)
    assert len(shares) == ulysses
    served = []
    for share in shares:
        for n in range(share.num_q):
            served.append((share.q_start + n, share.kv[n * len(share.kv) // share.num_q]))
    assert served == [(head, head * kv_heads // heads) for head in range(heads)]
    if heads % ulysses == 0:
        assert {share.num_q for share in shares} == {heads // ulysses}


def test_heads_that_do_not_divide_are_split_with_few_copies():
    assert [share.kv for share in head_split(8, 2, 4)] == [(0,), (0,), (1,), (1,)]
    assert [share.kv for share in head_split(9, 3, 4)] == [(), (0,), (1,), (2,)]
    assert [(share.num_q, share.kv) for share in head_split(9, 3, 2)] == [(4, (0, 0, 0, 1)), (5, (1, 1, 2, 2, 2))]


@pytest.mark.parametrize("heads, kv_heads", [(8, 4), (8, 2), (9, 3), (8, 1), (8, 8), (6, 2), (32, 8), (32, 32)])
@pytest.mark.parametrize("ulysses", [2, 3, 4, 8])
def test_chunks_of_a_share_are_its_heads_with_their_own_keys(heads, kv_heads, ulysses):
    for share in head_split(heads, kv_heads, ulysses):
        for count in range(1, share.num_q + 3):
            chunks = chunk_heads(share, count)
            assert len(chunks) == count
            assert tuple(head for chunk in chunks for head in chunk.share.queries) == share.queries
            served = [
                chunk.share.kv[n * len(chunk.share.kv) // chunk.share.num_q]
                for chunk in chunks
                for n in range(chunk.share.num_q)
            ]
            assert served == [head * kv_heads // heads for head in share.queries]
            # A chunk's heads were fetched with it or with the chunks just before; each fetch has its gradients.
            held: tuple[int, ...] = ()
            for chunk in chunks:
                held = chunk.fetched or held
                assert chunk.share.kv == () or chunk.share.kv == held
                assert chunk.finished in ((), held)
            fetched, finished = ([getattr(chunk, name) for chunk in chunks] for name in ("fetched", "finished"))
            assert sorted(filter(None, fetched)) == sorted(filter(None, finished))
            if count <= share.num_q:
                assert all(chunk.share.num_q for chunk in chunks)


def test_chunks_are_whole_groups_if_there_are_enough_and_keys_are_sent_once():
    (share, *_) = head_split(32, 8, 2)  # four groups of four query heads
    sizes = {count: [chunk.share.num_q for chunk in chunk_heads(share, count)] for count in (1, 2, 3, 4, 6, 8, 16)}
    assert sizes[1] == [16] and sizes[2] == [8, 8] and sizes[3] == [4, 4, 8] and sizes[4] == [4] * 4
    assert sizes[6] == [4, 2, 2, 4, 2, 2] and sizes[8] == [2] * 8 and sizes[16] == [1] * 16
    for count in sizes:
        chunks = chunk_heads(share, count)
        for sent in ([chunk.fetched for chunk in chunks], [chunk.finished for chunk in chunks]):
            assert sorted(head for heads in sent for head in heads) == [0, 1, 2, 3], count


def test_numbers_of_head_chunks_that_fit_no_rank_are_refused():
    for num_chunks, heads, ulysses in ((1, (8, 8), 1), (2, (8, 8), 4), (4, (32, 8), 8), (5, (9, 3), 2)):
        check_head_chunks(num_chunks, *heads, ulysses)
    too_many = "head_chunks=3 is more than the 2 query heads that the busiest .* Set head_chunks to at most 2"
    for num_chunks, heads, ulysses, message in (
        (0, (8, 8), 4, "head_chunks=0 must be a whole number of at least 1"),
        (2, (8, 8), 1, "head_chunks=2 cuts the exchange of heads, but with ulysses_size=1 no heads are exchanged"),
        (3, (8, 8), 4, too_many),
        (6, (9, 3), 2, "more than the 5 query heads .*ulysses_size=2.*9 heads, 3 key/value heads"),
    ):
        with pytest.raises(ValueError, match=message):
            check_head_chunks(num_chunks, *heads, ulysses)


def test_auto_ulysses_takes_the_largest_even_split_inside_a_node():
    assert auto_ulysses(32, 8, 64, 8) == 8 and auto_ulysses(32, 8, 64, 16) == 16
    assert auto_ulysses(28, 4, 8, 8) == 4 and auto_ulysses(9, 3, 8, 8) == 1 and auto_ulysses(32, 8, 4, 8) == 4


def test_right_padding_is_a_document_only_where_it_matters():
    padded = ShardedSequence("zigzag", 16, 2, None, (11, 16))
    assert padded.boundaries(0, causal=True) == (0, 16) and padded.boundaries(0, causal=False) == (0, 11, 16)
    packed = ShardedSequence("zigzag", 16, 2, ((0, 4, 16),), (11,))
    assert packed.boundaries(0, causal=True) == (0, 4, 11, 16)
    # Rows of different length then share their tiles, and one kernel call serves both.
    assert [tile.num_rows for tile in make_plan(padded, Mask(), 0, 2).steps[0].tiles] == [2]


REFUSALS = {
    "layout": (
        lambda: length_multiple("zigzig", 2),
        r"layout='zigzig' is not known\. Choose one of contiguous, zigzag, striped, balanced",
    ),
    "length": (
        lambda: ShardedSequence("zigzag", 10, 4),
        r"10 tokens cannot be sharded over 4 ranks.*multiple of 8\. Pad it to 16",
    ),
    "rank": (lambda: segments("zigzag", 8, 2, 2), r"rank=2 is not one of 2 ranks"),
    "window": (lambda: Mask(window=0), r"window=0 must be at least 1"),
    "documents": (
        lambda: ShardedSequence("zigzag", 8, 2, ((0, 5),)),
        r"row 0 must rise from 0 to the padded length 8",
    ),
    "boundaries that fall": (lambda: ShardedSequence("zigzag", 8, 2, ((0, 5, 5, 8),)), r"must rise from 0"),
    "rows": (
        lambda: ShardedSequence("zigzag", 8, 2, ((0, 8),), (8, 8)),
        r"described inconsistently: documents has 1 rows and num_tokens has 2 rows",
    ),
    "tokens": (
        lambda: ShardedSequence("zigzag", 8, 2, None, (9,)),
        r"num_tokens\[0\]=9 does not fit a sequence of 8 tokens",
    ),
    "ulysses": (
        lambda: ShardedSequence("zigzag", 24, 6, ulysses=4),
        r"ulysses_size=4 does not divide the 6 ranks",
    ),
    "hybrid length": (
        lambda: ShardedSequence("zigzag", 20, 8, ulysses=4),
        r"sharded over 8 ranks \(ring of 2 x ulysses 4\) in the zigzag layout: .* a multiple of 8\. Pad it to 24",
    ),
    "prefix": (
        lambda: ShardedSequence("zigzag", 8, 2, ((0, 5, 8),), prefixes=((6, 0),)),
        r"documents \(0, 5, 8\) and the prefixes \(6, 0\): give one length per document",
    ),
    "prefix mask": (
        lambda: make_plan(ShardedSequence("zigzag", 8, 2, prefixes=((3,),)), Mask(causal=False), 0),
        r"A document has a prefix, but the mask is Mask\(causal=False",
    ),
    "chunk": (lambda: Mask(chunk=0), r"chunk=0 must be at least 1"),
    "transport": (
        lambda: make_plan(ShardedSequence("zigzag", 8, 2), Mask(), 0, transport="pigeon"),
        r"transport='pigeon' is not known\. Choose one of auto, ring, double_ring, allgather, direct",
    ),
    "double ring": (
        lambda: make_plan(ShardedSequence("zigzag", 12, 6), Mask(), 0, transport="double_ring", inner_ring_size=4),
        r"inner_ring_size=4 cannot cut a ring of 6 ranks",
    ),
    "plan": (
        lambda: make_plan(ShardedSequence("zigzag", 8, 2, None, (8,)), Mask(), 0, 2),
        r"batch has 2 rows, but its ShardedSequence describes 1",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_geometry_refuses(name):
    call, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        call()
