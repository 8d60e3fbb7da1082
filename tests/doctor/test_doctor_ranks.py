"""How `ring-hf doctor` ends a measurement in which a rank hangs or fails: with the last status of the rank."""

import os
import threading

import pytest

from ring_hf.doctor import rank_launch
from ring_hf.doctor.rank_launch import RankJob, RankTimeout
from ring_hf.launcher import WorkerError, WorkerTimeout

JOB = RankJob(
    device="cpu",
    dtype="float32",
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    v_head_dim=8,
    softcap=None,
    lengths=(64,),
    message_sizes=(1,),
    repeats=1,
    timeout=0.3,
)


@pytest.fixture
def failing_pool(monkeypatch):
    """Let a pool start no process and end with an error; what ends real ones is tested in test_harness.py."""

    def install(error):
        def run(self, *arguments, timeout):
            raise error

        monkeypatch.setattr(rank_launch.WorkerPool, "__init__", lambda self, *arguments: None)
        monkeypatch.setattr(rank_launch.WorkerPool, "run", run)
        monkeypatch.setattr(rank_launch.WorkerPool, "stop", lambda self, patience: None)

    return install


def test_a_rank_that_hangs_is_given_up_with_its_last_status(failing_pool):
    statuses = {0: "exchanging 64 bytes with its neighbours", 1: "starting"}
    failing_pool(WorkerTimeout("run_rank", statuses, JOB.timeout))
    with pytest.raises(RankTimeout) as caught:
        rank_launch.launch_ranks(len, 2, JOB)
    message = str(caught.value)
    assert "no answer in 0.3 s: rank 0 was exchanging 64 bytes with its neighbours; rank 1 was starting" in message
    assert "GLOO_SOCKET_IFNAME" in message


def test_a_rank_that_fails_is_named(failing_pool):
    failing_pool(WorkerError(1, 2, "starting", "RuntimeError: no route", "its traceback"))
    with pytest.raises(RankTimeout, match="rank 1 failed, starting: RuntimeError: no route"):
        rank_launch.launch_ranks(len, 2, JOB)


def test_a_kernel_that_fails_is_not_blamed_on_the_links(failing_pool):
    status = f"{rank_launch.TIMING_ATTENTION} over 512 tokens"
    failing_pool(WorkerError(0, 1, status, "RuntimeError: no kernel image", "its traceback"))
    with pytest.raises(RankTimeout, match=r"over 512 tokens: RuntimeError: no kernel image\. The kernel itself"):
        rank_launch.launch_ranks(len, 1, JOB)


def test_a_rank_of_a_launcher_that_hangs_ends_with_a_message(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    exited = threading.Event()
    exit_codes = []
    monkeypatch.setattr(os, "_exit", lambda code: (exit_codes.append(code), exited.set()))
    assert rank_launch.is_under_launcher()

    def hang(rank, size, job, store, report_status):
        report_status("meeting the other ranks")
        assert exited.wait(20)

    rank_launch.run_launched_rank(hang, JOB)
    assert exit_codes == [1]
    message = capsys.readouterr().err
    assert "ring-hf doctor: rank 1 of 2 waited 0.3 s, meeting the other ranks. Check that the host name" in message


def test_a_rank_of_a_launcher_that_fails_reports_its_status(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")

    def fail(rank, size, job, store, report_status):
        report_status("meeting the other ranks")
        raise RuntimeError("connection refused")

    with pytest.raises(RankTimeout, match="rank 0 of 2 failed, meeting the other ranks: connection refused"):
        rank_launch.run_launched_rank(fail, JOB)
