"""The plan of a job: memory, time, thresholds, the longest that fits, the best split, what each lever is worth."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..geometry import max_head_chunks
from .engine_bytes import engine_of
from .memory_estimate import Memory, memory_of
from .optimizers import DEFAULT, EIGHT_BIT, works_on
from .ring_thresholds import Threshold, thresholds
from .step_times import Times, attention_passes, attention_seconds, cost_ratio, times_of
from .training_job import Job


@dataclass(frozen=True)
class ParallelDegrees:
    """One way to cut `cp` into Ulysses and ring: its attention and exchanges, seconds of a step."""

    ulysses: int
    ring: int
    inner: int
    transport: str
    head_chunks: int
    seconds: float
    exposed: float


@dataclass(frozen=True)
class Suggestion:
    """Something to change, and what the plan becomes with it."""

    name: str
    options: str
    memory: float
    seconds: float


@dataclass(frozen=True)
class Plan:
    """Everything `ring-hf plan` says about a job."""

    job: Job
    memory: Memory
    times: Times
    thresholds: tuple[Threshold, ...]
    longest: int
    splits: tuple[ParallelDegrees, ...]
    levers: tuple[Suggestion, ...]

    @property
    def room(self) -> float:
        return self.job.device_facts.memory

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.room

    def as_dict(self) -> dict[str, Any]:
        """For JSON: plain numbers, bytes and seconds."""
        job, memory, times = self.job, self.memory, self.times
        settings = {key: value for key, value in vars(job).items() if key != "model"}
        step = {"seconds": times.step, "tokens_per_second_per_device": times.tokens_per_device}
        step |= {"mfu": times.mfu, "hfu": times.hfu, "bytes_sent_per_rank": times.sent}
        step |= {"model_flops": times.flops.model, "executed_flops": times.flops.executed}
        return {
            "model": {"name": job.model.name, "source": job.model.source, "parameters": job.model.parameters},
            "engine": asdict(engine_of(job)),
            "job": {**settings, "padded": job.padded, "tokens_per_rank": job.tokens, "ring": job.ring},
            "memory": {
                "items": [asdict(item) for item in memory.items],
                "moment": memory.worst,
                "allocated": memory.allocated,
                "allowance": memory.allowance,
                "total": memory.total,
                "device": self.room,
                "host": memory.host,
                "fits": self.fits,
            },
            "step": {**step, "parts": [asdict(part) for part in times.parts]},
            "ring_step": ring_step(job),
            "thresholds": [asdict(threshold) for threshold in self.thresholds],
            "longest": self.longest,
            "splits": [asdict(split) for split in self.splits],
            "levers": [asdict(lever) for lever in self.levers],
            "cost_ratio_to_4096": cost_ratio(job.model, job.padded),
        }


def plan(job: Job) -> Plan:
    """All of it."""
    return Plan(
        job, memory_of(job), times_of(job), thresholds(job), longest(job), tuple(splits(job)), tuple(levers(job))
    )


def longest(job: Job, taken: float = 0.0) -> int:
    """The largest length, a multiple of the layout's, that fits beside `taken` bytes; 0 if not even the first does."""
    unit, room = job.multiple, job.device_facts.memory - taken

    def fit(count: int) -> bool:
        return memory_of(job.but(length=count * unit)).total <= room

    if not fit(1):
        return 0
    low, high = 1, 2
    while fit(high):
        low, high = high, 2 * high
        if high * unit > 2**40:  # nothing that grows with the length is on the device
            return low * unit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fit(middle) else (low, middle)
    return low * unit


def splits(job: Job) -> Iterator[ParallelDegrees]:
    """Every legal split of `cp` and every transport for it, the fastest first."""
    found = []
    windows = any(job.model.windows)
    for ulysses in (n for n in range(1, min(job.cp, job.model.heads) + 1) if job.cp % n == 0):
        ring = job.cp // ulysses
        chunks = min(job.head_chunks, max_head_chunks(job.model.heads, job.model.kv_heads, ulysses))
        ways = [("ring", 1)]
        if ring > 1:
            ways += [("allgather", 1)] + [("direct", 1)] * windows
            inner = max(1, job.per_node // ulysses)
            ways += [("double_ring", inner)] if 1 < inner < ring and ring % inner == 0 else []
        for transport, inner in ways:
            cut = job.but(ulysses=ulysses, inner=inner, transport=transport, head_chunks=chunks)
            compute, exposed, _ = attention_seconds(cut)
            found.append(ParallelDegrees(ulysses, ring, inner, transport, chunks, compute + exposed, exposed))
    yield from sorted(found, key=lambda split: split.seconds)


def ring_step(job: Job) -> dict[str, Any]:
    """Exchange beside compute of one ring step of one layer that sees everything, or the farthest that one does."""
    window = None if None in job.model.windows else max(w for w in job.model.windows if w)
    transport, inner = job.chosen(window)
    forward, backward = attention_passes(job, window)
    found: dict[str, Any] = {"transport": transport, "inner": inner, "steps": len(forward.max_sent)}
    for name, cost in (("forward", forward), ("backward", backward)):
        seconds = cost.compute / len(cost.max_sent)
        found[name] = {"compute": seconds, "bytes": max(cost.max_sent), "exposed": cost.exposed}
    return found


def levers(job: Job) -> Iterator[Suggestion]:
    """Settings that save memory or time, alone, the largest saving first."""
    memory, seconds = memory_of(job).total, times_of(job).step
    found = []
    for name, options, changes in _candidates(job):
        changed = job.but(**changes)
        lever = Suggestion(name, options, memory_of(changed).total, times_of(changed).step)
        if memory - lever.memory > 0.01 * memory or seconds - lever.seconds > 0.01 * seconds:
            found.append(lever)
    yield from sorted(found, key=lambda lever: lever.memory / memory + lever.seconds / seconds)


def _candidates(job: Job) -> Iterator[tuple[str, str, dict[str, Any]]]:
    if job.checkpoint == "none":
        yield "recompute layers but for attention", "--checkpoint save-attention", {"checkpoint": "save-attention"}
    if job.checkpoint != "full":
        rest = tuple(name for name in job.offload if name != "attention")
        options = "--checkpoint full" + (f" {_offload(rest)}" if rest != job.offload else "")
        yield "recompute attention, too", options, {"checkpoint": "full", "offload": rest}
    if job.checkpoint == "full":
        yield "save attention outputs", "--checkpoint save-attention", {"checkpoint": "save-attention"}
        both = (*job.offload, "attention")
        name, options = "save attention outputs on the host", f"--checkpoint save-attention {_offload(both)}"
        yield name, options, {"checkpoint": "save-attention", "offload": both}
    for name, what, allowed in (
        ("layers", "layer inputs", job.checkpoint != "none"),
        ("attention", "saved attention", job.checkpoint == "save-attention"),
    ):
        if allowed and name not in job.offload:
            more = (*job.offload, name)
            yield f"{what} to host memory", _offload(more), {"offload": more}
    yield from _states_on_host(job)
    if works_on(EIGHT_BIT, job.is_deepspeed, False) and job.optimizer == DEFAULT and "optimizer" not in job.offload:
        yield "8-bit optimizer states", f"--optimizer {EIGHT_BIT}", {"optimizer": EIGHT_BIT}
    most = max_head_chunks(job.model.heads, job.model.kv_heads, job.ulysses)
    if job.head_chunks < most:
        yield "heads exchanged in chunks", f"--head-chunks {most}", {"head_chunks": most}
    if not job.ffn_block:
        yield "MLPs block by block", "--ffn-block 4096", {"ffn_block": 4096}
    if not job.loss_block:
        yield "head and loss block by block", "--loss-block 2048", {"loss_block": 2048}
    if not job.fused:
        yield "fused norms and activations", "--fused", {"fused": True}
    deepspeed = job.precision == "bf16-master" or "optimizer" in job.offload  # with --zero 3
    if job.zero < 3 and job.devices > 1 and works_on(job.optimizer, deepspeed, "optimizer" in job.offload):
        yield "shard weights, gradients, states", "--zero 3", {"zero": 3}
    if not job.lora:
        yield "train adapters only", "--lora 16", {"lora": 16}
    if job.layout == "contiguous" and job.ring > 1:
        yield "deal causal work evenly", "--layout zigzag", {"layout": "zigzag"}


def _states_on_host(job: Job) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Optimizer states on the host are DeepSpeed's, unless weights are there, too."""
    alone, both = (*job.offload, "optimizer"), (*job.offload, "optimizer", "weights")
    zero = job.zero or 3
    shard = "" if job.zero else f"--zero {zero} "
    if "optimizer" in job.offload:
        both = (*job.offload, "weights")
    elif job.precision in ("auto", "bf16-master") and works_on(job.optimizer, True, True):
        yield (
            "optimizer states and gradients to host memory",
            shard + _offload(alone),
            {"zero": zero, "offload": alone},
        )
    if zero == 3 and "weights" not in job.offload and works_on(job.optimizer, job.precision == "bf16-master", True):
        name = "weights, too, to host memory" if "optimizer" in job.offload else "all states to host memory"
        yield name, shard + _offload(both), {"zero": zero, "offload": both}


def _offload(names: tuple[str, ...]) -> str:
    """All of them: of two such options the last one counts."""
    return f"--offload {','.join(names) or repr('')}"
