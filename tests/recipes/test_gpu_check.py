"""`scripts/gpu_check.py` on a CPU: every section runs, writes what it found, goes on where it was, and can fail."""

import json
import re
import shlex
import sys

import pytest
import torch

from ring_hf.kernels import KERNELS
from scripts.checks import exactness, report, timing, training
from scripts.gpu_check import SECTIONS, main
from tests.harness import ROOT, run_command

README = (ROOT / "README.md").read_text()
(COMMAND,) = re.findall(r"^python (scripts/gpu_check.py .*)$", README, re.MULTILINE)
QUICK = ["--emulate", "--quick"]


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

    excerpt = re.search(r"<!-- checked: (.*?) -->\n(.*?)<!-- end checked -->", README, re.DOTALL)
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
    monkeypatch.setattr(exactness, "problems", lambda quick, unit: [exactness.Problem(unit=unit)])
    with monkeypatch.context() as patch:
        patch.setitem(KERNELS, "cpu", Broken("dk"))
        assert main(words) == 1
    said = capsys.readouterr().out
    assert "## exactness: FAILED" in said and "- cpu, float32, zigzag, ring, causal, 8/2 heads x 128: out" in said
    assert json.loads((tmp_path / "results.json").read_text())["sections"]["exactness"]["ok"] is False
    assert main(words) == 0  # what failed is not kept
    assert "## exactness: ok" in capsys.readouterr().out
    text = (tmp_path / "results.md").read_text()
    assert main(words) == 0  # what is done is
    assert "exactness: done before, kept (--again repeats it)" in capsys.readouterr().out
    assert (tmp_path / "results.md").read_text() == text


def test_a_kernel_that_raises_is_reported_and_the_others_go_on(monkeypatch):
    class Raising(Broken):
        def forward(self, *args):
            raise RuntimeError("no kernel image is available")

    monkeypatch.setitem(KERNELS, "cpu", Raising(None))
    monkeypatch.setattr(exactness, "problems", lambda quick, unit: [exactness.Problem(unit=13)])
    section = exactness.run(torch.device("cpu"), True, True, lambda words, total: None)
    assert not section["ok"] and sum(row["exact"] for row in section["rows"]) == 2
    text = "\n".join(report._SECTIONS["exactness"](section))
    assert "- cpu, bfloat16, zigzag, ring, causal, 8/2 heads x 128: RuntimeError: no kernel image is available" in text
    assert "| cpu | bfloat16 | 0 of 1 |" in text


def test_nan_is_not_exact():
    fine = dict.fromkeys(exactness.NAMES, 1e-9)
    judged = exactness.judge("cpu", "float32", exactness.Problem(), {**fine, "dv": float("nan")}, fine)
    assert not judged.exact and exactness.judge("cpu", "float32", exactness.Problem(), fine, fine).exact


def test_a_gpu_gets_every_layout_mask_head_count_and_head_dim():
    every = exactness.problems(quick=False, unit=131)
    assert {(one.layout, one.mask) for one in every} >= {(a, b) for a in exactness.LAYOUTS for b in exactness.MASKS}
    assert {(one.heads, one.dims) for one in every} >= {(a, b) for a in exactness.HEADS for b in exactness.DIMS}
    assert {one.transport for one in every} == {"ring", *exactness.TRANSPORTS} and any(one.softcap for one in every)
    assert len(set(every)) == len(every) >= 50


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "speed"], "--only speed is not known. Choose from exactness, trainer, benchmark."),
        ([], "PyTorch finds no GPU here. Add --emulate to run everything on the CPU"),
    ],
)
def test_what_cannot_run_is_refused(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*words, "--output", str(tmp_path / "nothing")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "nothing").exists()
