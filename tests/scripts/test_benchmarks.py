"""The benchmarks run, at sizes that say nothing: which rows and files there are, never how long they took."""

import json
import math
import os
import sys

import pytest
from PIL import Image

from ring_hf.cli import main
from ring_hf.simulate import bench_command
from tests.support.harness import ROOT, load_script, run_command

BENCH_LENGTHS = load_script("bench_lengths")
COMMAND = [sys.executable, "-m", "ring_hf.cli", "bench"]


def script(name):
    """What the command starts, without importing the package twice."""
    return [sys.executable, f"scripts/bench_{name}.py"]


SMALL = ["--heads", "2", "--kv-heads", "1", "--head-dim", "8", "--repeats", "1"]
# Two minutes of processes that import and measure; the benchmarks that run by default start in the same way.
IN_ALL_CASES = pytest.mark.skipif("RING_HF_ALL_CASES" not in os.environ, reason="runs with RING_HF_ALL_CASES=1")


def test_every_benchmark_has_a_name():
    scripts = {path.name for path in ROOT.glob("scripts/bench_*.py")} - {"bench_harness.py"}
    assert {f"bench_{name}.py" for name in bench_command.BENCHMARKS} == scripts


def test_growing_lengths_give_a_table_exponents_and_a_picture(tmp_path):
    lengths = ["--lengths", "64", "128", "--fit", "2"]
    done = run_command([*COMMAND, "lengths", *lengths, *SMALL, "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "lengths.json").read_text())["rows"]
    assert [(row["length"], row["variant"]) for row in rows] == [
        (length, name)
        for length in (64, 128)
        for name in ("sdpa, 1 process", "ring, 2 processes", "textbook, 1 process")
    ]
    assert all(row["total"] > row["forward"] > 0 and row["memory"] >= row["forward_memory"] for row in rows)
    assert "| float32 | ring, 2 processes | 64 to 128 |" in done.stdout
    assert (tmp_path / "lengths.md").read_text() in done.stdout
    assert "command bench_lengths.py --lengths 64 128" in done.stdout and str(tmp_path) not in done.stdout
    assert Image.open(tmp_path / "lengths-float32.png").size == (1320, 960)


def test_exponents_are_slopes_in_log_log():
    rows = [
        {"dtype": "float32", "variant": "x", "length": n, "forward": 3 * n**2, "total": n, "forward_memory": n**1.5}
        for n in (64, 128, 256, 512)
    ]
    (result,) = BENCH_LENGTHS.exponents([{**row, "memory": 7} for row in rows], fit=3)
    assert (result["from"], result["to"]) == (128, 512)
    assert [round(result[key], 9) for key in BENCH_LENGTHS.FIGURES] == [2, 1, 1.5, 0]
    assert math.isclose(result["forward"], 2)


def test_a_variant_that_fits_at_one_length_has_no_exponent(tmp_path):
    figures = dict.fromkeys(BENCH_LENGTHS.FIGURES, 1.0)
    rows = [
        {"dtype": "float32", "variant": variant, "length": length, **figures}
        for length in (64, 128)
        for variant in (BENCH_LENGTHS.SDPA, BENCH_LENGTHS.RING, BENCH_LENGTHS.STANDARD)
    ][:-1]
    result = BENCH_LENGTHS.exponents(rows, fit=3)
    assert [row["variant"] for row in result] == [BENCH_LENGTHS.SDPA, BENCH_LENGTHS.RING]
    BENCH_LENGTHS.plot(rows, result, tmp_path / "lengths.png")
    assert Image.open(tmp_path / "lengths-float32.png").size == (1320, 960)


@IN_ALL_CASES
def test_what_needs_no_package_is_compared_with_fp64_before_it_is_timed(tmp_path):
    names = ["ring", "torch-ring", "sdpa, 1 process"]
    words = ["--only", *names, "--lengths", "64", *SMALL, "--packages", str(tmp_path / "packages")]
    run_command([*script("peers"), *words, "--output", str(tmp_path)])
    errors = json.loads((tmp_path / "peers.json").read_text())["rows"]["errors"]
    assert [(row["variant"], row["kv_heads"]) for row in errors] == [
        (name, heads) for name in names for heads in (1, 2)
    ]
    assert all(row[key] < 2e-6 for row in errors for key in ("out", "dq", "dk", "dv"))


@IN_ALL_CASES
def test_training_steps_are_timed_with_every_option(tmp_path):
    model = ["--layers", "1", "--hidden", "64", "--vocabulary", "48"]
    words = ["--lengths", "256", *model, "--repeats", "1", "--checkpointing", "none", "saved"]
    run_command([*script("training"), *words, "--memory-options", "", "ffn+loss", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "training.json").read_text())["rows"]
    result = [(row["processes"], row["checkpointing"], row["memory_options"]) for row in rows]
    assert result == [
        (1, "none", "none"),
        *(
            (2, checkpointing, memory_options)
            for checkpointing in ("none", "saved")
            for memory_options in ("none", "ffn+loss")
        ),
    ]
    assert all(row["seconds"] > 0 and len(row["runs"]) == 1 for row in rows)


@IN_ALL_CASES
def test_the_memory_of_a_step_is_measured_with_every_option(tmp_path):
    cases = ["none", "attention saved, both in blocks"]
    sizes = ["--tokens", "2048", "--vocabulary", "4096", "--hidden", "64", "--layers", "1"]
    run_command([*script("memory"), *sizes, "--cases", *cases, "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert [row["case"] for row in rows] == cases
    assert rows[1]["ratio"] > 1 and rows[1]["difference"] < 1e-4


def test_the_longest_sequence_has_the_loss_of_one_process(tmp_path):
    run_command([*script("longest"), "--length", "512", "--vocabulary", "48", "--output", str(tmp_path)])
    (row,) = json.loads((tmp_path / "longest.json").read_text())["rows"]
    assert row["difference"] <= load_script("bench_longest").BAR and 3 < row["loss"] < 5


@IN_ALL_CASES
def test_checks_are_timed_in_the_steps_they_belong_to(tmp_path):
    sizes = ["--lengths", "64", "--layers", "1", "--hidden", "64", "--vocabulary", "48", "--steps", "3"]
    run_command([*script("checks"), *sizes, "--output", str(tmp_path)])
    (row,) = json.loads((tmp_path / "checks.json").read_text())["rows"]
    assert 0 < row["shortest"] <= row["message"] < row["step"] and row["trial"] > 0


@IN_ALL_CASES
def test_generation_is_measured_against_one_process(tmp_path):
    sizes = ["--lengths", "256", "--new-tokens", "72", "--layers", "2", "--hidden", "64", "--vocabulary", "48"]
    run_command([*script("generation"), *sizes, "--repeats", "1", "--output", str(tmp_path)])
    (row,) = json.loads((tmp_path / "generation.json").read_text())["rows"]
    assert row["calls"] == {"all_gather": 2, "broadcast": 1}
    assert row["bytes_after_prompt"] == [row["bytes_after_prompt_alone"] / 2] * 2
    assert sum(row["bytes_at_end"]) == row["bytes_at_end_alone"]
    assert row["equal_tokens"] > 0 and row["ranks_agree"] and row["token_seconds"] > 0


def test_packages_to_install_are_named_with_their_versions():
    baselines, variants = load_script("baselines").BASELINES, load_script("bench_peers").VARIANTS
    packages = {baselines[variant["baseline"]].package for variant in variants.values()} - {None}
    assert packages == {"ring-attention-pytorch==0.5.20", "axolotl-ringmaster==0.2.7"}


def test_benchmarks_outside_a_checkout_are_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_command, "SCRIPTS", tmp_path)
    assert main(["bench", "peers", "--repeats", "3"]) == 2
    assert "benchmarks are in the repository, not in the installed package. Clone it" in capsys.readouterr().err


def test_a_benchmark_that_fails_fails_the_command(capfd):
    assert main(["bench", "lengths", "--lengths", "64", "64"]) == 1
    assert "growth needs at least two lengths" in capfd.readouterr().err


@pytest.mark.parametrize("words", [["--lengths", "64", "64"], ["--fit", "1"]])
def test_growth_needs_two_lengths(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_lengths.py", *words])
    with pytest.raises(SystemExit, match="growth needs at least two lengths"):
        BENCH_LENGTHS.main()
