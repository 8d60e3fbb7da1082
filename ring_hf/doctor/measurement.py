"""Measurements of one rank: the speed of attention on its device, and with the other ranks the links of their ring.

Attention is one causal layer, forward and backward, through the kernel that training would use. Only visible pairs
count as FLOPs: `2 H (D + E)` for each pair, 2.5 times as many backward.

Letters: H query heads, D and E head dims of queries and values.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..parallel import bandwidth, local_attention
from .machine_report import AttentionTiming
from .rank_launch import RENDEZVOUS, TIMING_ATTENTION, RankJob

_MAX_SECONDS = {"cpu": 1.0, "cuda": 2.0}  # that one forward and backward may be expected to take
_NUM_RUNS = 4  # the first one warms up


class PassSeconds(NamedTuple):
    """Seconds of one forward and one backward."""

    forward: float
    backward: float


def measure(
    rank: int, size: int, job: RankJob, store: str | None, report_status: Callable[[str], None]
) -> tuple[list[AttentionTiming], list[tuple[int, float]]]:
    """Return the slowest rank's attention timings and (bytes, seconds) of the links, the same values on every rank.

    Args:
        store: file for the rendezvous; None under a launcher, whose environment variables are used instead.
        report_status: called with a description before each measurement.
    """
    device = torch.device("cpu")
    if job.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)) if store is None else rank)
        torch.cuda.set_device(device)
    if size == 1:
        return time_lengths(job, device, report_status), []
    report_status(RENDEZVOUS)
    with bandwidth.process_group(rank, size, device, store, job.timeout):
        links = bandwidth.measure_p2p(device, job.message_sizes, job.repeats, report_status)
        timings = time_lengths(job, device, report_status)
        return [_slowest(bandwidth.gather([timing])) for timing in timings], links


def time_lengths(job: RankJob, device: torch.device, report_status: Callable[[str], None]) -> list[AttentionTiming]:
    """Time attention at the lengths of the job; all ranks shorten a length that would take too long."""
    timings: list[AttentionTiming] = []
    for tokens in job.lengths:
        if timings:
            tokens = _affordable_length(timings[-1], tokens, _MAX_SECONDS[device.type])
            # Ranks that disagreed on the length would run different collectives and hang.
            tokens = min(bandwidth.gather([tokens]))
        if not timings or tokens > timings[-1].tokens:
            report_status(f"{TIMING_ATTENTION} over {tokens:,} tokens")
            timings.append(_time_attention(job, tokens, device))
    return timings


def _affordable_length(previous: AttentionTiming, tokens: int, seconds: float) -> int:
    """Return `tokens`, or fewer if attention would exceed `seconds`; its time grows with the square of the length."""
    factor = (seconds / (previous.forward + previous.backward)) ** 0.5
    return min(tokens, int(previous.tokens * factor) // 64 * 64)


def _time_attention(job: RankJob, tokens: int, device: torch.device) -> AttentionTiming:
    dtype = getattr(torch, job.dtype)

    def make_input(heads: int, dim: int) -> torch.Tensor:
        return torch.randn(1, heads, tokens, dim, device=device, dtype=dtype, requires_grad=True)

    q = make_input(job.num_heads, job.head_dim)
    k, v = make_input(job.num_kv_heads, job.head_dim), make_input(job.num_kv_heads, job.v_head_dim)
    dout = torch.randn(1, job.num_heads, tokens, job.v_head_dim, device=device, dtype=dtype)
    max_seconds = _MAX_SECONDS[device.type]
    timed_runs: list[PassSeconds] = []
    for run_index in range(_NUM_RUNS):
        begin = _synchronized_time(device)
        out, _ = local_attention(q, k, v, softcap=job.softcap)
        middle = _synchronized_time(device)
        out.backward(dout)
        end = _synchronized_time(device)
        q.grad = k.grad = v.grad = None
        # A first run that takes this long is hardly slowed down by warming up.
        if run_index > 0 or end - begin > max_seconds:
            timed_runs.append(PassSeconds(middle - begin, end - middle))
        if sum(map(sum, timed_runs)) > max_seconds:
            break
    flops = tokens * (tokens + 1) / 2 * 2 * job.num_heads * (job.head_dim + job.v_head_dim)
    forward = statistics.median(run.forward for run in timed_runs)
    backward = statistics.median(run.backward for run in timed_runs)
    return AttentionTiming(tokens, flops, forward, backward)


def _synchronized_time(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _slowest(timings: list[AttentionTiming]) -> AttentionTiming:
    forward, backward = max(t.forward for t in timings), max(t.backward for t in timings)
    return AttentionTiming(timings[0].tokens, timings[0].flops, forward, backward)
