"""The soaks run, go on after an interruption, and detect what they look for."""

import json
import os
import re
import signal
import sys
import time

import pytest

from ring_hf.launcher import end_orphans
from tests.support.harness import ROOT, load_script, run_command, run_distributed

sys.path.insert(0, str(ROOT / "scripts"))  # scripts import their neighbours
SOAK_TRAINING, SOAK_EXIT = load_script("soak_training"), load_script("soak_exit")
FORKED_LAUNCH = load_script("forked_launch")
IN_ALL_CASES = pytest.mark.skipif("RING_HF_ALL_CASES" not in os.environ, reason="runs with RING_HF_ALL_CASES=1")


def take_steps(rank, world_size, num_steps):
    soak = load_script("soak_training")
    soak._trainee = soak.Trainee(rank)
    try:
        return [soak.train_step(rank, step, 0, 64) for step in range(1, num_steps + 1)]
    finally:
        soak.context.reset()
        soak.exact_evaluation.activate(None)


def test_20_random_steps_have_the_losses_of_one_process():
    drawn = [SOAK_TRAINING.draw(step, 0, 64) for step in range(1, 21)]
    assert {step["cp"] for step in drawn} == {2, 4} and {step["packing"] for step in drawn} == {True, False}
    results = run_distributed(4, take_steps, 20)
    for steps in results:
        assert max(abs(step["loss"] - step["reference"]) for step in steps) <= 1e-9
        assert len({step["loss"] for step in steps}) == 20
    worst = max(abs(step["loss"] - step["reference"]) for steps in results for step in steps)
    print(f"20 steps: worst difference {worst:.1e}")


@IN_ALL_CASES
def test_the_soak_goes_on_after_an_interruption(tmp_path):
    output = tmp_path / "soak.jsonl"
    options = ["--max-length", "64", "--output", str(output)]
    run_command([sys.executable, "scripts/soak_training.py", "--steps", "3", *options])
    first = output.read_text()
    (tmp_path / "soak.weights").mkdir(exist_ok=True)
    done = run_command([sys.executable, "scripts/soak_training.py", "--steps", "6", *options])
    assert [row["step"] for row in SOAK_TRAINING.read(output)] == list(range(1, 7)) and first
    assert "all losses are those of one process" in done.stdout and not output.with_suffix(".weights").exists()


def test_steps_cover_every_layout_and_algorithm():
    steps = [SOAK_TRAINING.draw(step, 0, 256) for step in range(1, 1001)]
    assert {step["layout"] for step in steps} == {"ulysses", *(f"ring_{name}" for name in SOAK_TRAINING.LAYOUTS)}
    names = ("transport", "inner_ring_size", "ulysses_size", "head_chunks")
    drawn = {(step["cp"], *(step[name] for name in names)) for step in steps}
    assert drawn == {(cp, *rest) for cp, algorithms in SOAK_TRAINING.ALGORITHMS.items() for rest in algorithms}
    assert all(len(step["lengths"]) % (4 // step["cp"]) == 0 for step in steps)


@pytest.mark.parametrize("name", SOAK_TRAINING.MEASURES)
def test_growth_is_detected(name):
    row = {measure: [100, 100] for measure in SOAK_TRAINING.MEASURES}
    rows = [{"step": step, "started": 0, **row} for step in range(1, 301)]
    assert SOAK_TRAINING.find_growth(rows) == []
    rows[-1] = {**rows[-1], name: [100, 100 + SOAK_TRAINING.GROWTH[name] + 1]}
    (problem,) = SOAK_TRAINING.find_growth(rows)
    assert problem.startswith(f"{name} grew by")


RIGHT = {"code": 0, "ranks": [], "aborted": False, "warned": False, "orphans": 0, "saved": True, "ending": "save"}


@pytest.mark.parametrize(
    ("changes", "is_right"),
    [
        ({}, True),
        ({"code": 1}, False),
        ({"code": "timeout"}, False),
        ({"aborted": True}, False),
        ({"warned": True}, False),
        ({"orphans": 1}, False),
        ({"saved": False}, False),
        ({"ending": "end", "saved": False}, True),
        ({"ending": "raise", "saved": False}, False),
        ({"ending": "raise", "saved": False, "code": 1}, True),
        ({"ending": "interrupt", "saved": False, "code": "timeout"}, False),
    ],
)
def test_ends_are_right_or_wrong(changes, is_right):
    assert SOAK_EXIT.is_right({**RIGHT, **changes}) is is_right


RANK = """
import os, sys, time, torch.distributed as dist
dist.init_process_group("gloo")
rank, ending = dist.get_rank(), sys.argv[1]
class Last:
    rank = rank
    def __del__(self): print(f"rank {self.rank} shut down", flush=True)
last = Last()
if ending == "fail":
    sys.exit(3) if rank == 1 else time.sleep(60)
if ending == "interrupt":
    print("started", flush=True)
    time.sleep(60)
if ending == "orphan" and os.fork() == 0:
    time.sleep(60)
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("ending", "expected_code", "rank_codes", "num_orphans"),
    [
        ("end", 0, [], 0),
        ("fail", 1, ["-15", "3"], 0),
        ("interrupt", 1, ["-2", "-2"], 0),
        ("orphan", 0, [], 2),
    ],
)
def test_forked_ranks_end_as_those_of_torchrun(
    forked_launches, ending, expected_code, rank_codes, num_orphans, tmp_path
):
    script, log = tmp_path / "rank.py", tmp_path / "output.log"
    script.write_text(RANK)
    launch = forked_launches.start([str(script), ending], 2, {}, log)
    if ending == "interrupt":
        while SOAK_EXIT.read_log(log).count("started") < 2:
            time.sleep(0.1)
        launch.send_signal(signal.SIGINT)
    assert launch.wait(60) == expected_code
    output = log.read_text()
    assert re.findall(r"exitcode  : (\S+)", output) == rank_codes
    shut_down = {rank for rank in (0, 1) if f"rank {rank} shut down" in output}
    assert shut_down == ({1} if ending == "fail" else {0, 1})
    assert end_orphans(str(tmp_path), [launch.pid], patience=5) == num_orphans


@pytest.fixture(scope="module")
def forked_launches():
    with FORKED_LAUNCH.ForkedLaunches() as launches:
        yield launches


@IN_ALL_CASES
@pytest.mark.parametrize("engine", SOAK_EXIT.ENGINES)
@pytest.mark.parametrize("ending", SOAK_EXIT.ENDINGS)
def test_every_ending_is_clean_on_every_engine(engine, ending, tmp_path):
    output = tmp_path / "exit.jsonl"
    command = [sys.executable, "scripts/soak_exit.py", "--runs", "1", "--cases", "cp2", "--load", "0"]
    run_command([*command, "--engines", engine, "--endings", ending, "--output", str(output)])
    (row,) = map(json.loads, output.read_text().splitlines())
    assert SOAK_EXIT.is_right(row)
