"""A pool of workers names the rank that fails, dies or does not answer, with its last status."""

import os
import time
from multiprocessing import Pipe

import pytest

from ring_hf.launcher import WorkerError, WorkerPool, WorkerTimeout, receive_results, report_status

PATIENCE = 120.0  # seconds in which a worker starts on a busy machine


def prepare(rank, fault):
    if fault == "in initialize":
        raise OSError("no device")


def follow(rank, fault):
    report_status(f"about to {fault}")
    if rank == 1 and fault == "raise":
        raise RuntimeError("no route")
    if rank == 1 and fault == "die":
        os._exit(3)
    return rank


@pytest.fixture
def pool():
    pool = WorkerPool(2, prepare, (None,))
    yield pool
    pool.stop()


def test_results_are_in_the_order_of_ranks(pool):
    assert pool.run(follow, "return", timeout=PATIENCE) == [0, 1]
    assert pool.run(follow, "return", ranks=[1], timeout=PATIENCE) == [1]


@pytest.mark.parametrize(("fault", "reason"), [("raise", "RuntimeError: no route"), ("die", "the process ended")])
def test_a_worker_that_fails_is_named_with_its_status(pool, fault, reason):
    with pytest.raises(WorkerError) as caught:
        pool.run(follow, fault, timeout=PATIENCE)
    assert (caught.value.rank, caught.value.status, caught.value.reason) == (1, f"about to {fault}", reason)


def test_a_worker_that_cannot_start_is_named():
    pool = WorkerPool(1, prepare, ("in initialize",))
    try:
        with pytest.raises(WorkerError) as caught:
            pool.run(follow, "return", timeout=PATIENCE)
    finally:
        pool.stop()
    assert (caught.value.status, caught.value.reason) == ("starting", "OSError: no device")


def test_silent_workers_are_named_with_their_statuses():
    pipes = [Pipe() for _ in range(3)]
    pipes[0][1].send(("status", "exchanging 64 bytes"))
    pipes[1][1].send(("done", 7))
    with pytest.raises(WorkerTimeout) as caught:
        receive_results([ours for ours, _ in pipes], range(3), 3, follow, 0.2)
    assert caught.value.statuses == {0: "exchanging 64 bytes", 2: "starting"}


def test_stopped_workers_are_gone(pool):
    started = time.monotonic()
    pool.stop()
    assert time.monotonic() - started < PATIENCE
    assert not any(process.is_alive() for process in pool.processes)
