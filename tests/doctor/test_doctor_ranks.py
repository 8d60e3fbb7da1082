"""How `ring-hf doctor` ends a measurement in which a rank hangs or fails: with the last status of the rank."""

import os
import threading
from multiprocessing import Pipe

import pytest

from ring_hf.doctor import rank_launch
from ring_hf.doctor.rank_launch import RankJob, RankTimeout

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


def test_a_rank_that_hangs_is_given_up_with_its_last_status():
    pipes = [Pipe() for _ in range(2)]
    pipes[0][1].send(("status", "exchanging 64 bytes with its neighbours"))
    with pytest.raises(RankTimeout) as caught:
        rank_launch._collect([ours for ours, _ in pipes], JOB)
    message = str(caught.value)
    assert "no answer in 0.3 s: rank 0 was exchanging 64 bytes with its neighbours; rank 1 was starting" in message
    assert "GLOO_SOCKET_IFNAME" in message


def test_a_rank_that_fails_or_ends_is_named():
    pipes = [Pipe() for _ in range(2)]
    pipes[0][1].send(("done", 7))
    pipes[1][1].send(("failed", "RuntimeError: no route"))
    with pytest.raises(RankTimeout, match="rank 1 failed, starting: RuntimeError: no route"):
        rank_launch._collect([ours for ours, _ in pipes], JOB)
    pipes = [Pipe() for _ in range(2)]
    pipes[0][1].close()
    with pytest.raises(RankTimeout, match="rank 0 failed, starting: the process ended"):
        rank_launch._collect([ours for ours, _ in pipes], JOB)


def test_a_kernel_that_fails_is_not_blamed_on_the_links():
    ours, theirs = Pipe()
    theirs.send(("status", f"{rank_launch.TIMING_ATTENTION} over 512 tokens"))
    theirs.send(("failed", "RuntimeError: no kernel image"))
    with pytest.raises(RankTimeout, match=r"over 512 tokens: RuntimeError: no kernel image\. The kernel itself"):
        rank_launch._collect([ours], JOB)


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
