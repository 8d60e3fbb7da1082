"""Time: FLOPs and rates against closed formulas and published bounds, thresholds, splits, levers."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_hf.costmodel.devices import DEVICES, HOST_MEMORY_BANDWIDTH
from ring_hf.planner import Job, plan, read_model
from ring_hf.planner.memory_estimate import trained_parameters
from ring_hf.planner.model import visible_pairs
from ring_hf.planner.ring_thresholds import least_tokens, thresholds
from ring_hf.planner.step_times import (
    attention_seconds,
    cost_ratio,
    flops_of,
    layer_kinds,
    model_flops_per_token,
    times_of,
)
from ring_hf.planner.training_plan import splits

LLAMA, QWEN, LLAMA2 = read_model("Llama-3.1-8B"), read_model("Qwen3-8B"), read_model("Llama-2-7b")
MILLION = 2**20


@pytest.mark.parametrize(("length", "window"), [(1, None), (7, None), (7, 3), (7, 7), (7, 100), (1, 1)])
def test_visible_pairs_are_counted(length, window):
    seen = sum(1 for q in range(length) for k in range(q + 1) if window is None or q - k < window)
    assert visible_pairs(length, window) == seen


def test_flops_of_a_token_are_those_of_the_table():
    """Model FLOPs a token and attention's share of the forward, Llama 3 8B; there with all parameters for P."""
    table = {32: (7.4e10, 0.348), 128: (1.51e11, 0.681), 256: (2.54e11, 0.811), 1024: (8.73e11, 0.945)}
    for kilo, (each, share) in table.items():
        length = kilo * 1024
        embedding = LLAMA.vocab * LLAMA.hidden  # looked up, not multiplied: not counted here
        assert model_flops_per_token(LLAMA, length) + 6 * embedding == pytest.approx(each, rel=0.01)
        flops = flops_of(Job(LLAMA, length))
        with_it = flops.linear + 2 * embedding * length
        assert flops.attention / (flops.attention + with_it) == pytest.approx(share, abs=0.002)
        assert flops.model == pytest.approx(model_flops_per_token(LLAMA, length) * length)


def test_causal_attention_is_two_s_squared_d():
    s = 4096
    assert flops_of(Job(LLAMA, s)).attention == 32 * 2 * s * (s + 1) * 4096
    gemma = read_model("gemma-2-2b")  # half the layers see 4,096 keys
    s = 2**16
    near, far = visible_pairs(s, 4096), visible_pairs(s, None)
    assert flops_of(Job(gemma, s)).attention == 13 * (near + far) * 4 * 8 * 256


def test_executed_flops_depend_on_what_is_saved():
    jobs = {kind: flops_of(Job(LLAMA, MILLION, checkpoint=kind)) for kind in ("none", "full", "save-attention")}
    attention = {kind: flops.attention_executed / flops.attention for kind, flops in jobs.items()}
    assert attention == {"none": 3.5, "full": 4.5, "save-attention": 3.5}
    layers = LLAMA.multiplied - LLAMA.vocab * LLAMA.hidden
    for kind, forwards in (("none", 3), ("full", 4), ("save-attention", 4)):
        assert jobs[kind].linear_executed == 2 * MILLION * (forwards * layers + 3 * LLAMA.vocab * LLAMA.hidden)
    # Upper bounds where attention is everything: 3 / 4.5 and 3 / 3.5 of MFU to HFU.
    ratio = {kind: flops.model / flops.executed for kind, flops in jobs.items()}
    assert ratio["full"] == pytest.approx(0.667, abs=0.01) and ratio["save-attention"] == pytest.approx(
        0.857, abs=0.01
    )


def test_blocks_cost_a_second_run_of_mlps_only_where_nothing_is_recomputed_anyway():
    base, blocks = Job(LLAMA, MILLION), {"ffn_block": 4096, "loss_block": 2048}
    assert flops_of(base.but(**blocks)) == flops_of(base)
    more = flops_of(base.but(checkpoint="none", **blocks)).executed - flops_of(base.but(checkpoint="none")).executed
    assert more == 2 * MILLION * 32 * 3 * 4096 * 14336


def test_adapters_save_the_gradients_of_weights():
    full, lora = flops_of(Job(LLAMA, MILLION)), flops_of(Job(LLAMA, MILLION, lora=16))
    assert full.linear_executed - lora.linear_executed == full.linear


@pytest.mark.parametrize(
    ("tokens_a_second", "model", "length", "mfu"),
    [(345, QWEN, MILLION, 0.341), (73.6, LLAMA, 3_800_000, 0.226), (200.4, LLAMA2, 700_000, 0.380)],
)
def test_mfu_of_published_speeds_is_that_of_the_converter(tokens_a_second, model, length, mfu):
    """tok/s/GPU x 3 (2 P + 2 s d_q L) / peak; P of all parameters there, without the embedding here."""
    peak = DEVICES["a100" if model is LLAMA2 else "h100"].peak
    assert tokens_a_second * model_flops_per_token(model, length) / peak == pytest.approx(mfu, abs=0.003)


def bound(job, forward, backward, gemm):
    """Seconds of a step at these rates and nothing else."""
    flops = flops_of(job)
    ahead = flops.attention * (2 if job.checkpoint == "full" else 1)
    return (ahead / forward + 2.5 * flops.attention / backward + flops.linear_executed / gemm) / job.devices


def test_bounds_of_the_million_token_run():
    """329 s with attention computed twice, 261 s if it is saved, at 590 / 570 TFLOP/s and GEMM at 600."""
    rates = (590e12, 570e12, 600e12)
    assert bound(Job(QWEN, MILLION), *rates) == pytest.approx(329, rel=0.01)
    assert bound(Job(QWEN, MILLION, checkpoint="save-attention"), *rates) == pytest.approx(261, rel=0.01)


def test_a_step_is_its_bound_plus_what_is_named():
    job = Job(QWEN, MILLION, offload=("layers",), loss_block=2048)
    times = times_of(job)
    parts = {part.name: part.seconds for part in times.parts}
    facts = job.device_facts
    assert parts["linear layers"] + parts["attention"] == pytest.approx(
        bound(job, *facts.rates("auto"), facts.gemm),
        rel=0.01,  # and merges
    )
    assert times.step == sum(parts.values())
    assert times.tokens_per_device == MILLION / times.step / 8
    assert times.mfu == pytest.approx(times.tokens_per_device * model_flops_per_token(QWEN, MILLION) / 989e12)
    assert times.hfu / times.mfu == pytest.approx(times.flops.executed / times.flops.model)


@pytest.mark.parametrize("fused", [False, True])
def test_blocks_of_mlps_move_as_much_memory_and_more_where_they_run_again(fused):
    for checkpoint in ("full", "save-attention", "none"):
        job = Job(LLAMA, MILLION, checkpoint=checkpoint, fused=fused)
        whole, blocks = (
            {part.name: part.seconds for part in times_of(job.but(ffn_block=block)).parts} for block in (0, 4096)
        )
        again = 2 * (3 if fused else 4) * 2 * LLAMA.ff * job.tokens * 32 / job.hardware.memory_bandwidth
        more = blocks["norms, activations, rounding"] - whole["norms, activations, rounding"]
        assert more == pytest.approx(again if checkpoint == "none" else 0.0)
        assert (blocks["linear layers"] > whole["linear layers"]) == (checkpoint == "none")


def test_weights_and_gradients_travel_as_zero_has_them():
    def sent(**more):
        job = Job(LLAMA, 2**16, **more)
        return (times_of(job).sent - attention_seconds(job)[2]) / (7 / 8)

    P = LLAMA.parameters
    assert sent(zero=3) == pytest.approx(3 * 2 * P)  # gathered twice, gradients scattered, in bf16
    for zero, weight in ((0, 4), (1, 2), (2, 2)):  # an all-reduce, or gradients scattered, updated weights gathered
        assert sent(zero=zero) == pytest.approx(2 * weight * P)
        assert sent(zero=zero, lora=16) == pytest.approx(2 * weight * trained_parameters(LLAMA, 16))
    assert sent(zero=3, lora=16) == pytest.approx(2 * (2 * P + trained_parameters(LLAMA, 16)))


def test_contiguous_layouts_cost_the_busiest_rank():
    jobs = [Job(QWEN, MILLION, layout=name) for name in ("zigzag", "contiguous")]
    even, uneven = (attention_seconds(job)[0] for job in jobs)
    assert uneven / even == pytest.approx(1.875, rel=0.005)  # 2 - 1 / N
    notes = {part.note for job in jobs for part in times_of(job).parts if part.name == "attention"}
    mean = flops_of(jobs[0]).attention_executed / 8 / 1e12
    assert notes == {f"{mean:,.0f} TFLOP on average, seconds of the busiest"}


def test_saving_attention_saves_its_forward():
    full, saved = (attention_seconds(Job(QWEN, MILLION, checkpoint=kind))[0] for kind in ("full", "save-attention"))
    forward, backward = DEVICES["h100"].rates("auto")
    expected = (1 / forward + 2.5 / backward) / (2 / forward + 2.5 / backward)
    assert saved / full == pytest.approx(expected, rel=1e-3)


# F / B with the peaks of data sheets: forward for heads alike, full and causal; then grouped 4 and 8; backward.
TABLE = {
    "A100 NVLink": (312e12, 300e9, [1040, 2080, 520, 260, 2496, 624, 312]),
    "A100 HDR": (312e12, 25e9, [12480, 24960, 6240, 3120, 29952, 7488, 3744]),
    "A100 IB 100 Gb": (312e12, 12.5e9, [24960, 49920, 12480, 6240, 59904, 14976, 7488]),
    "H100 NVLink": (989e12, 450e9, [2198, 4396, 1099, 549, 5275, 1319, 659]),
    "H100 NDR": (989e12, 50e9, [19780, 39560, 9890, 4945, 47472, 11868, 5934]),
    "B200 NVLink5": (2250e12, 900e9, [2500, 5000, 1250, 625, 6000, 1500, 750]),
}


@pytest.mark.parametrize("name", TABLE)
def test_thresholds_are_those_of_the_table(name):
    flops, bandwidth, expected = TABLE[name]
    found = [least_tokens(flops, bandwidth)]
    found += [least_tokens(flops, bandwidth, grouping, "causal") for grouping in (1, 1 / 4, 1 / 8)]
    found += [least_tokens(flops, bandwidth, grouping, "causal", True) for grouping in (1, 1 / 4, 1 / 8)]
    assert [round(x) for x in found] == pytest.approx(expected, abs=1)


def test_a_double_ring_divides_the_threshold_by_its_inner_ring():
    near, far, double = thresholds(Job(LLAMA, MILLION, devices=64, inner=8))
    assert double.link == "across nodes, double ring of 8"
    assert (double.forward, double.backward) == (far.forward / 8, far.backward / 8)
    hardware = Job(LLAMA, MILLION).hardware
    assert near.forward == pytest.approx(0.25 * 2 * hardware.flops / hardware.node_bandwidth)
    halves = thresholds(Job(LLAMA, MILLION, devices=64, ulysses=2))
    assert halves[0].forward == near.forward / 2  # a place holds the tokens of both


def test_a_slower_network_needs_more_tokens_and_more_time():
    job = Job(LLAMA, 2**17, devices=16, layout="zigzag", transport="ring")
    slow = job.but(network_bandwidth=job.hardware.network_bandwidth / 8)
    assert thresholds(slow)[1].forward == pytest.approx(8 * thresholds(job)[1].forward)
    assert thresholds(slow)[0] == thresholds(job)[0]
    assert attention_seconds(slow)[1] > attention_seconds(job)[1]


def test_price_of_length():
    assert cost_ratio(LLAMA, 4096) == 1.0
    # Causal, 12 h^2 weights a layer: (12 h + s) / (12 h + 4096); grouped heads and the MLP change the weights.
    assert cost_ratio(LLAMA2, MILLION) == pytest.approx(
        (6.6e9 + LLAMA2.pairs(MILLION) / MILLION * 8192 * 2 / 2) / 6.6e9, rel=0.2
    )
    assert cost_ratio(LLAMA2, MILLION) > cost_ratio(read_model("Llama-2-70b"), MILLION)


def test_windows_get_a_transport_of_their_own():
    kinds = layer_kinds(Job(read_model("gemma-2-9b"), 2**18))
    assert kinds[("direct", 1)] == 21 and sum(kinds.values()) == 42


def test_all_legal_splits_are_compared_and_the_fastest_comes_first():
    job = Job(LLAMA, 2**18, devices=32)
    found = list(splits(job))
    assert {(s.ring, s.ulysses) for s in found} == {(32 // u, u) for u in (1, 2, 4, 8, 16, 32)}
    assert [s.seconds for s in found] == sorted(s.seconds for s in found)
    for split in found:
        cut = job.but(ulysses=split.ulysses, inner=split.inner, transport=split.transport)
        assert split.seconds == pytest.approx(sum(attention_seconds(cut)[:2]))
    assert any(split.transport == "double_ring" and split.inner == 8 for split in found)
    few = {s.ulysses for s in splits(Job(read_model("Qwen2.5-0.5B"), 2**17, devices=32))}
    assert max(few) <= 14  # no rank without a query head


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 64), st.sampled_from((1, 2, 8)), st.sampled_from(("full", "none", "save-attention")))
def test_time_grows_with_the_length_and_no_rate_exceeds_the_kernels(kilo, devices, checkpoint):
    job = Job(LLAMA, 16384 * kilo, devices=devices, checkpoint=checkpoint)
    times, double = times_of(job), times_of(job.but(length=2 * job.length))
    assert double.step > 2 * times.step * (1 - 1e-9)
    forward, backward = job.device_facts.rates("auto")
    assert times.mfu < times.hfu * 1.01 and times.hfu < max(forward, backward, job.device_facts.gemm) / times.peak
    slower = times_of(job.but(kernel="flash_attn_2"))
    assert slower.step > times.step


def test_levers_are_what_the_changed_job_says():
    found = plan(Job(QWEN, MILLION))
    assert not found.fits
    by_option = {lever.options: lever for lever in found.levers}
    changed = plan(Job(QWEN, MILLION, loss_block=2048))
    lever = by_option["--loss-block 2048"]
    assert (lever.memory, lever.seconds) == (changed.memory.total, changed.times.step)
    saved = by_option["--checkpoint save-attention --offload attention"]
    assert saved.seconds / found.times.step == pytest.approx(0.79, abs=0.02)
    assert all(lever.memory < found.memory.total or lever.seconds < found.times.step for lever in found.levers)


def test_offload_is_hidden_only_by_as_much_compute(monkeypatch):
    job = Job(LLAMA, 2**17, offload=("layers",))
    before = times_of(job)
    assert {part.name: part.seconds for part in before.parts}["offload not hidden"] == 0.0
    monkeypatch.setitem(DEVICES, "h100", replace(DEVICES["h100"], host_bandwidth=1e8))
    transfers = 2 * 2 * job.tokens * 4096 * 32 / 1e8
    after = times_of(job)
    compute = sum(part.seconds for part in before.parts[:3])
    assert after.step - before.step == pytest.approx(transfers - compute)


def test_an_optimizer_on_the_host_waits_for_transfers_and_for_its_memory():
    """ZeRO-Offload (Ren et al. 2021, arXiv 2101.06840): gradients go down, rounded weights come back."""
    P = LLAMA.parameters / 8

    def optimizer_of(**more):
        job = Job(LLAMA, 2**17, zero=3, **more)
        (part,) = [part for part in times_of(job).parts if part.name == "optimizer"]
        return part, job.device_facts.host_bandwidth

    part, bandwidth = optimizer_of(offload=("optimizer",))  # DeepSpeed: 2 + 4 + 12 bytes, on one host for 8 ranks
    assert part.seconds == pytest.approx(P * (4 + 2) / bandwidth + 8 * 2 * P * 18 / HOST_MEMORY_BANDWIDTH)
    assert part.note == "6.02 GB between device and host, then 289 GB of host memory"
    part, bandwidth = optimizer_of(offload=("optimizer", "weights"))  # FSDP2: 4 + 4 + 8, weights fetched as needed
    assert part.seconds == pytest.approx(P * 4 / bandwidth + 8 * 2 * P * 16 / HOST_MEMORY_BANDWIDTH)
    part, _ = optimizer_of(optimizer="adamw_torch_8bit")
    whole, _ = optimizer_of()
    assert part.seconds / whole.seconds == pytest.approx((8 + 2.03125) / 16) and part.note == ""


def test_weights_in_host_memory_are_fetched_twice_as_they_are_stored(monkeypatch):
    monkeypatch.setitem(DEVICES, "h100", replace(DEVICES["h100"], host_bandwidth=1e7))
    for precision, stored in (("fp32", 4), ("bf16-master", 2)):
        job = Job(LLAMA, 2**15, zero=3, precision=precision, offload=("optimizer", "weights"))
        (part,) = [part for part in times_of(job).parts if part.name == "offload not hidden"]
        assert part.note == f"{2 * stored * LLAMA.parameters / 8 / 1e7:.3g} s of transfers beside compute"
