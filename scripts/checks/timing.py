"""How fast attention of a ring's ranks is on one device, against the same device with the whole sequence to itself.

Every rank's part is computed with all blocks resident, so what is timed is the compute side of a ring: the tiles of a
layout, the merges, and the balance, but no exchange. Causal FLOPs are those of visible pairs, `2 s^2 H D` forward (the
diagonal's half pairs aside) and 2.5 times that backward; what a mask hides is never counted. Runs are interleaved, and
medians taken. A ring is as fast as its slowest rank:

    TFLOP/s of a device   FLOPs / ranks / seconds of the slowest rank
    efficiency            seconds of one device / (ranks x seconds of the slowest rank)
    overhead              seconds of all ranks together / seconds of one device
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from ring_hf.costmodel.devices import BACKWARD_FLOPS_RATIO
from ring_hf.geometry import AttentionSpec, RingOptions, ShardedSequence
from ring_hf.kernels import candidates
from ring_hf.parallel import local_attention
from ring_hf.parallel.emulation import Emulation
from ring_hf.parallel.single_device import Residents

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
        """Causal, forward."""
        return self.tokens * (self.tokens + 1) / 2 * 4 * self.heads * self.head_dim


class Clock:
    """Seconds between marks on a device: events on a GPU, else the clock of the machine."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"

    def mark(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        if not self._gpu:
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


@dataclass
class Timed:
    """Seconds of forward and backward, rank by rank, of one run."""

    forward: list[float]
    backward: list[float]


Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def whole(attention: Attention, tensors: list[torch.Tensor], clock: Clock) -> Timed:
    """One device with all of it."""
    q, k, v, dout = tensors
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    marks = [clock.mark()]
    out = attention(*leaves)
    marks.append(clock.mark())
    torch.autograd.grad(out, leaves, dout)
    marks.append(clock.mark())
    return Timed([clock.between(*marks[:2])], [clock.between(*marks[1:])])


@torch.no_grad()
def emulated(emulation: Emulation, tensors: list[torch.Tensor], clock: Clock) -> Timed:
    """All ranks, one after the other."""
    q, dout = (emulation.shards(x) for x in (tensors[0], tensors[3]))
    residents = Residents(emulation.shards(tensors[1]), emulation.shards(tensors[2]))
    residents.prepare(emulation.plan(rank, 1) for rank in range(len(q)))
    timed = Timed([], [])
    for rank in range(len(q)):
        begin = clock.mark()
        out, lse = emulation.forward(rank, q[rank], residents)
        middle = clock.mark()
        emulation.backward(rank, dout[rank], q[rank], out, lse, residents)
        end = clock.mark()
        timed.forward.append(clock.between(begin, middle))
        timed.backward.append(clock.between(middle, end))
    return timed


def variants(shape: Shape, tensors: list[torch.Tensor]) -> dict[str, Callable[[Clock], Timed]]:
    """What is timed, by name: one device first."""

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    found: dict[str, Callable[[Clock], Timed]] = {"one device, sdpa": lambda clock: whole(sdpa, tensors, clock)}
    fitting = [name for name, reason in candidates("auto", tensors[0], tensors[2]).items() if reason is None]
    for name in fitting:
        if name != "reference":
            found[f"one device, {name}"] = lambda clock, name=name: whole(
                lambda q, k, v: local_attention(q, k, v, kernel=name)[0], tensors, clock
            )
    for layout, transport in RINGS:
        sequence = ShardedSequence(layout, shape.tokens, shape.ranks)
        emulation = Emulation(sequence, AttentionSpec(), RingOptions(transport))
        found[f"{layout}, {transport}"] = lambda clock, emulation=emulation: emulated(emulation, tensors, clock)
    return found


def measure(
    shape: Shape, device: torch.device, repeats: int, progress: Callable[[str, int], None]
) -> Iterator[dict[str, Any]]:
    """A row per variant; interleaved runs, the first of each a warm-up."""
    counts, dtype = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads), getattr(torch, shape.dtype)
    tensors = [torch.randn(1, n, shape.tokens, shape.head_dim, device=device, dtype=dtype) for n in counts]
    clock, jobs = Clock(device), variants(shape, tensors)
    runs: dict[str, list[Timed]] = {name: [] for name in jobs}
    for repeat in range(repeats + 1):
        for name, job in jobs.items():
            progress(f"{shape.tokens:,} tokens, {name}", len(jobs) * (repeats + 1))
            timed = job(clock)
            if repeat:
                runs[name].append(timed)
    rows = [_row(name, shape, seen) for name, seen in runs.items()]
    best = {key: min(row[key] for row in rows if row["ranks"] == 1) for key in ("forward", "both")}
    for row in rows:
        for key in ("forward", "both"):
            row[f"efficiency_{key}"] = best[key] / (row["ranks"] * row[key])
            row[f"overhead_{key}"] = row[f"sum_{key}"] / best[key]
        yield row


def _row(name: str, shape: Shape, seen: list[Timed]) -> dict[str, Any]:
    ranks = len(seen[0].forward)
    forward = [statistics.median(run.forward[rank] for run in seen) for rank in range(ranks)]
    both = [statistics.median(run.forward[rank] + run.backward[rank] for run in seen) for rank in range(ranks)]
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


def run(device: torch.device, quick: bool, tiny: bool, progress: Callable[[str, int], None]) -> dict[str, Any]:
    """The section: rows of all shapes."""
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
            rows += measure(shape, device, repeats, lambda words, total: progress(words, total * len(shapes)))
        except torch.OutOfMemoryError:
            left_out.append(f"{shape.tokens:,} tokens, {shape.heads} heads of {shape.head_dim}: not enough memory")
    return {"ok": bool(rows), "repeats": repeats, "rows": rows, "left_out": left_out}
