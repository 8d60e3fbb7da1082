"""How fast attention of a ring's ranks is on one device, against the same device with the whole sequence.

The part of every rank is computed with all blocks resident, so the compute side of a ring is timed: the tiles of a
layout, the merges, and the balance, but no exchange. Causal FLOPs are those of visible pairs, `2 s^2 H D` forward (the
diagonal's half pairs aside) and 2.5 times that backward; pairs that a mask hides never count. Runs are interleaved and
medians taken. A ring is as fast as its slowest rank:

    TFLOP/s of a device   FLOPs / ranks / seconds of the slowest rank
    efficiency            seconds of one device / (ranks x seconds of the slowest rank)
    overhead              seconds of all ranks together / seconds of one device

Letters: B batch, H query heads, K key/value heads, S tokens, D head dim.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..costmodel.devices import BACKWARD_FLOPS_RATIO
from ..geometry import AttentionSpec, RingOptions, ShardedSequence
from ..kernels import candidates
from ..parallel import local_attention
from .ring_emulation import Emulation
from .single_device import Residents

RINGS = (("zigzag", "ring"), ("contiguous", "ring"), ("striped", "ring"), ("zigzag", "allgather"))


@dataclass(frozen=True)
class Shape:
    """One layer of attention."""

    tokens: int
    ranks: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str

    @property
    def flops(self) -> float:
        """Floating-point operations of a causal forward pass."""
        return self.tokens * (self.tokens + 1) / 2 * 4 * self.heads * self.head_dim


class Clock:
    """Seconds between two points of a device's work: events on a GPU, else the clock of the machine."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"

    def record(self) -> Any:
        """Return a point in time, for `seconds_between`."""
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds_between(self, start: Any, end: Any) -> float:
        """Return seconds; on a GPU, wait for `end` first."""
        if not self._gpu:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end) / 1e3)


@dataclass
class Seconds:
    """Seconds of forward and backward, rank by rank, of one run."""

    forward: list[float]
    backward: list[float]


Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Run = Callable[[Clock], Seconds]


def time_whole(attention: Attention, tensors: list[torch.Tensor], clock: Clock) -> Seconds:
    """Time one device with the whole sequence.

    Args:
        tensors: q `[B, H, S, D]`, k and v `[B, K, S, D]`, and the gradient of out in the shape of q.
    """
    q, k, v, dout = tensors
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    start = clock.record()
    out = attention(*leaves)
    middle = clock.record()
    torch.autograd.grad(out, leaves, dout)
    end = clock.record()
    return Seconds([clock.seconds_between(start, middle)], [clock.seconds_between(middle, end)])


@torch.no_grad()
def time_emulated(emulation: Emulation, tensors: list[torch.Tensor], clock: Clock) -> Seconds:
    """Time all ranks, one after the other; `tensors` as in `time_whole`."""
    q, dout = (emulation.shards(x) for x in (tensors[0], tensors[3]))
    residents = Residents(emulation.shards(tensors[1]), emulation.shards(tensors[2]))
    residents.prepare(emulation.plan(rank, 1) for rank in range(len(q)))
    seconds = Seconds([], [])
    for rank in range(len(q)):
        start = clock.record()
        out, lse = emulation.forward(rank, q[rank], residents)
        middle = clock.record()
        emulation.backward(rank, dout[rank], q[rank], out, lse, residents)
        end = clock.record()
        seconds.forward.append(clock.seconds_between(start, middle))
        seconds.backward.append(clock.seconds_between(middle, end))
    return seconds


def variants(shape: Shape, tensors: list[torch.Tensor]) -> dict[str, Run]:
    """Return functions that time one variant each, by name: one device first."""

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def local(kernel: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return local_attention(q, k, v, kernel=kernel)[0]

    runs: dict[str, Run] = {"one device, sdpa": functools.partial(time_whole, sdpa, tensors)}
    reasons = candidates("auto", tensors[0], tensors[2])
    for name in (name for name, reason in reasons.items() if reason is None and name != "reference"):
        runs[f"one device, {name}"] = functools.partial(time_whole, functools.partial(local, name), tensors)
    for layout, transport in RINGS:
        sequence = ShardedSequence(layout, shape.tokens, shape.ranks)
        emulation = Emulation(sequence, AttentionSpec(), RingOptions(transport))
        runs[f"{layout}, {transport}"] = functools.partial(time_emulated, emulation, tensors)
    return runs


def measure(
    shape: Shape, device: torch.device, repeats: int, report_progress: Callable[[str, int], None]
) -> Iterator[dict[str, Any]]:
    """Yield a row per variant from interleaved runs, of which the first is a warm-up."""
    counts, dtype = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads), getattr(torch, shape.dtype)
    tensors = [torch.randn(1, n, shape.tokens, shape.head_dim, device=device, dtype=dtype) for n in counts]
    clock, runs = Clock(device), variants(shape, tensors)
    measured: dict[str, list[Seconds]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run_variant in runs.items():
            report_progress(f"{shape.tokens:,} tokens, {name}", len(runs) * (repeats + 1))
            seconds = run_variant(clock)
            if repeat:
                measured[name].append(seconds)
    rows = [_row(name, shape, seconds) for name, seconds in measured.items()]
    best = {key: min(row[key] for row in rows if row["ranks"] == 1) for key in ("forward", "both")}
    for row in rows:
        for key in ("forward", "both"):
            row[f"efficiency_{key}"] = best[key] / (row["ranks"] * row[key])
            row[f"overhead_{key}"] = row[f"sum_{key}"] / best[key]
        yield row


def _row(name: str, shape: Shape, runs: list[Seconds]) -> dict[str, Any]:
    ranks = len(runs[0].forward)
    forward = [statistics.median(run.forward[rank] for run in runs) for rank in range(ranks)]
    both = [statistics.median(run.forward[rank] + run.backward[rank] for run in runs) for rank in range(ranks)]
    flops = shape.flops / ranks
    return {
        "variant": name,
        **asdict(shape),
        "ranks": ranks,
        "forward": max(forward),
        "both": max(both),
        "sum_forward": sum(forward),
        "sum_both": sum(both),
        "tflops_forward": flops / max(forward) / 1e12,
        "tflops_both": (1 + BACKWARD_FLOPS_RATIO) * flops / max(both) / 1e12,
    }


def run(device: torch.device, quick: bool, tiny: bool, report_progress: Callable[[str, int], None]) -> dict[str, Any]:
    """Return the section: rows of all shapes, and the shapes that did not fit."""
    shapes = [Shape(2**14, 8, 32, 8, 128, "bfloat16"), Shape(2**16, 8, 32, 8, 128, "bfloat16")]
    shapes += [Shape(2**15, 8, 32, 8, 64, "bfloat16")]
    if tiny:
        shapes = [Shape(512, 4, 4, 2, 64, "float32")]
    elif quick:
        shapes = shapes[:1]
    repeats = 2 if tiny else 5 if quick else 11
    rows: list[dict[str, Any]] = []
    left_out = []
    for shape in shapes:
        try:
            rows += measure(shape, device, repeats, lambda text, total: report_progress(text, total * len(shapes)))
        except torch.OutOfMemoryError:
            left_out.append(f"{shape.tokens:,} tokens, {shape.heads} heads of {shape.head_dim}: not enough memory")
    return {"ok": bool(rows), "repeats": repeats, "rows": rows, "left_out": left_out}
