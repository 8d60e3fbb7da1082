"""The section `steps` of `ring-hf verify`: runs, left-out runs, kept runs and verdicts, mostly without training."""

import gc
import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen3ForCausalLM, Trainer

from ring_hf.cli import main
from ring_hf.costmodel.devices import DEVICES
from ring_hf.hf.attention import backend
from ring_hf.testing import assert_close
from ring_hf.verify import ring_share, trainer_run, verify_report
from ring_hf.verify import training_steps as steps
from ring_hf.verify.trainer_run import Run, Steps

CPU = torch.device("cpu")
QUICK = ["verify", "--emulate", "--quick", "--only", "steps"]
ALL = {
    "agreement",
    *(f"{variant}, 64 tokens" for variant in steps.VARIANTS),
    "one rank of 8, one layer's attention, 128 tokens",
    "one rank of 8, 128 tokens",
}


def section(kept=None, tiny=True):
    return steps.run(CPU, True, tiny, lambda words, total: None, kept or {}, lambda partial: None)


@pytest.fixture
def trained(monkeypatch):
    """Runs that were asked for; none takes any time. `trained.fail` may raise instead."""
    asked = SimpleNamespace(runs=[], fail=lambda run: None)

    def train(run, device):
        asked.runs.append(run)
        asked.fail(run)
        count = len(run.lengths)
        return Steps([0.5] * count, 10**9, {"loss": [2.0] * count, "grad_norm": [1.0] * count})

    monkeypatch.setattr(steps, "train", train)
    return asked


def test_a_stopped_section_goes_on_run_by_run(trained, tmp_path, capsys):
    words = [*QUICK, "--output", str(tmp_path)]

    def stop(run):
        if run.options is not None and len(run.lengths) < steps.STEPS:
            raise KeyboardInterrupt

    trained.fail = stop
    with pytest.raises(KeyboardInterrupt):
        main(words)
    kept = json.loads((tmp_path / "results.json").read_text())["sections"]["steps"]
    assert list(kept["rows"]) == ["agreement", "sdpa, 64 tokens", "ring_zigzag, 64 tokens"] and not kept["finished"]
    assert "## steps: ok, not finished" in (tmp_path / "results.md").read_text()

    trained.runs, trained.fail = [], lambda run: None
    assert main(words) == 0
    assert [run.attention for run in trained.runs] == ["ring_zigzag", ring_share.ATTENTION]
    done = json.loads((tmp_path / "results.json").read_text())["sections"]["steps"]
    assert set(done["rows"]) == ALL and done["finished"]
    assert all(done["rows"][name] == row for name, row in kept["rows"].items())
    capsys.readouterr()
    trained.runs = []
    assert main(words) == 0 and trained.runs == []
    assert "steps: done before, kept" in capsys.readouterr().out


def test_out_of_memory_is_a_row_and_a_failure_is_tried_again(trained):
    def fail(run):
        if len(run.lengths) < steps.STEPS and run.attention == "sdpa":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if run.attention == ring_share.ATTENTION:
            raise RuntimeError("no kernel image\nis available")

    trained.fail = fail
    report = section()
    row = report["rows"]["sdpa, 64 tokens"]
    assert row["outcome"] == "out of memory" and row["predicted"]["memory"] > 0 and "seconds" not in row
    failure = {"kind": "failure", "outcome": "RuntimeError: no kernel image is available"}
    assert report["rows"]["one rank of 8, 128 tokens"] == failure and not report["ok"] and report["finished"]
    lines = verify_report._SECTIONS["steps"](report)
    assert any(line.startswith("| sdpa, 64 tokens | off | sdpa ") and "| out of memory |" in line for line in lines)
    assert "- one rank of 8, 128 tokens: RuntimeError: no kernel image is available" in lines

    trained.runs, trained.fail = [], lambda run: None
    again = section(report)
    assert [run.attention for run in trained.runs] == [ring_share.ATTENTION]
    assert again["ok"] and again["rows"]["sdpa, 64 tokens"] == row


def test_a_run_that_did_not_fit_leaves_nothing_behind(monkeypatch):
    def training_step(self, model, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "training_step", training_step)
    keys = {**steps.read_config(steps.MODEL)[0], **steps.TINY}
    run = Run(keys, "ring_zigzag", (64, 64), steps.SAVE.options)
    row = steps._or_out_of_memory(lambda: trainer_run.train(run, CPU), {"kind": "steps"})
    trainer_run.free(CPU)
    assert row == {"kind": "steps", "outcome": "out of memory"}
    assert [x for x in gc.get_objects() if type(x) is Qwen3ForCausalLM] == []


def test_the_budget_leaves_runs_out_until_the_next_call(trained, monkeypatch):
    def section_of_looks_at_the_clock_30_seconds_apart(kept):
        monkeypatch.setattr(steps, "time", SimpleNamespace(perf_counter=iter(range(0, 3000, 30)).__next__))
        return section(kept)

    monkeypatch.setattr(steps, "SETUP", 0.0)
    monkeypatch.setitem(steps.BUDGET, "emulated", 100.0)
    first = section_of_looks_at_the_clock_30_seconds_apart({})
    assert len(first["rows"]) == 3 and set(first["rows"]) | set(first["left_out"]) == ALL
    assert not first["finished"] and all(why.endswith("; run again to go on") for why in first["left_out"].values())
    second = section_of_looks_at_the_clock_30_seconds_apart(first)
    assert set(second["rows"]) == ALL and second["left_out"] == {} and second["finished"]


def test_a_run_that_takes_longer_than_the_section_may_is_not_promised(trained, monkeypatch):
    monkeypatch.setattr(steps, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    monkeypatch.setitem(steps.BUDGET, "emulated", 4 * steps.SETUP - 1)
    report = section()
    assert list(report["left_out"]) == ["agreement"] and "run again" not in report["left_out"]["agreement"]
    assert report["finished"] and set(report["rows"]) == ALL - {"agreement"}


def planned(device, lengths=steps.LENGTHS):
    """Settings and verdict of each variant and length on a device."""
    bench = steps.Bench(CPU, device, tiny=False, quick=False)
    assert bench.lengths == lengths
    report = {}
    for case in steps.cases(bench):
        if case.plan is not None:
            report[case.name] = (case.plan.job, case.plan.memory.total / case.plan.memory_budget)
    return report


def test_the_planner_chooses_settings_and_what_is_tried():
    small, large = planned("h100"), planned("h200")
    assert len(small) == len(large) == len(steps.VARIANTS) * len(steps.LENGTHS) + 1
    for variant in ("sdpa", "ring_zigzag"):
        name = f"{variant}, 32,768 tokens"
        assert (small[name][0].checkpoint, large[name][0].checkpoint) == ("full", "none")
        assert (
            small[f"{variant}, 65,536 tokens"][1] > steps.MAX_MEMORY_RATIO
            and large[f"{variant}, 65,536 tokens"][1] < 1
        )
    for length in steps.LENGTHS:
        job, share = small[f"ring_zigzag, memory options, {length:,} tokens"]
        assert share < 1 and job.checkpoint == "save-attention" and job.ffn_block and job.loss_block
    job, _ = planned("a100-40")["ring_zigzag, memory options, 262,144 tokens"]
    assert job.offload == ("layers", "attention")
    job, _ = small["one rank of 8, 131,072 tokens"]
    assert (job.cp, job.tokens_per_rank, job.checkpoint) == (8, 16384, "full")


def test_what_is_too_large_by_the_plan_is_left_out(trained, monkeypatch):
    monkeypatch.setattr(steps, "LENGTHS", (2**16,))
    monkeypatch.setitem(steps.BUDGET, "gpu", math.inf)
    monkeypatch.setattr(
        ring_share, "time_attention", lambda *_: {name: [1, 1] for name in ("forward", "backward", "flops")}
    )
    report = section(tiny=False)
    assert list(report["left_out"]) == ["sdpa, 65,536 tokens", "ring_zigzag, 65,536 tokens"]
    assert all("and the device has 79 GiB" in why for why in report["left_out"].values())
    assert report["rows"]["ring_zigzag, memory options, 65,536 tokens"]["lengths"] == [2**16] * 3


@pytest.mark.parametrize(
    ("seconds", "lengths"), [(1.5, (800,) * 4), (6.5, (800,) * 3), (9.0, (100, 800)), (60, (100, 800))]
)
def test_long_steps_are_timed_once_after_a_short_one(seconds, lengths):
    assert steps.schedule(800, seconds) == lengths


@pytest.mark.parametrize(
    ("name", "num_bytes", "key"),
    [
        ("NVIDIA H100 80GB HBM3", 85.0e9, "h100"),
        ("NVIDIA H100 NVL", 100e9, "h100-96"),
        ("NVIDIA H200", 150e9, "h200"),
        ("NVIDIA A100-SXM4-40GB", 42.3e9, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 85.0e9, "a100"),
        ("NVIDIA B200", 191e9, "b200"),
        ("NVIDIA GH200 480GB", 102e9, None),
        ("NVIDIA GeForce RTX 4090", 25e9, None),
    ],
)
def test_devices_of_the_planner_are_known_by_name_and_memory(name, num_bytes, key):
    assert steps.planner_device(name, num_bytes) == key


def test_a_device_that_the_planner_does_not_know_is_named(monkeypatch):
    properties = SimpleNamespace(name="NVIDIA GeForce RTX 4090", total_memory=25e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    report = steps.run(torch.device("cuda"), True, False, lambda words, total: None, {}, lambda partial: None)
    why = f"the planner knows no NVIDIA GeForce RTX 4090, only {', '.join(DEVICES)}"
    assert report["ok"] and report["left_out"] == {"all runs": why}
    assert verify_report._SECTIONS["steps"](report)[-1] == f"- all runs: {why}"


def test_another_training_than_that_of_sdpa_is_found(monkeypatch):
    monkeypatch.setattr(steps, "STEPS", 3)
    stock = backend.local_attention_forward

    def wrong(query, key, value, *rest):
        return stock(query, key * 1.5, value, *rest)

    monkeypatch.setattr(backend, "local_attention_forward", wrong)
    rows = {"agreement": steps.agreement(steps.Bench(CPU, "h100", tiny=True, quick=True))}
    compared = steps.compare(rows)
    assert [row["same"] for row in compared] == [False, False] and all(row["against"] == "fp32" for row in compared)


def test_a_disagreement_fails_the_section_and_is_measured_again(trained, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(steps, "deviation", lambda got, want: {"loss": math.nan, "grad_norm": 0.0})
        report = section()
    assert not report["ok"] and [row["same"] for row in report["agreement"]] == [False] * 4
    before = len(trained.runs)
    assert section(report)["ok"] and len(trained.runs) == 2 * before


def test_a_share_is_what_its_queries_see_of_all_keys():
    num_ranks, num_tokens, rank = 4, 48, 2
    shape = (1, 2, num_tokens // num_ranks, 8)
    torch.manual_seed(0)
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in "qkv"]
    dout = torch.randn(shape, dtype=torch.float64)
    out = ring_share._Share.apply(*leaves, ring_share.emulation_of(num_tokens, num_ranks, 0.3), rank)
    grads = torch.autograd.grad(out, leaves, dout)

    q, k, v = leaves
    positions = torch.tensor([ring_share.positions(num_tokens, num_ranks, other) for other in range(num_ranks)])
    assert sorted(positions.flatten().tolist()) == list(range(num_tokens))
    scores = q @ k.repeat(1, 1, num_ranks, 1).mT * 0.3
    scores = scores.masked_fill(positions[rank][:, None] < positions.flatten()[None, :], -torch.inf)
    want = scores.softmax(-1) @ v.repeat(1, 1, num_ranks, 1)
    for name, got, true in zip(
        ("out", "dq", "dk", "dv"), (out, *grads), (want, *torch.autograd.grad(want, leaves, dout)), strict=True
    ):
        assert_close(name, got, true, 1e-12)
