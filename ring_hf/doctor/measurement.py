"""What one rank measures: the speed of attention on its device, and with the others the links of their ring.

Attention is one causal layer, forward and backward, through the kernel that training would take. FLOPs are counted for
visible pairs alone: `2 H (D + Dv)` each, backward 2.5 times as many.

Letters: B batch, H query heads, K key/value heads, S tokens, D and E head dims.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from ..parallel import bandwidth, local_attention
from .facts import Speed
from .rank_launch import ATTENDING, MEETING, Job

_PATIENCE = {"cpu": 1.0, "cuda": 2.0}  # seconds that one run of forward and backward may be expected to take


def measure(
    rank: int, size: int, job: Job, store: str | None, say: Callable[[str], None]
) -> tuple[list[Speed], list[tuple[int, float]]]:
    """Speeds (the slowest rank's) and links, the same on every rank; without links if it is alone."""
    device = torch.device("cpu")
    if job.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)) if store is None else rank)
        torch.cuda.set_device(device)
    if size == 1:
        return speeds(job, device, say), []
    say(MEETING)
    with bandwidth.process_group(rank, size, device, store, job.seconds):
        links = bandwidth.measure_p2p(device, job.messages, job.repeats, say)
        found = speeds(job, device, say)
        return [_slowest(bandwidth.gather([speed])) for speed in found], links


def speeds(job: Job, device: torch.device, say: Callable[[str], None]) -> list[Speed]:
    """At every length of the job that can be expected to take less than a second or two on every rank."""
    found: list[Speed] = []
    for tokens in job.lengths:
        if found:
            tokens = _affordable(found[-1], tokens, _PATIENCE[device.type])
            # The ranks do the same, or they would wait for each other for ever.
            tokens = min(bandwidth.gather([tokens]))
        if not found or tokens > found[-1].tokens:
            say(f"{ATTENDING} over {tokens:,} tokens")
            found.append(_speed(job, tokens, device))
    return found


def _affordable(before: Speed, tokens: int, seconds: float) -> int:
    """At most `tokens`, fewer if time that grows with their square would not last."""
    factor = (seconds / (before.forward + before.backward)) ** 0.5
    return min(tokens, int(before.tokens * factor) // 64 * 64)


def _speed(job: Job, tokens: int, device: torch.device) -> Speed:
    num_heads, num_kv_heads, head_dim, v_head_dim = job.heads
    dtype = getattr(torch, job.dtype)

    def make(heads: int, dim: int) -> torch.Tensor:
        return torch.randn(1, heads, tokens, dim, device=device, dtype=dtype, requires_grad=True)

    q, k, v = make(num_heads, head_dim), make(num_kv_heads, head_dim), make(num_kv_heads, v_head_dim)
    dout = torch.randn(1, num_heads, tokens, v_head_dim, device=device, dtype=dtype)
    times: list[tuple[float, float]] = []
    patience = _PATIENCE[device.type]
    for repeat in range(4):  # the first warms up, unless it takes so long that this cannot matter
        marks: list[Any] = [_now(device)]
        out, _ = local_attention(q, k, v, softcap=job.softcap)
        marks.append(_now(device))
        out.backward(dout)
        marks.append(_now(device))
        q.grad = k.grad = v.grad = None
        times += [(marks[1] - marks[0], marks[2] - marks[1])] if repeat or marks[2] - marks[0] > patience else []
        if sum(map(sum, times)) > patience:
            break
    flops = tokens * (tokens + 1) / 2 * 2 * num_heads * (head_dim + v_head_dim)
    forward, backward = (statistics.median(column) for column in zip(*times, strict=True))
    return Speed(tokens, flops, forward, backward)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _slowest(found: list[Speed]) -> Speed:
    first = found[0]
    return Speed(first.tokens, first.flops, max(one.forward for one in found), max(one.backward for one in found))
