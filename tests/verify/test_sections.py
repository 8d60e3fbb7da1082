"""`ring-hf verify` and `scripts/gpu_check.py` on a CPU: every section runs, is written, is resumed, and can fail."""

import contextlib
import json
import re
import shlex
import sys
from dataclasses import replace

import pytest
import torch

from ring_hf import cli
from ring_hf.kernels import KERNELS, merge
from ring_hf.verify import attention_timing, exactness, ring_emulation, single_device, trajectories, verify_report
from ring_hf.verify.verify_command import SECTIONS
from tests.support import aten_stand_ins, flash_stand_ins
from tests.support.harness import ROOT, load_script, run_command

GPU_CHECK = load_script("gpu_check")
PAGE = (ROOT / "docs" / "check_your_machine.md").read_text()
(COMMAND,) = re.findall(r"^ring-hf (verify .*)$", PAGE, re.MULTILINE)
QUICK = ["--emulate", "--quick"]
STEPS_ROWS = ["agreement", "sdpa, 64 tokens", "ring_zigzag, 64 tokens", "ring_zigzag, memory options, 64 tokens"]
STEPS_ROWS += ["one rank of 8, one layer's attention, 128 tokens", "one rank of 8, 128 tokens"]


def first_columns(text):
    """Return the cells of every row of every table without those that hold a measurement."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [[cell for cell in row if not re.search(r"\d\.\d|ms$", cell)] for row in rows]


def test_everything_runs_on_a_cpu_and_is_written(tmp_path):
    words = shlex.split(COMMAND)
    assert words[1:] == QUICK
    done = run_command([sys.executable, "-m", "ring_hf.cli", *words, "--output", str(tmp_path / "new")])
    text = (tmp_path / "new" / "results.md").read_text()
    assert text in done.stdout
    results = json.loads((tmp_path / "new" / "results.json").read_text())
    sections = results["sections"]
    assert list(sections) == list(SECTIONS) and all(section["ok"] for section in sections.values())
    assert results["about"]["versions"]["torch"] == torch.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", results["about"]["date"])

    rows = sections["exactness"]["rows"]
    assert {(row["kernel"], row["dtype"]) for row in rows} >= {
        (kernel, dtype) for kernel in ("cpu", "reference") for dtype in ("bfloat16", "float32")
    }
    assert len(rows) >= 40 and all(set(row["errors"]) == set(exactness.NAMES) for row in rows)
    left_out = {entry.split(",")[0] for entry in sections["exactness"]["left_out"]}
    assert {row["kernel"] for row in rows} | left_out == set(KERNELS)

    trained = sections["trainer"]
    assert trained["steps"] == 20 == len(trained["plain"]["loss"])
    same = {row["run"]: row["same"] for row in trained["rows"]}
    emulated, processes = "4 ranks emulated, zigzag, fp32", "2 processes, ring_zigzag, fp32"
    assert same == {emulated: True, trajectories.CONTROL: False, processes: True}

    timed = sections["benchmark"]["rows"]
    assert {row["variant"] for row in timed} == {
        "one device, sdpa",
        "one device, cpu",
        *(f"{layout}, {transport}" for layout, transport in attention_timing.RINGS),
    }
    for row in timed:
        flops = 512 * 513 / 2 * 4 * 4 * 64 / row["ranks"]
        assert row["tflops_forward"] == pytest.approx(flops / row["forward"] / 1e12)
        assert row["tflops_both"] == pytest.approx(3.5 * flops / row["both"] / 1e12)
        assert row["sum_both"] >= row["both"] >= row["forward"] > 0

    steps = sections["steps"]
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
    """The CPU kernel with one of its results (by name) wrong by a few percent."""

    NAME = "cpu"

    def __init__(self, wrong_result):
        self.wrong_result, self.right = wrong_result, KERNELS["cpu"]

    def why_unsupported(self, *args):
        return self.right.why_unsupported(*args)

    def forward(self, *args):
        for queries, out, lse in self.right.forward(*args):
            yield (
                queries,
                out * (1.03 if self.wrong_result == "out" else 1),
                lse + (0.03 if self.wrong_result == "lse" else 0),
            )

    def backward(self, *args):
        for queries, keys, *grads in self.right.backward(*args):
            factors = (1.03 if self.wrong_result == name else 1.0 for name in ("dq", "dk", "dv"))
            yield queries, keys, *(grad * factor for grad, factor in zip(grads, factors, strict=True))


@pytest.mark.parametrize("name", exactness.NAMES)
def test_a_wrong_kernel_is_detected(name, monkeypatch):
    monkeypatch.setitem(KERNELS, "cpu", Broken(name))
    problem = exactness.Problem(unit=13)
    rows = exactness.check(problem, torch.device("cpu"), ["cpu", "reference"], ["bfloat16", "float32"])
    assert [(row.kernel, row.exact) for row in rows] == [("cpu", False), ("reference", True)] * 2


def test_a_wrong_kernel_fails_the_command_until_it_is_repaired(tmp_path, monkeypatch, capsys):
    words = [*QUICK, "--only", "exactness", "--output", str(tmp_path)]
    monkeypatch.setattr(exactness, "problems", lambda quick, tiny: [exactness.Problem(unit=13)])
    with monkeypatch.context() as patch:
        patch.setitem(KERNELS, "cpu", Broken("dk"))
        assert GPU_CHECK.main(words) == 1
    output = capsys.readouterr().out
    assert (
        "## exactness: FAILED" in output and f"- cpu, float32, {exactness.Problem(unit=13).describe()}: out " in output
    )
    assert json.loads((tmp_path / "results.json").read_text())["sections"]["exactness"]["ok"] is False
    assert GPU_CHECK.main(words) == 0  # a failed section is repeated
    assert "## exactness: ok" in capsys.readouterr().out
    text = (tmp_path / "results.md").read_text()
    assert GPU_CHECK.main(words) == 0  # a finished section is kept
    assert "exactness: done before, kept (--again repeats it)" in capsys.readouterr().out
    assert (tmp_path / "results.md").read_text() == text


def test_results_go_to_a_folder_that_git_ignores_and_that_is_named(tmp_path, monkeypatch, capsys):
    assert GPU_CHECK.RESULTS == ROOT / "runs" / "gpu_check"
    assert "runs/" in (ROOT / ".gitignore").read_text().splitlines()
    monkeypatch.setattr(GPU_CHECK, "RESULTS", tmp_path)
    monkeypatch.setattr(exactness, "problems", lambda quick, tiny: [exactness.Problem(unit=13)])
    assert GPU_CHECK.main([*QUICK, "--only", "exactness"]) == 0
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
def test_problems_of_a_gpu_run_on_fakes_of_its_kernels(kernel):
    """In fp64, where a fake is exact: the arguments of each kernel fit some problems."""
    num_rows = 0
    for problem in exactness.problems(quick=True, tiny=True):
        with GPU_KERNELS[kernel]() as name:
            assert name == kernel
            rows = list(exactness.check(problem, torch.device("cpu"), [name], ["float64"]))
        for row in rows:
            if isinstance(row, exactness.Row):
                assert row.failure is None and max(row.errors.values()) < 1e-13, row
                num_rows += 1
    assert num_rows >= 6


@contextlib.contextmanager
def broken_ring(mistake_name):
    """One mistake in the code around the kernels."""
    with pytest.MonkeyPatch.context() as patch:
        make_plan, backward, block = (
            ring_emulation.make_plan,
            ring_emulation.ring_backward,
            single_device.Residents.block,
        )

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
            others = [replace(part, rank=(part.rank + 1) % len(self.k)) for part in slices]
            return block(self, tuple(others))

        def summed(out, lse, block_out, block_lse):
            out.add_(block_out)
            torch.logaddexp(lse, block_lse.to(lse.dtype), out=lse)

        def other_lse(dout, q, k, v, out, lse, *rest):
            return backward(dout, q, k, v, out, lse + 0.01, *rest)

        target, name, mistake = {
            "last-step-dropped": (ring_emulation, "make_plan", without_last_step),
            "later-keys-seen": (ring_emulation, "make_plan", with_later_keys),
            "stale-block": (single_device.Residents, "block", other_block),
            "sum-of-softmaxes": (merge, "merge_", summed),
            "other-lse-in-backward": (ring_emulation, "ring_backward", other_lse),
            "gradients-not-sent": (single_device.KVGradients, "send", lambda self, step: None),
        }[mistake_name]
        patch.setattr(target, name, mistake)
        yield


@pytest.mark.parametrize(
    "mistake_name",
    [
        "last-step-dropped",
        "later-keys-seen",
        "stale-block",
        "sum-of-softmaxes",
        "other-lse-in-backward",
        "gradients-not-sent",
    ],
)
def test_a_wrong_ring_is_detected(mistake_name):
    transport = "allgather" if mistake_name == "gradients-not-sent" else "ring"
    problem = exactness.Problem(transport=transport, unit=13)
    with broken_ring(mistake_name):
        rows = list(exactness.check(problem, torch.device("cpu"), ["cpu"], ["bfloat16", "float32"]))
    assert [row.exact for row in rows] == [False, False]


def test_a_kernel_that_raises_is_reported_and_the_others_go_on(monkeypatch):
    class Raising(Broken):
        def forward(self, *args):
            raise RuntimeError("no kernel image is available")

    monkeypatch.setitem(KERNELS, "cpu", Raising(None))
    monkeypatch.setattr(exactness, "problems", lambda quick, tiny: [exactness.Problem(unit=13)])
    section = exactness.run(torch.device("cpu"), True, True, ["auto"], lambda words, total: None)
    assert not section["ok"] and sum(row["exact"] for row in section["rows"]) == 2
    text = "\n".join(verify_report._SECTIONS["exactness"](section))
    assert "8/2 heads x 128, 104 tokens over 4 ranks: RuntimeError: no kernel image is available" in text
    assert "| cpu | bfloat16 | 0 of 1 |" in text


def test_nan_is_not_exact():
    small = dict.fromkeys(exactness.NAMES, 1e-9)
    judged = exactness.judge("cpu", "float32", exactness.Problem(), {**small, "dv": float("nan")}, small)
    assert not judged.exact and exactness.judge("cpu", "float32", exactness.Problem(), small, small).exact


def test_emulated_ranks_train_under_autocast():
    """As on a GPU: queries and keys come out of RoPE in fp32, values in bf16."""
    trajectories.register_emulated("zigzag", 4)
    settings = {"device": "cpu", "steps": 2, "length": 64}
    curves = {name: trajectories.train(name, 1, settings, True) for name in ("sdpa", trajectories.EMULATED)}
    assert trajectories.deviation(curves[trajectories.EMULATED], curves["sdpa"])["loss"] < 1e-3


def test_a_gpu_gets_every_layout_mask_head_count_and_head_dim():
    problems = exactness.problems(quick=False, tiny=False)
    assert {(problem.layout, problem.mask) for problem in problems} >= {
        (a, b) for a in exactness.LAYOUTS for b in exactness.MASKS
    }
    assert {(problem.heads, problem.dims) for problem in problems} >= {
        (a, b) for a in exactness.HEADS for b in exactness.DIMS
    }
    assert {problem.transport for problem in problems} == {"ring", *exactness.TRANSPORTS} and any(
        problem.softcap for problem in problems
    )
    assert {problem.unit % 128 for problem in problems if problem.unit >= 1024} == {
        0,
        1031 % 128,
    }  # cuDNN takes the first alone
    assert len(set(problems)) == len(problems) >= 60


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "speed"], "--only speed is not known. Choose from exactness, trainer, benchmark, steps."),
        (["--kernels", "flash"], "--kernels: kernel='flash' is not known. Choose one of auto, flash_attn, cuda,"),
        ([], "PyTorch finds no GPU here. Add --emulate to run everything on the CPU"),
    ],
)
def test_wrong_options_are_refused(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = [*words, "--output", str(tmp_path / "nothing")]
    assert GPU_CHECK.main(options) == 2
    assert capsys.readouterr().err.startswith(f"gpu_check.py: {message}")
    assert cli.main(["verify", *options]) == 2
    assert capsys.readouterr().err.startswith(f"ring-hf verify: {message}")
    assert not (tmp_path / "nothing").exists()


def test_the_command_writes_below_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exactness, "problems", lambda quick, tiny: [exactness.Problem(unit=13)])
    words = ["verify", *QUICK, "--only", "exactness"]
    assert cli.main(words) == 0
    (path,) = tmp_path.glob("runs/verify/*/results.json")
    assert json.loads(path.read_text())["about"]["command"] == " ".join(["ring-hf", *words])


def test_an_error_in_a_section_is_no_wrong_option(tmp_path, monkeypatch):
    def run(*args):
        raise ValueError("no image")

    monkeypatch.setattr(exactness, "run", run)
    with pytest.raises(RuntimeError, match="section exactness raised ValueError: no image"):
        cli.main(["verify", *QUICK, "--only", "exactness", "--output", str(tmp_path)])
