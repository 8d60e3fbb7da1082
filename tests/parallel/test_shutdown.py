"""The end of a process: groups are destroyed in order and threads let go of tensors, also after failures, in bounded
time; and no exchange leaves its works behind."""

import gc
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from ring_hf.parallel import forget_group, transport, warm_up
from tests.parallel.cases import Case, ring_result
from tests.support.harness import ROOT, run_distributed

OURS = "['ring_hf between inner rings', 'ring_hf ring', 'default']"
# Generous, since tests share their processors; the collectives of these processes would wait for 60 s.
SOON = 20.0
linux = pytest.mark.skipif(sys.platform != "linux", reason="threads are counted and starved through Linux")
# Before torch 2.11 the threads of gloo have no names, so that nothing counts them.
THREADS_HAVE_NAMES = torch.__version__ >= (2, 11)


@dataclass
class Ending:
    """How one process ended: its exit code, its output, and when, by the clock it prints times of."""

    code: int
    output: str
    time: float


def endings(tmp_path, case: str, world_size: int = 1) -> list[Ending]:
    """What became of the ranks of a case of `endings.py`, the last rank first; the others are killed if they do not
    end soon after it."""
    script, store = str(ROOT / "tests/parallel/endings.py"), str(tmp_path / f"store {time.monotonic()}")
    processes = [
        subprocess.Popen(
            [sys.executable, script, case, str(rank), str(world_size), store],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    results, timeout = [], 120.0
    for process in reversed(processes):
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        output = re.sub(r"^\[Gloo\] Rank .*\n", "", output, flags=re.MULTILINE)  # torch 2.9 prints it
        results.append(Ending(process.returncode, output, time.monotonic()))
        timeout = SOON
    return results


def ending(tmp_path, case: str) -> Ending:
    (result,) = endings(tmp_path, case)
    return result


def without_count(state: str) -> str:
    """Return a line of `endings.report` as torch's version prints it: 0 workers where threads have no names."""
    return state if THREADS_HAVE_NAMES else re.sub(r"workers=\d+", "workers=0", state)


@linux
@pytest.mark.skipif(not THREADS_HAVE_NAMES, reason="starves threads by their name, which torch gives since 2.11")
def test_threads_that_still_hold_tensors_end_before_the_interpreter(tmp_path):
    """Starved threads hold the last references to tensors: of groups that are destructed, of groups that the script
    holds to the end. (`scripts/soak_exit.py` does it many times.)"""
    without = [ending(tmp_path, "starves without the hook").code]
    while without[-1] == 0 and len(without) < 5:  # it hardly ever does
        without.append(ending(tmp_path, "starves without the hook").code)
    if without[-1] == 0:
        pytest.skip("torch no longer aborts without the hook, so that these cases show nothing")
    assert without[-1] == -signal.SIGABRT
    for case, num_workers in (("starves", 0), ("starves and holds", 34)):
        result = ending(tmp_path, case)
        assert result.code == 0, result.output
        assert f"initialized=False workers={num_workers} " in result.output


@linux
def test_groups_end_once_the_latest_first_and_the_default_one_last(tmp_path):
    result = ending(tmp_path, "ends twice")
    assert result.code == 0 and result.output == f"initialized=False workers=0 destroyed={OURS}\n", result.output


@linux
@pytest.mark.parametrize(
    ("case", "state"),
    {
        "destroys at exit": "initialized=False workers=0 destroyed=['default']",
        "has destroyed": "initialized=False workers=0 destroyed=['default']",
        "has joined again": "initialized=True workers=2 destroyed=['default']",  # it has registered no group since
        "is a stranger": "initialized=True workers=2 destroyed=[]",
    }.items(),
)
def test_what_the_script_has_destroyed_or_not_registered_is_left_alone(tmp_path, case, state):
    result = ending(tmp_path, case)
    assert result.code == 0 and result.output.strip() == without_count(state), result.output


@linux
def test_only_the_process_that_registered_a_group_ends_it(tmp_path):
    """A forked process leaves its parent's groups alone, which work on; groups that it makes itself end with it."""
    parent = ending(tmp_path, "forks")
    lines = [
        "child: initialized=True destroyed=[]",
        "initialized=False workers=0 destroyed=['ring_hf ring', 'default']",
    ]
    assert parent.code == 0 and parent.output.splitlines() == lines, parent.output
    child = ending(tmp_path, "forks first")
    lines = [f"child: {lines[1]}", "initialized=False workers=0 destroyed=[]"]
    assert child.code == 0 and child.output.splitlines() == lines, child.output


@linux
def test_a_rank_that_fails_during_a_collective_exits_at_once_and_so_do_its_peers(tmp_path):
    failed, peer = endings(tmp_path, "raises", world_size=2)
    assert failed.code == 1 and "ValueError: rank 1 has failed" in failed.output, failed.output
    assert peer.code == 1 and "by peer" in peer.output, peer.output
    began = time_of_end(failed)
    assert failed.time - began < SOON and peer.time - began < SOON


@linux
def test_an_exit_waits_for_a_collective_that_no_peer_joins_only_so_long(tmp_path):
    result, _ = endings(tmp_path, "in flight", world_size=2)
    assert result.code == 0, result.output
    assert "rank 1: the process groups did not end within 1 s" in result.output
    assert 1 <= result.time - time_of_end(result) < SOON


def time_of_end(result: Ending) -> float:
    (line,) = (line for line in result.output.splitlines() if line.startswith("ends at"))
    return float(line.removeprefix("ends at "))


CASES = {
    "ring": Case("zigzag", 4, units=1),
    "no overlap": Case("zigzag", 4, units=1, overlap=False),
    "double ring": Case("zigzag", 4, units=1, transport="double_ring", inner=2),
    "all_gather": Case("zigzag", 4, units=1, transport="allgather"),
    "direct": Case("zigzag", 4, units=1, transport="direct"),
    "ulysses": Case("zigzag", 4, units=1, ulysses=2),
}


def works_left(rank: int, world_size: int, case: Case) -> tuple[int, int, int]:
    """Works that were posted in a warm-up and a pass, waited for, and still alive when their exchange was done."""
    posted: list[weakref.ref] = []
    waited, left = [], []
    originals = {name: getattr(dist, name) for name in ("batch_isend_irecv", "all_to_all_single")}
    gather, scatter, wait = transport._all_gather, transport._reduce_scatter, transport.PendingExchange.wait

    def recorded(post):
        def record(*args, **kwargs):
            result = post(*args, **kwargs)
            works = result if isinstance(result, list) else [] if result is None else [result]
            posted.extend(map(weakref.ref, works))
            return result

        return record

    def wait_and_look(exchange, *args):
        works = [weakref.ref(work) for work in exchange._works]
        wait(exchange, *args)
        waited.extend(works)
        left.extend(work for work in works if work() is not None)

    forget_group(dist.group.WORLD)
    gc.disable()  # what a cycle holds counts as left
    try:
        with (
            mock.patch.multiple(dist, **{name: recorded(post) for name, post in originals.items()}),
            mock.patch.multiple(transport, _all_gather=recorded(gather), _reduce_scatter=recorded(scatter)),
            mock.patch.object(transport.PendingExchange, "wait", wait_and_look),
        ):
            warm_up(dist.group.WORLD, torch.device("cpu"), case.ulysses, case.inner)
            ring_result(rank, case)
        left.extend(work for work in posted if work() is not None)
    finally:
        gc.enable()
    trades = case.ulysses > 1  # the exchange of heads in a warm-up has no Exchange
    return len(posted), len(waited) + trades, len(left)


@pytest.mark.parametrize("name", CASES)
def test_no_work_outlives_its_exchange(name):
    for posted, waited, left in run_distributed(4, works_left, CASES[name]):
        assert posted == waited > 0 and left == 0
