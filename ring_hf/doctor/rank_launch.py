"""The processes that measure: doctor's own, one per GPU or a few on a CPU, or those that a launcher has started.

A rank that hangs must not leave the user in front of a silent terminal: every rank says what it is about to do, and
when time is up the last words of each are in the message.
"""

import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

CHECKS = {
    "cuda": "Set NCCL_DEBUG=INFO and look for the interface and the transport it chooses; try NCCL_P2P_DISABLE=1 "
    "(a wrong ACS or IOMMU setting stops GPUs from reaching each other) and NCCL_SOCKET_IFNAME (several networks); "
    "see with nvidia-smi whether another process holds a GPU.",
    "cpu": "Check that the host name resolves (set GLOO_SOCKET_IFNAME=lo on one machine), that no firewall "
    "stands between the ranks, and that there is memory for all of them.",
}


@dataclass(frozen=True)
class Job:
    """What every rank measures: which attention, at which lengths, and which messages."""

    device: str
    dtype: str
    heads: tuple[int, int, int, int]  # query heads, key/value heads, head dim of both, of the values
    softcap: float | None
    lengths: tuple[int, ...]
    messages: tuple[int, ...]
    repeats: int
    seconds: float  # until a rank that does not answer is given up


MEETING = "meeting the other ranks"
ATTENDING = "measuring attention"


def hint(device: str, words: str) -> str:
    """What to check after a failure at these words."""
    if words.startswith(ATTENDING):
        return "The kernel itself fails here: see the section on kernels, and try another dtype or version."
    return CHECKS[device]


Work = Callable[[int, int, Job, str | None, Callable[[str], None]], Any]


class RankTimeout(RuntimeError):
    """A rank failed or did not come back."""


def under_launcher() -> bool:
    """Whether torchrun or `accelerate launch` has started several processes."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def run_here(work: Work, job: Job) -> Any:
    """This process's part, as one of a launcher's ranks; a hang ends the process with a message."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    words = ["starting"]

    def give_up() -> None:
        message = f"rank {rank} of {size} waited {job.seconds:g} s, {words[-1]}. {hint(job.device, words[-1])}"
        sys.stderr.write(f"ring-hf doctor: {message}\n")
        sys.stderr.flush()
        os._exit(1)  # the rank hangs inside a collective, which no exception reaches

    timer = threading.Timer(job.seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        return work(rank, size, job, None, words.append)
    except RuntimeError as error:
        raise RankTimeout(
            f"rank {rank} of {size} failed, {words[-1]}: {error}. {hint(job.device, words[-1])}"
        ) from error
    finally:
        timer.cancel()


def run_ranks(work: Work, size: int, job: Job) -> list[Any]:
    """Starts `size` processes and returns what `work` returned in each, in rank order.

    Raises:
        Unanswered: if one fails or does not answer in time; with the last words of every rank.
    """
    context = multiprocessing.get_context("spawn")
    folder = tempfile.TemporaryDirectory(prefix="ring-hf-doctor-")
    pipes, processes = [], []
    threads = max(1, (os.cpu_count() or 1) // size)
    for rank in range(size):
        ours, theirs = context.Pipe()
        arguments = (work, rank, size, job, str(Path(folder.name) / "store"), threads, theirs)
        processes.append(context.Process(target=_rank, args=arguments, daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        return _listen(pipes, job)
    finally:
        for process in processes:
            process.join(0.5)
            process.kill()
            process.join()
        folder.cleanup()


def _listen(pipes: list[Connection], job: Job) -> list[Any]:
    words = dict.fromkeys(range(len(pipes)), "starting")
    results: dict[int, Any] = {}
    deadline = time.monotonic() + job.seconds
    while len(results) < len(pipes):
        open_pipes = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(open_pipes, max(0.0, deadline - time.monotonic()))
        if not ready:
            seen = "; ".join(f"rank {rank} was {words[rank]}" for rank in words if rank not in results)
            raise RankTimeout(f"no answer in {job.seconds:g} s: {seen}. {CHECKS[job.device]}")
        for rank, pipe in enumerate(pipes):
            if pipe not in ready:
                continue
            try:
                kind, value = pipe.recv()
            except EOFError:
                kind, value = "failed", "the process ended"
            if kind == "failed":
                raise RankTimeout(f"rank {rank} failed, {words[rank]}: {value}. {hint(job.device, words[rank])}")
            if kind == "done":
                results[rank] = value
            else:
                words[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank(work: Work, rank: int, size: int, job: Job, store: str, threads: int, pipe: Connection) -> None:
    import torch

    if job.device == "cpu":
        torch.set_num_threads(threads)
    try:
        pipe.send(("done", work(rank, size, job, store, lambda words: pipe.send(("says", words)))))
    except Exception as error:
        pipe.send(("failed", f"{type(error).__name__}: {error}"))
