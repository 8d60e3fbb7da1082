"""The plan of a job: memory, time, thresholds, the longest sequence that fits, the best degrees, and suggestions."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..geometry import max_head_chunks
from .engine_bytes import select_engine
from .memory_estimate import MemoryEstimate, estimate_memory
from .optimizers import DEFAULT_OPTIMIZER, EIGHT_BIT_OPTIMIZER, supports_engine
from .ring_thresholds import OverlapThreshold, estimate_thresholds
from .step_times import StepTimes, cost_ratio, estimate_attention, estimate_passes, estimate_times
from .training_job import TrainingJob

_MIN_SAVING = 0.01  # share of memory or time that a suggestion saves at least
_MAX_LENGTH = 2**40  # tokens; a job that fits at this length has no limit


@dataclass(frozen=True)
class ParallelDegrees:
    """One way to split `cp` into Ulysses and ring.

    Attributes:
        inner: ranks of the inner ring; 1 without.
        seconds: attention and its communication in a step.
        exposed: seconds of these in which ranks communicate instead of computing.
    """

    ulysses: int
    ring: int
    inner: int
    transport: str
    head_chunks: int
    seconds: float
    exposed: float

    @classmethod
    def from_job(cls, job: TrainingJob) -> "ParallelDegrees":
        """Return the degrees of a job, and the time of its attention."""
        attention = estimate_attention(job)
        return cls(
            ulysses=job.ulysses,
            ring=job.ring,
            inner=job.inner,
            transport=job.transport,
            head_chunks=job.head_chunks,
            seconds=attention.compute + attention.exposed,
            exposed=attention.exposed,
        )


@dataclass(frozen=True)
class Suggestion:
    """A change of the job, and the memory (bytes) and time (seconds) of a step with it.

    Attributes:
        options: the options of `ring-hf plan` that make the change.
    """

    name: str
    options: str
    memory: float
    seconds: float


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that `ring-hf plan` predicts for a job.

    Attributes:
        max_length: tokens of the longest sequence that fits.
        splits: all ways to split `cp`, the fastest first.
        suggestions: changes that save memory or time, the largest saving first.
    """

    job: TrainingJob
    memory: MemoryEstimate
    times: StepTimes
    thresholds: tuple[OverlapThreshold, ...]
    max_length: int
    splits: tuple[ParallelDegrees, ...]
    suggestions: tuple[Suggestion, ...]

    @property
    def memory_budget(self) -> float:
        """Bytes of the device."""
        return self.job.device_spec.memory

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.memory_budget

    def as_dict(self) -> dict[str, Any]:
        """Return a dict for JSON: plain numbers, in bytes and seconds."""
        job, memory, times = self.job, self.memory, self.times
        settings = {key: value for key, value in vars(job).items() if key != "model"}
        return {
            "model": {"name": job.model.name, "source": job.model.source, "parameters": job.model.parameters},
            "engine": asdict(select_engine(job)),
            "job": {
                **settings,
                "padded_length": job.padded_length,
                "tokens_per_rank": job.tokens_per_rank,
                "ring": job.ring,
            },
            "memory": {
                "items": [asdict(item) for item in memory.items],
                "peak_phase": memory.peak_phase,
                "allocated": memory.allocated,
                "overhead": memory.overhead,
                "total": memory.total,
                "device": self.memory_budget,
                "host": memory.host,
                "fits": self.fits,
            },
            "step": {
                "seconds": times.step,
                "tokens_per_second_per_device": times.tokens_per_device,
                "mfu": times.mfu,
                "hfu": times.hfu,
                "bytes_sent_per_rank": times.bytes_sent,
                "model_flops": times.flops.model,
                "executed_flops": times.flops.executed,
                "parts": [asdict(part) for part in times.parts],
            },
            "ring_step": estimate_ring_step(job),
            "thresholds": [asdict(threshold) for threshold in self.thresholds],
            "longest": self.max_length,
            "splits": [asdict(split) for split in self.splits],
            "suggestions": [asdict(suggestion) for suggestion in self.suggestions],
            "cost_ratio_to_4096": cost_ratio(job.model, job.padded_length),
        }


def plan(job: TrainingJob) -> TrainingPlan:
    """Return the whole plan of a job."""
    return TrainingPlan(
        job=job,
        memory=estimate_memory(job),
        times=estimate_times(job),
        thresholds=estimate_thresholds(job),
        max_length=find_max_length(job),
        splits=tuple(compare_splits(job)),
        suggestions=tuple(find_suggestions(job)),
    )


def find_max_length(job: TrainingJob, reserved_bytes: float = 0.0) -> int:
    """Return the longest sequence that fits, in tokens; 0 if not even the shortest does.

    Args:
        reserved_bytes: bytes of the device that are not available to the job.
    """
    unit, budget = job.length_multiple, job.device_spec.memory - reserved_bytes

    def fits(count: int) -> bool:
        return estimate_memory(job.replace(length=count * unit)).total <= budget

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
        if high * unit > _MAX_LENGTH:  # nothing on the device grows with the length
            return low * unit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * unit


def compare_splits(job: TrainingJob) -> list[ParallelDegrees]:
    """Return every legal split of `cp` with every transport, the fastest first."""
    splits = []
    for ulysses in (n for n in range(1, min(job.cp, job.model.heads) + 1) if job.cp % n == 0):
        ring = job.cp // ulysses
        max_chunks = max_head_chunks(job.model.heads, job.model.kv_heads, ulysses)
        head_chunks = min(job.head_chunks, max_chunks)
        for transport, inner in _transports(job, ring, max(1, job.per_node // ulysses)):
            split = job.replace(ulysses=ulysses, inner=inner, transport=transport, head_chunks=head_chunks)
            splits.append(ParallelDegrees.from_job(split))
    return sorted(splits, key=lambda split: split.seconds)


def _transports(job: TrainingJob, ring: int, ring_ranks_per_node: int) -> Iterator[tuple[str, int]]:
    """Yield transport and ranks of the inner ring, for each transport that a ring of this size can use."""
    yield "ring", 1
    if ring == 1:
        return
    yield "allgather", 1
    if any(job.model.windows):
        yield "direct", 1
    if 1 < ring_ranks_per_node < ring and ring % ring_ranks_per_node == 0:
        yield "double_ring", ring_ranks_per_node


def estimate_ring_step(job: TrainingJob) -> dict[str, Any]:
    """Return compute (seconds), bytes sent and exposed seconds of a ring step of one layer, in both passes.

    The layer is one without a window, or else one with the largest window.
    """
    window = None if None in job.model.windows else max(w for w in job.model.windows if w)
    transport, inner = job.resolve_transport(window)
    forward, backward = estimate_passes(job, window)
    ring_step: dict[str, Any] = {"transport": transport, "inner": inner, "steps": len(forward.max_sent)}
    for name, cost in (("forward", forward), ("backward", backward)):
        seconds = cost.compute / len(cost.max_sent)
        ring_step[name] = {"compute": seconds, "bytes": max(cost.max_sent), "exposed": cost.exposed}
    return ring_step


def find_suggestions(job: TrainingJob) -> list[Suggestion]:
    """Return the settings that save memory or time, each on its own, the largest saving first."""
    memory, seconds = estimate_memory(job).total, estimate_times(job).step
    suggestions = []
    for name, options, changes in _candidate_changes(job):
        changed = job.replace(**changes)
        suggestion = Suggestion(name, options, estimate_memory(changed).total, estimate_times(changed).step)
        saves_memory = memory - suggestion.memory > _MIN_SAVING * memory
        if saves_memory or seconds - suggestion.seconds > _MIN_SAVING * seconds:
            suggestions.append(suggestion)
    return sorted(suggestions, key=lambda suggestion: suggestion.memory / memory + suggestion.seconds / seconds)


def _candidate_changes(job: TrainingJob) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield name, options and settings of every change that the job allows."""
    yield from _attention_changes(job)
    yield from _state_offload_changes(job)
    has_8bit = supports_engine(EIGHT_BIT_OPTIMIZER, job.is_deepspeed, False)
    if has_8bit and job.optimizer == DEFAULT_OPTIMIZER and "optimizer" not in job.offload:
        yield "8-bit optimizer states", f"--optimizer {EIGHT_BIT_OPTIMIZER}", {"optimizer": EIGHT_BIT_OPTIMIZER}
    max_chunks = max_head_chunks(job.model.heads, job.model.kv_heads, job.ulysses)
    if job.head_chunks < max_chunks:
        yield "exchange heads in chunks", f"--head-chunks {max_chunks}", {"head_chunks": max_chunks}
    if not job.ffn_block:
        yield "MLPs in blocks of tokens", "--ffn-block 4096", {"ffn_block": 4096}
    if not job.loss_block:
        yield "head and loss in blocks of tokens", "--loss-block 2048", {"loss_block": 2048}
    if not job.fused:
        yield "fused norms and activations", "--fused", {"fused": True}
    deepspeed = job.precision == "bf16-master" or "optimizer" in job.offload  # with --zero 3
    if job.zero < 3 and job.devices > 1 and supports_engine(job.optimizer, deepspeed, "optimizer" in job.offload):
        yield "shard weights, gradients, states", "--zero 3", {"zero": 3}
    if not job.lora:
        yield "train adapters only", "--lora 16", {"lora": 16}
    if job.layout == "contiguous" and job.ring > 1:
        yield "balance causal attention", "--layout zigzag", {"layout": "zigzag"}


def _attention_changes(job: TrainingJob) -> Iterator[tuple[str, str, dict[str, Any]]]:
    save_attention = "--checkpoint save-attention"
    if job.checkpoint == "none":
        yield "recompute layers except attention", save_attention, {"checkpoint": "save-attention"}
    if job.checkpoint != "full":
        offload = tuple(name for name in job.offload if name != "attention")
        options = "--checkpoint full" + (f" {_offload_option(offload)}" if offload != job.offload else "")
        yield "also recompute attention", options, {"checkpoint": "full", "offload": offload}
    if job.checkpoint == "full":
        yield "save attention outputs", save_attention, {"checkpoint": "save-attention"}
        offload = (*job.offload, "attention")
        changes = {"checkpoint": "save-attention", "offload": offload}
        yield "save attention outputs in host memory", f"{save_attention} {_offload_option(offload)}", changes
    if job.checkpoint != "none" and "layers" not in job.offload:
        offload = (*job.offload, "layers")
        yield "offload layer inputs", _offload_option(offload), {"offload": offload}
    if job.checkpoint == "save-attention" and "attention" not in job.offload:
        offload = (*job.offload, "attention")
        yield "offload saved attention", _offload_option(offload), {"offload": offload}


def _state_offload_changes(job: TrainingJob) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield the offload of states. DeepSpeed offloads optimizer states alone, FSDP2 only together with weights."""
    zero = job.zero or 3
    zero_option = "" if job.zero else f"--zero {zero} "
    offloads_optimizer = "optimizer" in job.offload
    can_be_deepspeed = job.precision in ("auto", "bf16-master") and job.dp_replicate == 1
    if not offloads_optimizer and can_be_deepspeed and supports_engine(job.optimizer, True, True):
        offload = (*job.offload, "optimizer")
        changes = {"zero": zero, "offload": offload}
        yield "offload optimizer states and gradients", zero_option + _offload_option(offload), changes
    is_deepspeed = job.precision == "bf16-master"
    if zero == 3 and "weights" not in job.offload and supports_engine(job.optimizer, is_deepspeed, True):
        name = "also offload weights" if offloads_optimizer else "offload all states"
        offload = (*job.offload, *(() if offloads_optimizer else ("optimizer",)), "weights")
        yield name, zero_option + _offload_option(offload), {"zero": zero, "offload": offload}


def _offload_option(names: tuple[str, ...]) -> str:
    """Return the option with all names: of two `--offload` options, the last one counts."""
    return f"--offload {','.join(names) or repr('')}"
