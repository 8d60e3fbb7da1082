"""Time: FLOPs and rates against closed formulas and published bounds, thresholds, splits, suggestions."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_hf.costmodel.devices import DEVICES, HOST_MEMORY_BANDWIDTH
from ring_hf.planner import TrainingJob, plan, read_model
from ring_hf.planner.memory_estimate import trained_parameters
from ring_hf.planner.model import count_visible_pairs
from ring_hf.planner.ring_thresholds import estimate_thresholds, min_tokens_to_overlap
from ring_hf.planner.step_times import (
    cost_ratio,
    count_flops,
    count_transports,
    estimate_attention,
    estimate_times,
    model_flops_per_token,
)
from ring_hf.planner.training_plan import compare_splits

LLAMA, QWEN, LLAMA2 = read_model("Llama-3.1-8B"), read_model("Qwen3-8B"), read_model("Llama-2-7b")
MILLION = 2**20


@pytest.mark.parametrize(("length", "window"), [(1, None), (7, None), (7, 3), (7, 7), (7, 100), (1, 1)])
def test_visible_pairs_are_counted(length, window):
    expected = sum(1 for q in range(length) for k in range(q + 1) if window is None or q - k < window)
    assert count_visible_pairs(length, window) == expected


def test_flops_of_a_token_are_those_of_the_table():
    """Model FLOPs per token and attention's share of the forward, Llama 3 8B; the table counts all parameters as P."""
    table = {32: (7.4e10, 0.348), 128: (1.51e11, 0.681), 256: (2.54e11, 0.811), 1024: (8.73e11, 0.945)}
    for kilo, (expected, share) in table.items():
        length = kilo * 1024
        embedding = LLAMA.vocab * LLAMA.hidden  # not counted here, as it is looked up and not multiplied
        assert model_flops_per_token(LLAMA, length) + 6 * embedding == pytest.approx(expected, rel=0.01)
        flops = count_flops(TrainingJob(LLAMA, length))
        linear = flops.linear + 2 * embedding * length
        assert flops.attention / (flops.attention + linear) == pytest.approx(share, abs=0.002)
        assert flops.model == pytest.approx(model_flops_per_token(LLAMA, length) * length)


def test_causal_attention_is_two_s_squared_d():
    s = 4096
    assert count_flops(TrainingJob(LLAMA, s)).attention == 32 * 2 * s * (s + 1) * 4096
    gemma = read_model("gemma-2-2b")  # half the layers see 4,096 keys
    s = 2**16
    windowed, dense = count_visible_pairs(s, 4096), count_visible_pairs(s, None)
    assert count_flops(TrainingJob(gemma, s)).attention == 13 * (windowed + dense) * 4 * 8 * 256


def test_executed_flops_depend_on_the_checkpoint():
    checkpoints = ("none", "full", "save-attention")
    counts = {name: count_flops(TrainingJob(LLAMA, MILLION, checkpoint=name)) for name in checkpoints}
    attention = {name: flops.attention_executed / flops.attention for name, flops in counts.items()}
    assert attention == {"none": 3.5, "full": 4.5, "save-attention": 3.5}
    layers = LLAMA.matmul_parameters - LLAMA.vocab * LLAMA.hidden
    for name, num_passes in (("none", 3), ("full", 4), ("save-attention", 4)):
        expected = 2 * MILLION * (num_passes * layers + 3 * LLAMA.vocab * LLAMA.hidden)
        assert counts[name].linear_executed == expected
    # Bounds of MFU / HFU if there was only attention: 3 / 4.5 and 3 / 3.5.
    ratio = {name: flops.model / flops.executed for name, flops in counts.items()}
    assert ratio["full"] == pytest.approx(0.667, abs=0.01)
    assert ratio["save-attention"] == pytest.approx(0.857, abs=0.01)


def test_blocks_rerun_mlps_only_without_a_checkpoint():
    base, blocks = TrainingJob(LLAMA, MILLION), {"ffn_block": 4096, "loss_block": 2048}
    assert count_flops(base.replace(**blocks)) == count_flops(base)
    whole = base.replace(checkpoint="none")
    extra = count_flops(whole.replace(**blocks)).executed - count_flops(whole).executed
    assert extra == 2 * MILLION * 32 * 3 * 4096 * 14336


def test_adapters_save_the_gradients_of_weights():
    full, lora = count_flops(TrainingJob(LLAMA, MILLION)), count_flops(TrainingJob(LLAMA, MILLION, lora=16))
    assert full.linear_executed - lora.linear_executed == full.linear


@pytest.mark.parametrize(
    ("tokens_a_second", "model", "length", "mfu"),
    [(345, QWEN, MILLION, 0.341), (73.6, LLAMA, 3_800_000, 0.226), (200.4, LLAMA2, 700_000, 0.380)],
)
def test_mfu_of_published_speeds_is_that_of_the_converter(tokens_a_second, model, length, mfu):
    """tok/s/GPU x 3 (2 P + 2 s d_q L) / peak; the converter counts all parameters, we leave out the embedding."""
    peak = DEVICES["a100" if model is LLAMA2 else "h100"].peak
    assert tokens_a_second * model_flops_per_token(model, length) / peak == pytest.approx(mfu, abs=0.003)


def lower_bound(job, forward, backward, gemm):
    """Return the seconds of a step that has only attention and linear layers, at these rates in FLOP/s."""
    flops = count_flops(job)
    attention_forward = flops.attention * (2 if job.checkpoint == "full" else 1)
    return (
        attention_forward / forward + 2.5 * flops.attention / backward + flops.linear_executed / gemm
    ) / job.devices


def test_bounds_of_the_million_token_run():
    """329 s with recomputed attention, 261 s with saved attention, at 590 / 570 TFLOP/s and GEMM at 600."""
    rates = {"forward": 590e12, "backward": 570e12, "gemm": 600e12}
    job = TrainingJob(QWEN, MILLION)
    assert lower_bound(job, **rates) == pytest.approx(329, rel=0.01)
    assert lower_bound(job.replace(checkpoint="save-attention"), **rates) == pytest.approx(261, rel=0.01)


def test_a_step_is_the_sum_of_its_parts():
    job = TrainingJob(QWEN, MILLION, offload=("layers",), loss_block=2048)
    times = estimate_times(job)
    parts = {part.name: part.seconds for part in times.parts}
    bound = lower_bound(job, *job.device_spec.rates("auto"), job.device_spec.gemm)
    assert parts["linear layers"] + parts["attention"] == pytest.approx(bound, rel=0.01)  # merges take the rest
    assert times.step == sum(parts.values())
    assert times.tokens_per_device == MILLION / times.step / 8
    assert times.mfu == pytest.approx(times.tokens_per_device * model_flops_per_token(QWEN, MILLION) / 989e12)
    assert times.hfu / times.mfu == pytest.approx(times.flops.executed / times.flops.model)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("checkpoint", ["full", "save-attention", "none"])
def test_blocks_of_mlps_move_more_memory_only_where_they_rerun(checkpoint, fused):
    job = TrainingJob(LLAMA, MILLION, checkpoint=checkpoint, fused=fused)
    whole, blocks = (
        {part.name: part.seconds for part in estimate_times(job.replace(ffn_block=block)).parts} for block in (0, 4096)
    )
    rerun = 2 * (3 if fused else 4) * 2 * LLAMA.ff * job.tokens_per_rank * 32 / job.hardware.memory_bandwidth
    extra = blocks["norms, activations, rounding"] - whole["norms, activations, rounding"]
    assert extra == pytest.approx(rerun if checkpoint == "none" else 0.0)
    assert (blocks["linear layers"] > whole["linear layers"]) == (checkpoint == "none")


def test_weights_and_gradients_are_sent_as_zero_does():
    def bytes_sent(**settings):
        job = TrainingJob(LLAMA, 2**16, **settings)
        return (estimate_times(job).bytes_sent - estimate_attention(job).bytes_sent) / (7 / 8)

    P = LLAMA.parameters
    assert bytes_sent(zero=3) == pytest.approx(3 * 2 * P)  # gathered twice, gradients scattered, in bf16
    for zero, weight in ((0, 4), (1, 2), (2, 2)):  # an all-reduce, or gradients scattered, updated weights gathered
        assert bytes_sent(zero=zero) == pytest.approx(2 * weight * P)
        assert bytes_sent(zero=zero, lora=16) == pytest.approx(2 * weight * trained_parameters(LLAMA, 16))
    assert bytes_sent(zero=3, lora=16) == pytest.approx(2 * (2 * P + trained_parameters(LLAMA, 16)))


def test_contiguous_layouts_cost_the_busiest_rank():
    jobs = [TrainingJob(QWEN, MILLION, layout=name) for name in ("zigzag", "contiguous")]
    balanced, unbalanced = (estimate_attention(job).compute for job in jobs)
    assert unbalanced / balanced == pytest.approx(1.875, rel=0.005)  # 2 - 1 / N
    notes = {part.note for job in jobs for part in estimate_times(job).parts if part.name == "attention"}
    mean = count_flops(jobs[0]).attention_executed / 8 / 1e12
    assert notes == {f"{mean:,.0f} TFLOP on average, time of the busiest rank"}


def test_saving_attention_saves_its_forward():
    jobs = [TrainingJob(QWEN, MILLION, checkpoint=name) for name in ("full", "save-attention")]
    full, saved = (estimate_attention(job).compute for job in jobs)
    forward, backward = DEVICES["h100"].rates("auto")
    expected = (1 / forward + 2.5 / backward) / (2 / forward + 2.5 / backward)
    assert saved / full == pytest.approx(expected, rel=1e-3)


@dataclass(frozen=True)
class ThresholdCase:
    """Peak FLOP/s, link bytes/s one way, and expected tokens: full mask, causal (K / H = 1, 1/4, 1/8), backward."""

    flops: float
    bandwidth: float
    full: int
    causal: tuple[int, int, int]
    causal_backward: tuple[int, int, int]


THRESHOLDS = {  # with the peaks of data sheets
    "A100 NVLink": ThresholdCase(312e12, 300e9, 1040, (2080, 520, 260), (2496, 624, 312)),
    "A100 HDR": ThresholdCase(312e12, 25e9, 12480, (24960, 6240, 3120), (29952, 7488, 3744)),
    "A100 IB 100 Gb": ThresholdCase(312e12, 12.5e9, 24960, (49920, 12480, 6240), (59904, 14976, 7488)),
    "H100 NVLink": ThresholdCase(989e12, 450e9, 2198, (4396, 1099, 549), (5275, 1319, 659)),
    "H100 NDR": ThresholdCase(989e12, 50e9, 19780, (39560, 9890, 4945), (47472, 11868, 5934)),
    "B200 NVLink5": ThresholdCase(2250e12, 900e9, 2500, (5000, 1250, 625), (6000, 1500, 750)),
}


@pytest.mark.parametrize("name", THRESHOLDS)
def test_thresholds_are_those_of_the_table(name):
    case = THRESHOLDS[name]
    rates = case.flops, case.bandwidth
    assert round(min_tokens_to_overlap(*rates)) == pytest.approx(case.full, abs=1)
    for backward, expected in ((False, case.causal), (True, case.causal_backward)):
        tokens = [min_tokens_to_overlap(*rates, grouping, "causal", backward) for grouping in (1, 1 / 4, 1 / 8)]
        assert [round(number) for number in tokens] == pytest.approx(expected, abs=1)


def test_a_double_ring_divides_the_threshold_by_its_inner_ring():
    node, network, double = estimate_thresholds(TrainingJob(LLAMA, MILLION, devices=64, inner=8))
    assert double.link == "across nodes, double ring of 8"
    assert (double.forward, double.backward) == (network.forward / 8, network.backward / 8)
    hardware = TrainingJob(LLAMA, MILLION).hardware
    assert node.forward == pytest.approx(0.25 * 2 * hardware.flops / hardware.node_bandwidth)
    with_ulysses = estimate_thresholds(TrainingJob(LLAMA, MILLION, devices=64, ulysses=2))
    assert with_ulysses[0].forward == node.forward / 2  # a rank of the ring has the tokens of both


def test_a_slower_network_needs_more_tokens_and_more_time():
    job = TrainingJob(LLAMA, 2**17, devices=16, layout="zigzag", transport="ring")
    slow = job.replace(network_bandwidth=job.hardware.network_bandwidth / 8)
    assert estimate_thresholds(slow)[1].forward == pytest.approx(8 * estimate_thresholds(job)[1].forward)
    assert estimate_thresholds(slow)[0] == estimate_thresholds(job)[0]
    assert estimate_attention(slow).exposed > estimate_attention(job).exposed


def test_cost_of_length():
    assert cost_ratio(LLAMA, 4096) == 1.0
    # Causal, 12 h^2 weights a layer: (12 h + s) / (12 h + 4096); grouped heads and the MLP change the weights.
    expected = (6.6e9 + LLAMA2.count_pairs(MILLION) / MILLION * 8192 * 2 / 2) / 6.6e9
    assert cost_ratio(LLAMA2, MILLION) == pytest.approx(expected, rel=0.2)
    assert cost_ratio(LLAMA2, MILLION) > cost_ratio(read_model("Llama-2-70b"), MILLION)


def test_windows_get_a_transport_of_their_own():
    counts = count_transports(TrainingJob(read_model("gemma-2-9b"), 2**18))
    assert counts[("direct", 1)] == 21 and sum(counts.values()) == 42


def test_all_legal_splits_are_compared_and_the_fastest_comes_first():
    job = TrainingJob(LLAMA, 2**18, devices=32)
    splits = compare_splits(job)
    assert {(split.ring, split.ulysses) for split in splits} == {(32 // u, u) for u in (1, 2, 4, 8, 16, 32)}
    assert [split.seconds for split in splits] == sorted(split.seconds for split in splits)
    for split in splits:
        changed = job.replace(ulysses=split.ulysses, inner=split.inner, transport=split.transport)
        attention = estimate_attention(changed)
        assert split.seconds == pytest.approx(attention.compute + attention.exposed)
    assert any(split.transport == "double_ring" and split.inner == 8 for split in splits)
    few_heads = compare_splits(TrainingJob(read_model("Qwen2.5-0.5B"), 2**17, devices=32))
    assert max(split.ulysses for split in few_heads) <= 14  # no rank without a query head


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 64), st.sampled_from((1, 2, 8)), st.sampled_from(("full", "none", "save-attention")))
def test_time_grows_with_the_length_and_no_rate_exceeds_the_kernels(kilo, devices, checkpoint):
    job = TrainingJob(LLAMA, 16384 * kilo, devices=devices, checkpoint=checkpoint)
    times, doubled = estimate_times(job), estimate_times(job.replace(length=2 * job.length))
    assert doubled.step > 2 * times.step * (1 - 1e-9)
    forward, backward = job.device_spec.rates("auto")
    assert times.mfu < times.hfu * 1.01 and times.hfu < max(forward, backward, job.device_spec.gemm) / times.peak
    slower = estimate_times(job.replace(kernel="flash_attn_2"))
    assert slower.step > times.step


def test_suggestions_are_the_plans_of_the_changed_jobs():
    original = plan(TrainingJob(QWEN, MILLION))
    assert not original.fits
    by_option = {suggestion.options: suggestion for suggestion in original.suggestions}
    changed = plan(TrainingJob(QWEN, MILLION, loss_block=2048))
    suggestion = by_option["--loss-block 2048"]
    assert (suggestion.memory, suggestion.seconds) == (changed.memory.total, changed.times.step)
    saved = by_option["--checkpoint save-attention --offload attention"]
    assert saved.seconds / original.times.step == pytest.approx(0.79, abs=0.02)
    for suggestion in original.suggestions:
        assert suggestion.memory < original.memory.total or suggestion.seconds < original.times.step


def test_offload_is_hidden_only_by_as_much_compute(monkeypatch):
    job = TrainingJob(LLAMA, 2**17, offload=("layers",))
    before = estimate_times(job)
    assert {part.name: part.seconds for part in before.parts}["exposed offload copies"] == 0.0
    monkeypatch.setitem(DEVICES, "h100", replace(DEVICES["h100"], host_bandwidth=1e8))
    copies = 2 * 2 * job.tokens_per_rank * 4096 * 32 / 1e8
    after = estimate_times(job)
    compute = sum(part.seconds for part in before.parts[:3])
    assert after.step - before.step == pytest.approx(copies - compute)


def test_an_optimizer_on_the_host_waits_for_copies_and_its_memory():
    """ZeRO-Offload (Ren et al. 2021, arXiv 2101.06840): gradients are copied down, rounded weights back."""
    P = LLAMA.parameters / 8

    def optimizer_part(**settings):
        job = TrainingJob(LLAMA, 2**17, zero=3, **settings)
        (part,) = [part for part in estimate_times(job).parts if part.name == "optimizer"]
        return part, job.device_spec.host_bandwidth

    part, bandwidth = optimizer_part(offload=("optimizer",))  # DeepSpeed: 2 + 4 + 12 bytes, on one host for 8 ranks
    assert part.seconds == pytest.approx(P * (4 + 2) / bandwidth + 8 * 2 * P * 18 / HOST_MEMORY_BANDWIDTH)
    assert part.note == "6.02 GB between device and host, then 289 GB of host memory"
    part, bandwidth = optimizer_part(offload=("optimizer", "weights"))  # FSDP2: 4 + 4 + 8, weights fetched as needed
    assert part.seconds == pytest.approx(P * 4 / bandwidth + 8 * 2 * P * 16 / HOST_MEMORY_BANDWIDTH)
    part, _ = optimizer_part(optimizer="adamw_torch_8bit")
    whole, _ = optimizer_part()
    assert part.seconds / whole.seconds == pytest.approx((8 + 2.03125) / 16) and part.note == ""


def test_weights_in_host_memory_are_copied_twice_in_their_own_dtype(monkeypatch):
    monkeypatch.setitem(DEVICES, "h100", replace(DEVICES["h100"], host_bandwidth=1e7))
    for precision, element in (("fp32", 4), ("bf16-master", 2)):
        job = TrainingJob(LLAMA, 2**15, zero=3, precision=precision, offload=("optimizer", "weights"))
        (part,) = [part for part in estimate_times(job).parts if part.name == "exposed offload copies"]
        assert part.note == f"{2 * element * LLAMA.parameters / 8 / 1e7:.3g} s of copies beside compute"
