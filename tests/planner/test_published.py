"""Documented examples: tables of papers, and predictions of published runs."""

import pytest

from ring_hf.planner import read_model
from ring_hf.planner.memory_estimate import estimate_memory
from ring_hf.planner.paper_tables import (
    INTERCONNECTS,
    appendix_d_ratio,
    make_appendix_d_table,
    make_hundred_million_table,
    make_ring_attention_1_table,
    make_ring_attention_2_table,
)
from ring_hf.planner.published import RUNS, TOLERANCE, compare_runs, make_published_table
from ring_hf.planner.step_times import count_flops


def cells(text):
    """Return the rows of all Markdown tables in a text, by their first cell."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row for row in lines if not set(row[0]) <= {"-"}}


def test_a_hundred_million_tokens_are_more_than_a_thousand_gigabytes():
    rows = cells(make_hundred_million_table())
    assert [row[2] for name, row in rows.items() if "(s x h)" in name] == ["204.8"] * 5
    assert rows["together"][2] == "1,024.0" and float(rows["together"][2].replace(",", "")) > 1000
    assert rows["lse, 8 heads in fp32 (s x 8)"][2] == "3.2" and rows["MLP of 4 h (8 b s h bytes)"][2] == "819.2"


def test_minimal_lengths_are_printed_in_the_paper_except_its_erratum():
    rows = cells(make_ring_attention_2_table())
    recomputed = {"A100 NVLink": (1040, 6240), "A100 InfiniBand": (24960, 149760), "TPU v3": (1098, 6589)}
    recomputed |= {"TPU v4": (1026, 6157), "TPU v5e": (1054, 6323)}
    for link in INTERCONNECTS:
        block, sequence = (int(rows[link.name][column].replace(",", "")) for column in (3, 5))
        assert (block, sequence) == recomputed[link.name]
        assert abs(sequence / 1000 - link.sequence) < 0.3
        differs = abs(block / 1000 - link.block) >= 0.1
        assert differs == (link.name == "A100 InfiniBand")  # the paper prints 24.5 for 24.96
    assert "24,960" in make_ring_attention_2_table().rsplit("Erratum", 1)[1]


def test_memory_of_a_layer_is_the_papers_table_in_bytes():
    rows = cells(make_ring_attention_1_table())
    b_s_h, score = 2**20 * 4096, 32 * 2**40
    assert float(rows["vanilla"][2].replace(",", "")) == pytest.approx(2 * score / 1e9, rel=0.01)
    assert float(rows["and blockwise FFN (BPT)"][2]) == pytest.approx(2 * b_s_h / 1e9, rel=0.01)
    assert float(rows["Ring Attention, per rank"][2]) == pytest.approx(12 * b_s_h / 8 / 1e9, rel=0.01)
    assert "12 b c h bytes" in make_ring_attention_1_table()


# Appendix D as printed: 32, 64, 256, 3,072 and 32,768 times 4K.
APPENDIX_D = {
    "7B": (4096, [5.4, 10.0, 37.4, 439.7, 4682.0]),
    "13B": (5120, [4.6, 8.4, 31.0, 362.3, 3855.9]),
    "33B": (7168, [3.7, 6.5, 23.2, 268.0, 2850.3]),
    "65B": (8192, [3.4, 5.8, 20.6, 237.2, 2521.5]),
    "175B": (12288, [2.6, 4.3, 14.4, 162.6, 1725.6]),
    "1TB": (36864, [1.6, 2.1, 5.6, 56.8, 596.8]),
}


@pytest.mark.parametrize("name", APPENDIX_D)
def test_the_cost_of_length_is_that_of_the_paper(name):
    hidden, printed = APPENDIX_D[name]
    ratios = [appendix_d_ratio(hidden, 4096 * factor) for factor in (32, 64, 256, 3072, 32768)]
    assert [round(ratio, 1) for ratio in ratios] == printed
    table = make_appendix_d_table().split("causal mask;")[0]
    assert all(f" {value:.1f} " in table for value in printed)


def test_with_a_causal_mask_the_cost_is_nearly_half():
    million = [round(appendix_d_ratio(hidden, 2**20, causal=True), 1) for hidden in (4096, 8192, 12288)]
    assert million == [20.6, 11.2, 7.9]
    # The same from the sums: 24 s h^2 + 4 s^2 h per layer, causal 2 s^2 h.
    s, h = 2**20, 4096
    per_token = [(24 * n * h * h + 2 * n * n * h) / n for n in (s, 4096)]
    assert appendix_d_ratio(h, s, causal=True) == pytest.approx(per_token[0] / per_token[1])


def test_every_prediction_is_close_or_has_an_explanation():
    comparisons = list(compare_runs())
    assert len(comparisons) >= 30
    far = [comparison for comparison in comparisons if abs(comparison.error) > TOLERANCE]
    assert [comparison for comparison in far if not comparison.explanation] == []
    close = {(comparison.run, comparison.quantity) for comparison in comparisons if comparison not in far}
    assert len(close) >= 22
    for run, quantity in (
        ("TRL 1.13, Qwen3-8B, 1M, 8 x H100", "seconds"),
        ("TRL 1.13, Qwen3-8B, 1M, 8 x H100", "GB"),
        ("ALST, Llama-3.1-8B, 1 x H100", "seconds"),
        ("ALST, Llama-3.1-8B, 32 x H100, all options", "longest"),
        ("ALST, Llama-3.1-8B, 8 x H100, all options", "seconds"),
        ("NeMo, Llama-2-7B, 1M, 1,024 x H100", "tokens/s/GPU"),
        ("EasyContext, Llama-2-7B, 700K, 8 x A100", "tokens/s/GPU"),
    ):
        assert (run, quantity) in close


def test_the_table_has_the_error_and_explanation_of_each_figure():
    text = make_published_table()
    rows = [line for line in text.splitlines() if line.startswith("| ") and " %" in line]
    assert len(rows) == len(list(compare_runs()))
    notes = {row.split("|")[6].strip() for row in rows} - {""}
    assert all(f"\n{note} " in text for note in notes) and "(1)" in notes
    assert all(f"\n{run.name}: " in text for run in RUNS)


def test_explanations_are_arithmetic_on_published_figures():
    by_name = {run.name: run for run in RUNS}
    # torchtitan: the time without attention, from CP 1 and CP 2 alone, and the attention rates that this leaves.
    steps, tflop = [], []
    for cp, name in ((1, "32K, CP 1"), (2, "64K, CP 2"), (4, "128K, CP 4"), (8, "256K, CP 8")):
        run = by_name[f"torchtitan, {name}, fp8"]
        steps.append(2**15 / run.published["tokens/s/GPU"])
        tflop.append(count_flops(run.build_job()).attention_executed / 8 / 1e12)
        assert run.build_job().cp == cp
    attention = steps[1] - steps[0]
    rest = steps[0] - attention
    rates = [flops / (step - rest) for flops, step in zip(tflop, steps, strict=True)]
    assert rest == pytest.approx(3.9, abs=0.1)
    assert rates == pytest.approx([283, 283, 190, 181], rel=0.01)
    # ALST: tokens of a rank whose hidden states no longer have 32-bit offsets.
    max_tokens = 2**31 // read_model("Llama-3.1-8B").hidden
    assert max_tokens == 524_288 and 500_000 < max_tokens < 555_000
    assert [3_800_000 / 8, 15_500_000 / 32] == [475_000, 484_375]
    # TRL, 4B: two tensors of MLP width.
    job = by_name["TRL 1.13, Qwen3-4B, 1M, 4 x H100"].build_job()
    assert 2 * 2 * job.tokens_per_rank * job.model.ff / 1e9 == pytest.approx(10.2, abs=0.05)
    assert estimate_memory(job).allocated / 1e9 - 63.6 == pytest.approx(15.4, abs=0.1)
    assert pytest.approx(68.3, abs=0.05) == 63.6 * 2**30 / 1e9
    # TRL, 0.6B at 4M: gradients of all keys and values in fp32.
    job = by_name["TRL #6845, Qwen3-0.6B, 4M, 8 x H100"].build_job()
    assert estimate_memory(job).allocated / 1e9 - 73.7 == pytest.approx(37.8, abs=0.05)
    assert 4 * job.padded_length * job.model.kv_width / 1e9 == pytest.approx(34.4, abs=0.05)
