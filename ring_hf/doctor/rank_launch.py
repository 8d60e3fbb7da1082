"""The processes that measure: doctor's own, one per GPU or a few on a CPU, or the ranks that a launcher has started.

A rank that hangs must not leave the user in front of a silent terminal. Every rank therefore reports its status before
each measurement, and after a timeout the error shows the last status of every rank.
"""

import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..launcher import WorkerError, WorkerPool, WorkerTimeout, report_status

LINK_CHECKS = {
    "cuda": "Set NCCL_DEBUG=INFO and look for the interface and the transport it chooses; try NCCL_P2P_DISABLE=1 "
    "(a wrong ACS or IOMMU setting stops GPUs from reaching each other) and NCCL_SOCKET_IFNAME (several networks); "
    "check with nvidia-smi whether another process uses a GPU.",
    "cpu": "Check that the host name resolves (set GLOO_SOCKET_IFNAME=lo on one machine), that no firewall "
    "blocks the ranks, and that there is memory for all of them.",
}
STARTING = "starting"
RENDEZVOUS = "meeting the other ranks"
TIMING_ATTENTION = "measuring attention"


@dataclass(frozen=True)
class RankJob:
    """The measurements of every rank.

    Attributes:
        device: "cpu" or "cuda".
        dtype: name of a torch dtype.
        head_dim, v_head_dim: head dims of queries and keys, and of values.
        lengths: sequence lengths in tokens at which attention is timed, in ascending order.
        message_sizes: bytes of the messages with which links are timed.
        repeats: timed exchanges per message size.
        timeout: seconds until a rank that does not answer is given up.
    """

    device: str
    dtype: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    softcap: float | None
    lengths: tuple[int, ...]
    message_sizes: tuple[int, ...]
    repeats: int
    timeout: float


# (rank, number of ranks, job, file for the rendezvous or None under a launcher, report_status) -> result
RankFunction = Callable[[int, int, RankJob, str | None, Callable[[str], None]], Any]


class RankTimeout(RuntimeError):
    """A rank failed or did not answer in time."""


def suggest_check(device: str, status: str) -> str:
    """Return what to check if a rank on this kind of device failed with this last status."""
    if status.startswith(TIMING_ATTENTION):
        return "The kernel itself fails here: see the section on kernels, and try another dtype or version."
    return LINK_CHECKS[device]


def is_under_launcher() -> bool:
    """Return whether torchrun or `accelerate launch` has started several processes."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def run_launched_rank(function: RankFunction, job: RankJob) -> Any:
    """Run `function` in this process, one of a launcher's ranks; after a timeout, print a message and exit.

    Raises:
        RankTimeout: if `function` raises a `RuntimeError`; the message has this rank's last status.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    statuses = [STARTING]

    def give_up() -> None:
        status = statuses[-1]
        message = f"rank {rank} of {size} waited {job.timeout:g} s, {status}. {suggest_check(job.device, status)}"
        sys.stderr.write(f"ring-hf doctor: {message}\n")
        sys.stderr.flush()
        os._exit(1)  # the rank hangs inside a collective, which no exception reaches

    timer = threading.Timer(job.timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        return function(rank, size, job, None, statuses.append)
    except RuntimeError as error:
        status = statuses[-1]
        raise RankTimeout(
            f"rank {rank} of {size} failed, {status}: {error}. {suggest_check(job.device, status)}"
        ) from error
    finally:
        timer.cancel()


def launch_ranks(function: RankFunction, size: int, job: RankJob) -> list[Any]:
    """Start `size` processes and return the result of `function` in each, in rank order.

    Raises:
        RankTimeout: if a rank fails or does not answer in time; the message has the last status of every such rank.
    """
    num_threads = max(1, (os.cpu_count() or 1) // size) if job.device == "cpu" else None
    # Started from nothing: a forked process could not use CUDA if this one has.
    pool = WorkerPool(size, set_num_threads, (num_threads,), multiprocessing.get_context("spawn"))
    try:
        with tempfile.TemporaryDirectory(prefix="ring-hf-doctor-") as folder:
            return pool.run(run_rank, function, size, job, str(Path(folder) / "store"), timeout=job.timeout)
    except WorkerError as error:
        raise RankTimeout(
            f"rank {error.rank} failed, {error.status}: {error.reason}. {suggest_check(job.device, error.status)}"
        ) from error
    except WorkerTimeout as error:
        unfinished = "; ".join(f"rank {rank} was {status}" for rank, status in error.statuses.items())
        raise RankTimeout(f"no answer in {job.timeout:g} s: {unfinished}. {LINK_CHECKS[job.device]}") from error
    finally:
        pool.stop(patience=0.5)


def set_num_threads(rank: int, num_threads: int | None) -> None:
    """Let this worker compute on `num_threads` threads; None leaves PyTorch's choice."""
    if num_threads is not None:
        import torch

        torch.set_num_threads(num_threads)


def run_rank(rank: int, function: RankFunction, size: int, job: RankJob, store: str) -> Any:
    """Run `function` in a worker of the pool, whose statuses go to the caller."""
    return function(rank, size, job, store, report_status)
