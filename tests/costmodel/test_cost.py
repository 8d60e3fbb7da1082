"""The cost model against plans, published formulas and a published table, and the transports that `auto` chooses."""

import itertools
import time
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_hf.costmodel.devices import DEVICES, HARDWARE, Hardware, Shape, hardware_of
from ring_hf.costmodel.pass_cost import WorkMatrices, choose_transport, estimate_chunked_pass, estimate_pass
from ring_hf.costmodel.work_matrices import kv_needed_matrix, total_work, work_matrix
from ring_hf.geometry import (
    LAYOUTS,
    AttentionSpec,
    Mask,
    ShardedSequence,
    length_multiple,
    make_plan,
    needed_kv_ranges,
    sent_tokens,
)
from ring_hf.parallel import ring_attention, sharded_attention
from ring_hf.simulate.scenario import mixed_lengths
from ring_hf.verify.thread_ranks import threads_as_ranks

MHA, GQA4, GQA8 = Shape(32, 32, 128, 128), Shape(32, 8, 128, 128), Shape(64, 8, 128, 128)
PEAK = 989e12
# Only arithmetic and bandwidth, as in the published formulas.
IDEAL = Hardware(
    "ideal",
    flops=PEAK,
    backward_flops=PEAK,
    full_precision=1.0,
    memory_bandwidth=float("inf"),
    launch_overhead=0.0,
    node_bandwidth=450e9,
    node_latency=0.0,
    network_bandwidth=50e9,
    network_latency=0.0,
    ranks_per_node=8,
)
NVLINK, NETWORK = replace(IDEAL, ranks_per_node=1024), replace(IDEAL, ranks_per_node=1)


@st.composite
def batches(draw):
    layout, ulysses = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from((1, 1, 2)))
    num_ranks = draw(st.integers(1, 6)) * ulysses
    unit = length_multiple(layout, num_ranks, ulysses)
    length, rows = unit * draw(st.integers(1, max(1, 60 // unit))), draw(st.integers(1, 2))
    documents = tokens = prefixes = chunk = None
    if draw(st.booleans()):
        inner = st.lists(st.integers(1, length), max_size=5)
        documents = tuple(tuple(sorted({0, length, *draw(inner)})) for _ in range(rows))
    if draw(st.booleans()):
        tokens = tuple(draw(st.integers(0, length)) for _ in range(rows))
    causal = draw(st.booleans())
    if causal and draw(st.booleans()):
        bounds = documents or ((0, length),) * rows
        prefixes = tuple(tuple(draw(st.integers(0, b - a)) for a, b in itertools.pairwise(row)) for row in bounds)
    else:
        chunk = draw(st.none() | st.integers(1, length))
    mask = Mask(causal, draw(st.none() | st.integers(1, length)), chunk)
    return ShardedSequence(layout, length, num_ranks, documents, tokens, prefixes, ulysses), mask, rows


@settings(max_examples=500, deadline=None)
@given(batches())
def test_matrices_match_the_work_and_the_keys_of_plans(case):
    sequence, mask, rows = case
    size = sequence.ring_size
    work, kv_needed = work_matrix(sequence, mask, rows), kv_needed_matrix(sequence, mask)
    assert total_work(sequence, mask, rows) == sum(map(sum, work))
    for rank in range(size):
        planned_work = [0] * size
        for step in make_plan(sequence, mask, rank, rows).steps:
            planned_work[step.block[0].rank] += step.work
        assert work[rank] == planned_work
        for source in range(size):
            ranges = needed_kv_ranges(sequence, mask, rank, source) if source != rank else ()
            assert kv_needed[rank][source] == sum(stop - start for start, stop in ranges)


@settings(max_examples=200, deadline=None)
@given(batches())
def test_predicted_bytes_are_those_of_the_plan(case):
    sequence, mask, rows = case
    matrices, shape = WorkMatrices.exact(sequence, mask, rows), Shape(6, 2, 8, 4, 2, rows)
    num_kv_heads = 2 // sequence.ulysses  # on one rank
    for transport, inner in (("ring", 1), ("direct", 1), ("double_ring", 2), ("allgather", 1)):
        if transport == "double_ring" and (sequence.ring_size % 2 or sequence.ring_size < 4):
            continue
        sent = sent_tokens(sequence, mask, transport, inner)
        cost = estimate_pass(matrices, shape, IDEAL, transport, inner)
        bytes_per_token = rows * num_kv_heads * (8 + 4) * 2
        assert cost.max_sent == tuple(max(step) * bytes_per_token for step in zip(*sent, strict=True))
        assert sum(cost.mean_sent_by_step) == pytest.approx(sum(map(sum, sent)) * bytes_per_token / sequence.ring_size)


@pytest.mark.parametrize("num_ranks", [2, 4, 8, 16, 256])
@pytest.mark.parametrize("tokens", [2, 64])
def test_load_balance_is_that_of_the_formulas_exactly(num_ranks, tokens):
    def imbalance(layout):
        work = work_matrix(ShardedSequence(layout, num_ranks * tokens, num_ranks), Mask())
        busiest, total = max(map(sum, work)), sum(map(sum, work))
        steps = [max(work[r][(r - t) % num_ranks] for r in range(num_ranks)) for t in range(num_ranks)]
        return Fraction(busiest * num_ranks, total), Fraction(sum(steps) * num_ranks, total)

    n, c = num_ranks, tokens
    assert imbalance("contiguous") == (Fraction((2 * n - 1) * c + 1, n * c + 1),) * 2
    assert imbalance("contiguous")[0] == 2 - Fraction(1, n) - Fraction(n - 1, n) / (n * c + 1)  # 2 - 1/N in the limit
    assert imbalance("zigzag") == (1, 1)
    assert imbalance("balanced")[0] == 1
    # In every step rank N - 1 sees as much as a stripe can; the others see a diagonal less in some steps.
    assert imbalance("striped")[0] == Fraction(n * (c + 1), n * c + 1)


@pytest.mark.parametrize("shape", [MHA, GQA4, GQA8], ids=["mha", "gqa4", "gqa8"])
@pytest.mark.parametrize("num_ranks", [2, 8])
def test_bytes_are_those_of_the_formulas(shape, num_ranks):
    s = 4096
    c, e, n = s // num_ranks, 2, num_ranks
    d_q, d_kv = shape.num_heads * 128, shape.num_kv_heads * 128
    ring = WorkMatrices.exact(ShardedSequence("zigzag", s, n), Mask())
    for transport in ("ring", "allgather"):
        assert estimate_pass(ring, shape, IDEAL, transport).mean_sent == 2 * e * d_kv * s * (n - 1) / n
        # Keys and values again, and their gradients in fp32.
        assert estimate_pass(ring, shape, IDEAL, transport, 1, True).mean_sent == (2 * e + 8) * d_kv * c * (n - 1)
    ulysses = WorkMatrices.exact(ShardedSequence("contiguous", s, n, ulysses=n), Mask())
    ulysses_sent = estimate_pass(ulysses, shape, IDEAL).mean_sent
    assert ulysses_sent == (2 * d_q + 2 * d_kv) * c * e * (n - 1) / n
    assert estimate_pass(ring, shape, IDEAL).mean_sent / ulysses_sent == pytest.approx(n * d_kv / (d_q + d_kv))


def test_buffers_are_those_of_the_formulas():
    n, c, d_kv = 8, 512, 8 * 128
    matrices = WorkMatrices.exact(ShardedSequence("zigzag", n * c, n), Mask())
    assert estimate_pass(matrices, GQA4, IDEAL, "ring").buffer_bytes == 8 * c * d_kv  # two blocks in turn
    assert estimate_pass(matrices, GQA4, IDEAL, "allgather").buffer_bytes == 4 * n * c * d_kv
    window = WorkMatrices.exact(ShardedSequence("contiguous", n * c, n), Mask(window=17))
    assert estimate_pass(window, GQA4, IDEAL, "direct").buffer_bytes == 4 * 16 * d_kv


def threshold(shape, hardware, backward, causal):
    """Fewest tokens per rank that hide all messages but the last one, which returns gradients to their owner."""

    def is_hidden(tokens):
        matrices = WorkMatrices.estimate(ShardedSequence("striped", 8 * tokens, 8), Mask(causal))
        cost = estimate_pass(matrices, shape, hardware, "ring", 1, backward)
        last = 8 * tokens * shape.num_kv_heads * 128 / hardware.network_bandwidth if backward else 0.0
        return cost.exposed <= last * 1.001 + 1e-12

    low, high = 1, 2**17
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_hidden(middle) else (middle, high)
    return high


@pytest.mark.parametrize("shape", [MHA, GQA4, GQA8], ids=["mha", "gqa4", "gqa8"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_communication_is_hidden_where_the_condition_says(shape, causal, backward):
    phi = 0.5 if causal else 1.0
    ratio = shape.num_kv_heads / shape.num_heads * PEAK / 50e9
    # Bytes over FLOPs of a step: 2 e c d_kv to 4 c^2 d_q phi; backward 12 c d_kv to 10 c^2 d_q phi.
    condition = (1.2 if backward else 2 / 2) / phi * ratio
    assert threshold(shape, NETWORK, backward, causal) == pytest.approx(condition, rel=2e-3)


def test_thresholds_are_the_published_numbers():
    slow, fast = replace(NETWORK, network_bandwidth=12.5e9), replace(NETWORK, network_bandwidth=300e9)
    a100 = {"flops": 312e12}
    assert threshold(MHA, replace(slow, **a100), False, False) == 24960  # Ring Attention, table 2, InfiniBand
    assert threshold(MHA, replace(fast, **a100), False, False) == 1040  # NVLink
    assert threshold(GQA4, replace(NETWORK, network_bandwidth=450e9), False, True) == 1099
    assert threshold(GQA8, NETWORK, False, True) == 4945


def test_double_ring_hides_what_a_single_ring_exposes():
    machine = replace(IDEAL, flops=0.6 * PEAK, node_bandwidth=0.8 * 450e9, network_bandwidth=0.9 * 50e9)
    efficiencies = {}
    for tokens in (1024, 2048, 4096, 8192):
        matrices = WorkMatrices.exact(ShardedSequence("zigzag", 32 * tokens, 32), Mask())
        costs = [
            estimate_pass(matrices, GQA4, machine, transport, inner)
            for transport, inner in (("ring", 1), ("double_ring", 8), ("double_ring", 4))
        ]
        efficiencies[tokens] = [round(cost.compute / cost.total, 2) for cost in costs]
    assert efficiencies == {
        1024: [0.16, 1.0, 0.65],
        2048: [0.32, 1.0, 1.0],
        4096: [0.63, 1.0, 1.0],
        8192: [1.0, 1.0, 1.0],
    }


def packed(layout, count=200, length=2**16, num_ranks=8):
    lengths = mixed_lengths(length, count, seed=1)
    return ShardedSequence(layout, length, num_ranks, (tuple(itertools.accumulate(lengths, initial=0)),))


@pytest.mark.parametrize("hardware", HARDWARE.values(), ids=list(HARDWARE))
def test_auto_takes_direct_where_it_saves_bytes_and_otherwise_a_ring(hardware):
    dense = ShardedSequence("zigzag", 2**16, 8)
    for sequence, mask in ((dense, Mask(window=1024)), (packed("zigzag"), Mask()), (packed("balanced"), Mask())):
        assert choose_transport(sequence, mask, GQA4, 1, hardware).transport == "direct"
    for sequence, mask in ((dense, Mask()), (dense, Mask(False)), (ShardedSequence("striped", 2**16, 8), Mask())):
        assert choose_transport(sequence, mask, GQA4, 1, hardware).transport == "ring"
    assert choose_transport(dense, Mask(), GQA4, 4, hardware).transport == "double_ring"
    assert choose_transport(ShardedSequence("zigzag", 2**16, 1), Mask(), GQA4, 1, hardware).transport == "ring"


def test_auto_gathers_only_where_that_is_faster_and_fits():
    dense = ShardedSequence("zigzag", 2**12, 16)
    slow_launches = replace(NVLINK, launch_overhead=1e-3)  # one large step is better than 16 small ones
    choice = choose_transport(dense, Mask(), GQA4, 1, slow_launches)
    assert choice.transport == "allgather"
    tight = choose_transport(dense, Mask(), GQA4, 1, replace(slow_launches, memory_budget=1e6))
    assert tight.transport == "ring" and "allgather would hold more than 1 MB" in tight.reason


def test_an_inner_ring_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"inner_ring_size=3 cannot cut a ring of 8 ranks .* Set it to 2 or 4"):
        choose_transport(ShardedSequence("zigzag", 64, 8), Mask(), GQA4, 3, IDEAL)
    assert choose_transport(ShardedSequence("zigzag", 2**16, 8), Mask(), GQA4, 8, IDEAL).transport == "ring"


def test_the_reason_names_both_sides_with_numbers():
    reason = choose_transport(ShardedSequence("zigzag", 2**16, 8), Mask(window=1024), GQA4, 1, HARDWARE["h100"]).reason
    assert reason.startswith("predicted per layer and step")
    assert "(h100): ring " in reason and ", direct " in reason and reason.count("MB") == 3


def test_auto_logs_its_reason_once_for_each_kind_of_mask(caplog, monkeypatch):
    monkeypatch.setattr(sharded_attention, "_logged", set())
    batches = [ShardedSequence("zigzag", 64, 2, ((0, end, 64),)) for end in (16, 20, 30)]

    def attend(rank, group):
        q = torch.ones(1, 1, 32, 4)
        for batch in batches:
            for window in (None, 3):
                ring_attention(q, q, q, sequence=batch, group=group, spec=AttentionSpec(window=window))

    with caplog.at_level("INFO", "ring_hf"), threads_as_ranks() as run:
        run(2, attend)
    lines = [record.getMessage() for record in caplog.records]
    reasons = [line for line in lines if not line.startswith("kernel ")]  # logged by whichever test is the first
    assert 2 <= len(reasons) <= 4  # two kinds; both threads may log where two processes would each log once
    assert all(line.startswith("transport ") and ": predicted per layer and step" in line for line in reasons)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_choosing_takes_milliseconds_for_ten_thousand_documents(layout):
    sequence = packed(layout, 10_000, 2**20)
    sequence.ring_segments(0)  # assigning chunks is the layout's work
    start = time.process_time()
    choice = choose_transport(sequence, Mask(), GQA4, 1, HARDWARE["h100"])
    computed = time.process_time()
    assert choose_transport(sequence, Mask(), GQA4, 1, HARDWARE["h100"]) is choice
    cached = time.process_time()
    # 3 ms and 0.05 ms on an idle machine.
    assert computed - start < 0.1 and cached - computed < 0.01


def test_all_ranks_of_a_job_get_the_same_hardware():
    assert hardware_of("cpu", 2) == replace(HARDWARE["cpu"], ranks_per_node=2)
    assert hardware_of("cuda", 8) == HARDWARE["h100"] == hardware_of("xpu", 8)
    assert hardware_of("cuda", 0).ranks_per_node == 1


@pytest.mark.parametrize("backward", [False, True])
def test_chunks_of_heads_exchange_twice_as_much_backward(backward):
    shape = Shape(32, 8, 128, 128)
    for ulysses, ring_size in ((8, 1), (2, 4)):
        matrices = WorkMatrices.exact(ShardedSequence("zigzag", 2**16, 8, ulysses=ulysses), Mask())
        whole = estimate_pass(matrices, shape, IDEAL, "ring", 1, backward)
        assert estimate_chunked_pass(matrices, shape, IDEAL, "ring", 1, backward, 1) == whole
        for chunks in (2, 4, 8, 16):
            if chunks > 32 // ulysses:
                continue
            chunked = estimate_chunked_pass(matrices, shape, IDEAL, "ring", 1, backward, chunks)
            assert chunked.compute == pytest.approx(whole.compute)
            assert chunked.ulysses_sent == pytest.approx((1 + backward) * whole.ulysses_sent)
            # Whole groups go round the ring once; each chunk of one that is cut takes its keys and values along.
            rounds = max(1, chunks // (8 // ulysses))
            assert sum(chunked.max_sent) == pytest.approx(rounds * sum(whole.max_sent))
            assert (sum(chunked.max_sent) > 0) == (ring_size > 1)


def test_the_simulation_and_the_planner_know_the_same_devices():
    for key, device in DEVICES.items():
        hardware = HARDWARE[key]
        assert hardware == device.hardware() and hardware.name == key == device.key
        rates = hardware.flops, hardware.backward_flops
        assert rates == device.rates("auto") == max(device.kernels.values())
        assert max(device.gemm, *rates) < device.peak
    assert set(HARDWARE) == {"cpu", *DEVICES}
    with pytest.raises(ValueError, match=r"--kernel 'flash_attn_3' has no published rate on A100 80 GB\."):
        DEVICES["a100"].hardware("flash_attn_3")
