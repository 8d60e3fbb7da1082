"""How `ring-hf doctor` ends a measurement in which a rank hangs or fails: with its last words, on one line."""

import os
import threading
from multiprocessing import Pipe

import pytest

from ring_hf.doctor import rank_launch

JOB = rank_launch.Job("cpu", "float32", (1, 1, 8, 8), None, (64,), (1,), 1, 0.3)


def test_a_rank_that_hangs_is_given_up_with_its_last_words():
    pipes = [Pipe() for _ in range(2)]
    pipes[0][1].send(("says", "exchanging 64 bytes with its neighbours"))
    with pytest.raises(rank_launch.RankTimeout) as caught:
        rank_launch._listen([ours for ours, _ in pipes], JOB)
    said = str(caught.value)
    assert "no answer in 0.3 s: rank 0 was exchanging 64 bytes with its neighbours; rank 1 was starting" in said
    assert "GLOO_SOCKET_IFNAME" in said


def test_a_rank_that_fails_or_ends_is_named():
    pipes = [Pipe() for _ in range(2)]
    pipes[0][1].send(("done", 7))
    pipes[1][1].send(("failed", "RuntimeError: no route"))
    with pytest.raises(rank_launch.RankTimeout, match="rank 1 failed, starting: RuntimeError: no route"):
        rank_launch._listen([ours for ours, _ in pipes], JOB)
    pipes = [Pipe() for _ in range(2)]
    pipes[0][1].close()
    with pytest.raises(rank_launch.RankTimeout, match="rank 0 failed, starting: the process ended"):
        rank_launch._listen([ours for ours, _ in pipes], JOB)


def test_a_kernel_that_fails_is_not_blamed_on_the_links():
    ours, theirs = Pipe()
    theirs.send(("says", f"{rank_launch.ATTENDING} over 512 tokens"))
    theirs.send(("failed", "RuntimeError: no kernel image"))
    with pytest.raises(
        rank_launch.RankTimeout, match=r"over 512 tokens: RuntimeError: no kernel image\. The kernel itself"
    ):
        rank_launch._listen([ours], JOB)


def test_a_rank_of_a_launcher_that_hangs_ends_with_a_message(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = threading.Event()
    codes = []
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), ended.set()))
    assert rank_launch.under_launcher()

    def hang(rank, size, job, store, say):
        say("meeting the other ranks")
        assert ended.wait(20)

    rank_launch.run_here(hang, JOB)
    assert codes == [1]
    said = capsys.readouterr().err
    assert "ring-hf doctor: rank 1 of 2 waited 0.3 s, meeting the other ranks. Check that the host name" in said


def test_a_rank_of_a_launcher_that_fails_says_where(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")

    def fail(rank, size, job, store, say):
        say("meeting the other ranks")
        raise RuntimeError("connection refused")

    with pytest.raises(
        rank_launch.RankTimeout, match="rank 0 of 2 failed, meeting the other ranks: connection refused"
    ):
        rank_launch.run_here(fail, JOB)
