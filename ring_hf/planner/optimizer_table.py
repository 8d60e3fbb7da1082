"""Bytes per parameter that a device holds with AdamW, its 8- and 4-bit versions, Adafactor and offload, per engine.

A documented table: cells are the bytes of jobs that `TrainingJob` accepts, engines those that these jobs assume.
"""

import math
from dataclasses import dataclass

from ..text import markdown_table, wrap_prose
from .engine_bytes import ENGINES, ZERO, PlannedEngine, select_engine
from .memory_estimate import optimizer_bytes
from .model_config import read_model
from .training_job import TrainingJob

_MODEL = "Llama-3.1-8B"
# The precisions of `PRECISIONS`, and the engines and settings that train with them.
_COLUMNS = {
    "fp32": "DDP, FSDP2: `bf16: true`",
    "bf16-master": "DeepSpeed: `bf16: true`",
    "bf16": "DDP, FSDP2: `dtype: bfloat16`, `bf16: false`",
}
_NOTE = (
    "Bytes per parameter of weights + gradients + optimizer states, before sharding; `-`: no engine runs it. "
    "bitsandbytes keeps the states of whole embeddings in fp32. With `bf16: true`, Accelerate converts the weights "
    f"that FSDP2 trains to fp32. Adafactor: an upper bound, for {_MODEL}."
)


@dataclass(frozen=True)
class StatesOption:
    """A row: optimizers with the same states, or the states that are in host memory (names in `OFFLOADS`)."""

    name: str
    optimizers: tuple[str, ...]
    offload: tuple[str, ...] = ()


OPTIONS = (
    StatesOption("AdamW (default)", ("adamw_torch_fused", "adamw_torch")),
    StatesOption("8-bit AdamW (torchao)", ("adamw_torch_8bit",)),
    StatesOption("8-bit AdamW (bitsandbytes)", ("adamw_8bit", "paged_adamw_8bit")),
    StatesOption("4-bit AdamW (torchao)", ("adamw_torch_4bit",)),
    StatesOption("Adafactor", ("adafactor",)),
    StatesOption("AdamW in host memory", ("adamw_torch_fused", "adamw_torch"), ("optimizer",)),
    StatesOption("all states in host memory", ("adamw_torch_fused", "adamw_torch"), ("optimizer", "weights")),
)


def make_optimizer_table() -> str:
    """Return the table as Markdown, with a note."""
    rows = [["", "setting", *_COLUMNS.values(), "engines"]]
    for option in OPTIONS:
        jobs = {precision: _valid_jobs(option, precision) for precision in _COLUMNS}
        engines = {select_engine(job) for valid_jobs in jobs.values() for job in valid_jobs}
        cells = [_format_bytes(valid_jobs[0]) if valid_jobs else "-" for valid_jobs in jobs.values()]
        rows.append([option.name, _format_setting(option, engines), *cells, _format_engines(engines)])
    return f"{markdown_table(rows, align='llr')}\n\n{wrap_prose(_NOTE)}"


def _valid_jobs(option: StatesOption, precision: str) -> list[TrainingJob]:
    """Return the jobs with each stage of ZeRO that an engine can run with all optimizers of an option."""
    model, valid_jobs = read_model(_MODEL), []
    for zero in range(4):
        settings = {"zero": zero, "precision": precision, "offload": option.offload}
        try:
            jobs = [TrainingJob(model, 1, optimizer=name, **settings) for name in option.optimizers]  # type: ignore
        except ValueError:
            continue
        valid_jobs.append(jobs[0])
    return valid_jobs


def _format_bytes(job: TrainingJob) -> str:
    precision, optimizer = job.precision_spec, job.optimizer_spec
    weights, gradients = precision.weights, precision.gradients
    states = optimizer.bytes_per_parameter(precision) + precision.master
    if "weights" in job.offload:
        return f"0 ({weights + gradients + states:g} in host memory)"
    if "optimizer" in job.offload:
        return f"{weights} ({gradients + states:g} in host memory)"
    if optimizer.is_factored:
        states = optimizer_bytes(job) / job.model.parameters
        return f"{weights} + {gradients} + {math.ceil(100 * states) / 100:g}"
    return f"{weights} + {gradients} + {states:.3g}"


def _format_setting(option: StatesOption, engines: set[PlannedEngine]) -> str:
    if not option.offload:
        names = [f"`{name}`" for name in option.optimizers]
        return f"`optim: {option.optimizers[0]}`" + "".join(f", {name}" for name in names[1:])
    settings = []
    for engine in ENGINES:
        if engine in engines:
            settings.append(" ".join(text for state, text in engine.offload if state in option.offload))
    return " or ".join(f"`{setting}`" for setting in dict.fromkeys(settings))


def _format_engines(engines: set[PlannedEngine]) -> str:
    names = [engine.name.removeprefix("DeepSpeed ") for engine in ENGINES if engine in engines]
    if engines >= set(ZERO.values()):
        names = [name for name in names if not name.startswith("ZeRO")] + ["ZeRO"]
    return ", ".join(names)
