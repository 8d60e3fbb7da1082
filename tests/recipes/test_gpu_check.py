"""`scripts/gpu_check.py` on a CPU: every section runs, writes what it found, goes on where it was, and can fail."""

import contextlib
import json
import re
import shlex
import sys
from dataclasses import replace

import pytest
import torch

from ring_hf.kernels import KERNELS, merge
from ring_hf.parallel import emulation, single_device
from scripts import gpu_check
from scripts.checks import exactness, report, timing, training
from scripts.gpu_check import SECTIONS, main
from tests import aten_stand_ins, flash_stand_ins
from tests.harness import ROOT, run_command

PAGE = (ROOT / "docs" / "check_your_machine.md").read_text()
(COMMAND,) = re.findall(r"^python (scripts/gpu_check.py .*)$", PAGE, re.MULTILINE)
QUICK = ["--emulate", "--quick"]
STEPS_ROWS = ["agreement", "sdpa, 64 tokens", "ring_zigzag, 64 tokens", "ring_zigzag, memory options, 64 tokens"]
STEPS_ROWS += ["one rank of 8, one layer's attention, 128 tokens", "one rank of 8, 128 tokens"]


def first_columns(text):
    """Of every row of every table the cells that name it, not what was measured."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [[cell for cell in row if not re.search(r"\d\.\d|ms$", cell)] for row in rows]


def test_everything_runs_on_a_cpu_and_is_written(tmp_path):
    words = shlex.split(COMMAND)
    assert words[1:] == QUICK
    done = run_command([sys.executable, *words, "--output", str(tmp_path / "new")])
    text = (tmp_path / "new" / "results.md").read_text()
    assert text in done.stdout
    found = json.loads((tmp_path / "new" / "results.json").read_text())
    assert list(found["sections"]) == list(SECTIONS) and all(section["ok"] for section in found["sections"].values())
    assert found["about"]["versions"]["torch"] == torch.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["about"]["date"])

    rows = found["sections"]["exactness"]["rows"]
    assert {(row["kernel"], row["dtype"]) for row in rows} >= {
        (kernel, dtype) for kernel in ("cpu", "reference") for dtype in ("bfloat16", "float32")
    }
    assert len(rows) >= 40 and all(set(row["errors"]) == set(exactness.NAMES) for row in rows)
    tried = {row["kernel"] for row in rows} | {why.split(",")[0] for why in found["sections"]["exactness"]["left_out"]}
    assert tried == set(KERNELS)

    trained = found["sections"]["trainer"]
    assert trained["steps"] == 20 == len(trained["plain"]["loss"])
    same = {row["run"]: row["same"] for row in trained["rows"]}
    emulated, processes = "4 ranks emulated, zigzag, fp32", "2 processes, ring_zigzag, fp32"
    assert same == {emulated: True, training.CONTROL: False, processes: True}

    timed = found["sections"]["benchmark"]["rows"]
    assert {row["variant"] for row in timed} == {
        "one device, sdpa",
        "one device, cpu",
        *(f"{layout}, {transport}" for layout, transport in timing.RINGS),
    }
    for row in timed:
        flops = 512 * 513 / 2 * 4 * 4 * 64 / row["ranks"]
        assert row["tflops_forward"] == pytest.approx(flops / row["forward"] / 1e12)
        assert row["tflops_both"] == pytest.approx(3.5 * flops / row["both"] / 1e12)
        assert row["sum_both"] >= row["both"] >= row["forward"] > 0

    steps = found["sections"]["steps"]
    assert steps["finished"] and steps["left_out"] == {} and list(steps["rows"]) == STEPS_ROWS
    for name, row in steps["rows"].items():
        assert row["outcome"] == "ran", name
        if row["kind"] == "steps":
            assert row["tokens_per_second"] == pytest.approx(row["lengths"][-1] / row["seconds"])
            assert row["ratio"] == {key: pytest.approx(row[key] / row["predicted"][key]) for key in row["predicted"]}
            assert len(row["loss"]) == len(row["grad_norm"]) == len(row["all_seconds"]) == len(row["lengths"]) == 4
    compared = [(row["run"], row["against"]) for row in steps["agreement"]]
    ours = ["ring_zigzag", "ring_zigzag, memory options"]
    assert compared == [(run, against) for against in ("fp32", "sdpa") for run in ours]

    excerpt = re.search(r"<!-- checked: (.*?) -->\n(.*?)<!-- end checked -->", PAGE, re.DOTALL)
    assert excerpt is not None and excerpt[1] == " ".join(QUICK)
    shown = first_columns(excerpt[2])
    assert len(shown) >= 8 and all(row in first_columns(text) for row in shown)


class Broken:
    """The CPU kernel, with one of its results wrong by a few percent."""

    NAME = "cpu"

    def __init__(self, what):
        self.what, self.right = what, KERNELS["cpu"]

    def unfit(self, *args):
        return self.right.unfit(*args)

    def forward(self, *args):
        for queries, out, lse in self.right.forward(*args):
            yield queries, out * (1.03 if self.what == "out" else 1), lse + (0.03 if self.what == "lse" else 0)

    def backward(self, *args):
        for queries, keys, *grads in self.right.backward(*args):
            factors = (1.03 if self.what == name else 1.0 for name in ("dq", "dk", "dv"))
            yield queries, keys, *(grad * factor for grad, factor in zip(grads, factors, strict=True))


@pytest.mark.parametrize("what", exactness.NAMES)
def test_a_kernel_that_is_wrong_is_found(what, monkeypatch):
    monkeypatch.setitem(KERNELS, "cpu", Broken(what))
    problem = exactness.Problem(unit=13)
    found = exactness.check(problem, torch.device("cpu"), ["cpu", "reference"], ["bfloat16", "float32"])
    assert [(row.kernel, row.exact) for row in found] == [("cpu", False), ("reference", True)] * 2


def test_a_wrong_kernel_makes_the_command_fail_until_it_is_repaired(tmp_path, monkeypatch, capsys):
    words = [*QUICK, "--only", "exactness", "--output", str(tmp_path)]
    monkeypatch.setattr(exactness, "problems", lambda quick, tiny: [exactness.Problem(unit=13)])
    with monkeypatch.context() as patch:
        patch.setitem(KERNELS, "cpu", Broken("dk"))
        assert main(words) == 1
    said = capsys.readouterr().out
    assert "## exactness: FAILED" in said and f"- cpu, float32, {exactness.Problem(unit=13).describe()}: out " in said
    assert json.loads((tmp_path / "results.json").read_text())["sections"]["exactness"]["ok"] is False
    assert main(words) == 0  # what failed is not kept
    assert "## exactness: ok" in capsys.readouterr().out
    text = (tmp_path / "results.md").read_text()
    assert main(words) == 0  # what is done is
    assert "exactness: done before, kept (--again repeats it)" in capsys.readouterr().out
    assert (tmp_path / "results.md").read_text() == text


def test_results_go_where_git_does_not_look_and_the_place_is_named(tmp_path, monkeypatch, capsys):
    assert gpu_check.RESULTS == ROOT / "runs" / "gpu_check"
    assert "runs/" in (ROOT / ".gitignore").read_text().splitlines()
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    monkeypatch.setattr(exactness, "problems", lambda quick, tiny: [exactness.Problem(unit=13)])
    assert main([*QUICK, "--only", "exactness"]) == 0
    (folder,) = tmp_path.iterdir()
    assert re.fullmatch(r"CPU-\d+-cores_\d{4}-\d\d-\d\d", folder.name)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"results: {folder}" and lines[-1] == f"written: {folder}/results.json and results.md"
    assert sorted(path.name for path in folder.iterdir()) == ["results.json", "results.md"]


GPU_KERNELS = {
    "flash_attn_2": lambda: flash_stand_ins.stand_in("2.8.3"),
    "flash_attn_3": lambda: flash_stand_ins.stand_in("3-2025-09"),
    "flash_attn_4": lambda: flash_stand_ins.stand_in("4-beta26"),
    "cuda_flash": lambda: flash_stand_ins.stand_in("aten"),
    "cuda_cudnn": lambda: aten_stand_ins.aten_stand_in("cuda_cudnn"),
    "cuda_efficient": lambda: aten_stand_ins.aten_stand_in("cuda_efficient"),
}


@pytest.mark.parametrize("kernel", GPU_KERNELS)
def test_what_a_gpu_is_asked_runs_through_stand_ins_of_its_kernels(kernel):
    """In fp64, where a stand-in is as exact as anything: the problems are ones that the calls of each can serve."""
    served = 0
    for problem in exactness.problems(quick=True, tiny=True):
        with GPU_KERNELS[kernel]() as name:
            assert name == kernel
            found = list(exactness.check(problem, torch.device("cpu"), [name], ["float64"]))
        for row in found:
            if isinstance(row, exactness.Row):
                assert row.failure is None and max(row.errors.values()) < 1e-13, row
                served += 1
    assert served >= 6


@contextlib.contextmanager
def broken_ring(what):
    """One mistake in what surrounds the kernels."""
    with pytest.MonkeyPatch.context() as patch:
        make_plan, backward, block = emulation.make_plan, emulation.ring_backward, single_device.Residents.block

        def without_last_step(*args, **kwargs):
            plan = make_plan(*args, **kwargs)
            return replace(plan, steps=plan.steps[:-1])

        def with_later_keys(*args, **kwargs):
            plan = make_plan(*args, **kwargs)
            later = [[replace(tile, hi=tile.hi and tile.hi + 1) for tile in step.tiles] for step in plan.steps]
            later = [[replace(tile, hi=1) if tile.hi == 0 else tile for tile in tiles] for tiles in later]
            steps = (replace(step, tiles=tuple(tiles)) for step, tiles in zip(plan.steps, later, strict=True))
            return replace(plan, steps=tuple(steps))

        def other_block(self, slices):
            found = [replace(part, rank=(part.rank + 1) % len(self.k)) for part in slices]
            return block(self, tuple(found))

        def summed(out, lse, block_out, block_lse):
            out.add_(block_out)
            torch.logaddexp(lse, block_lse.to(lse.dtype), out=lse)

        def other_lse(dout, q, k, v, out, lse, *rest):
            return backward(dout, q, k, v, out, lse + 0.01, *rest)

        target, name, mistake = {
            "last-step-dropped": (emulation, "make_plan", without_last_step),
            "later-keys-seen": (emulation, "make_plan", with_later_keys),
            "stale-block": (single_device.Residents, "block", other_block),
            "sum-of-softmaxes": (merge, "merge_", summed),
            "other-lse-in-backward": (emulation, "ring_backward", other_lse),
            "gradients-not-sent": (single_device.KVGradients, "send", lambda self, step: None),
        }[what]
        patch.setattr(target, name, mistake)
        yield


@pytest.mark.parametrize(
    "what",
    [
        "last-step-dropped",
        "later-keys-seen",
        "stale-block",
        "sum-of-softmaxes",
        "other-lse-in-backward",
        "gradients-not-sent",
    ],
)
def test_a_ring_that_is_wrong_is_found(what):
    gathered = "allgather" if what == "gradients-not-sent" else "ring"
    problem = exactness.Problem(transport=gathered, unit=13)
    with broken_ring(what):
        found = list(exactness.check(problem, torch.device("cpu"), ["cpu"], ["bfloat16", "float32"]))
    assert [row.exact for row in found] == [False, False]


def test_a_kernel_that_raises_is_reported_and_the_others_go_on(monkeypatch):
    class Raising(Broken):
        def forward(self, *args):
            raise RuntimeError("no kernel image is available")

    monkeypatch.setitem(KERNELS, "cpu", Raising(None))
    monkeypatch.setattr(exactness, "problems", lambda quick, tiny: [exactness.Problem(unit=13)])
    section = exactness.run(torch.device("cpu"), True, True, ["auto"], lambda words, total: None)
    assert not section["ok"] and sum(row["exact"] for row in section["rows"]) == 2
    text = "\n".join(report._SECTIONS["exactness"](section))
    assert "8/2 heads x 128, 104 tokens over 4 ranks: RuntimeError: no kernel image is available" in text
    assert "| cpu | bfloat16 | 0 of 1 |" in text


def test_nan_is_not_exact():
    fine = dict.fromkeys(exactness.NAMES, 1e-9)
    judged = exactness.judge("cpu", "float32", exactness.Problem(), {**fine, "dv": float("nan")}, fine)
    assert not judged.exact and exactness.judge("cpu", "float32", exactness.Problem(), fine, fine).exact


def test_emulated_ranks_train_under_autocast():
    """As on a GPU: queries and keys come out of RoPE in fp32, values in bf16."""
    training.register_emulated("zigzag", 4)
    settings = {"device": "cpu", "steps": 2, "length": 64}
    curves = {name: training.train(name, 1, settings, True) for name in ("sdpa", training.EMULATED)}
    assert training.deviation(curves[training.EMULATED], curves["sdpa"])["loss"] < 1e-3


def test_a_gpu_gets_every_layout_mask_head_count_and_head_dim():
    every = exactness.problems(quick=False, tiny=False)
    assert {(one.layout, one.mask) for one in every} >= {(a, b) for a in exactness.LAYOUTS for b in exactness.MASKS}
    assert {(one.heads, one.dims) for one in every} >= {(a, b) for a in exactness.HEADS for b in exactness.DIMS}
    assert {one.transport for one in every} == {"ring", *exactness.TRANSPORTS} and any(one.softcap for one in every)
    assert {one.unit % 128 for one in every if one.unit >= 1024} == {0, 1031 % 128}  # cuDNN takes the first alone
    assert len(set(every)) == len(every) >= 60


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "speed"], "--only speed is not known. Choose from exactness, trainer, benchmark, steps."),
        (["--kernels", "flash"], "--kernels: kernel='flash' is not known. Choose one of auto, flash_attn, cuda,"),
        ([], "PyTorch finds no GPU here. Add --emulate to run everything on the CPU"),
    ],
)
def test_what_cannot_run_is_refused(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*words, "--output", str(tmp_path / "nothing")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "nothing").exists()
