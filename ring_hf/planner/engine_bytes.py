"""The training engine that a plan assumes: who holds weights, gradients and optimizer states, and its launch options.

The planner imports nothing of the Transformers side, so this is a table; `tests/planner/test_engines.py` compares it
with the engines that `ContextParallelConfig` accepts. `TrainingJob` refuses settings that no engine can run.
"""

from dataclasses import dataclass

from .training_job import TrainingJob


@dataclass(frozen=True)
class PlannedEngine:
    """A training engine.

    Attributes:
        name: the name its users know it by.
        states: who holds weights, gradients and optimizer states, in words.
        family: prefix of the files in `configs/accelerate` that start it; "" for one process.
        offload: pairs of a state that `--offload` names and the options of `accelerate launch` that offload it.
    """

    name: str
    states: str
    family: str = ""
    offload: tuple[tuple[str, str], ...] = ()


_ZERO_OFFLOAD = (
    ("optimizer", "--offload_optimizer_device cpu"),
    ("weights", "--offload_param_device cpu"),
)
_ZERO_STATES = {
    1: "optimizer states are sharded over all devices",
    2: "gradients and optimizer states are sharded over all devices",
    3: "weights, gradients and optimizer states are sharded over all devices",
}
ONE_PROCESS = PlannedEngine("one process", "the device holds all weights, gradients and optimizer states")
DDP = PlannedEngine("DDP", "every device holds all weights, gradients and optimizer states", "ddp")
FSDP2 = PlannedEngine("FSDP2", _ZERO_STATES[3], "fsdp2", (("weights", "--fsdp_offload_params true"),))
HSDP = PlannedEngine(
    "HSDP (FSDP2)",
    "weights, gradients and optimizer states are sharded over the devices of each of several copies",
    "fsdp2",
    FSDP2.offload,
)
ZERO = {
    stage: PlannedEngine(f"DeepSpeed ZeRO-{stage}", states, "zero3", _ZERO_OFFLOAD)
    for stage, states in _ZERO_STATES.items()
}
ENGINES = (ONE_PROCESS, DDP, FSDP2, HSDP, *ZERO.values())


def select_engine(job: TrainingJob) -> PlannedEngine:
    """Return the engine that a job assumes."""
    if job.is_deepspeed:
        return ZERO[job.zero]
    if job.zero:
        return HSDP if job.dp_replicate > 1 else FSDP2
    return ONE_PROCESS if job.devices == 1 else DDP


def describe_engine(job: TrainingJob) -> str:
    """Return a line with the engine of a job, who holds its states, and which of them are in host memory."""
    engine = select_engine(job)
    zero_option = "" if engine is ONE_PROCESS else f" (--zero {job.zero})"
    line = f"engine: {engine.name}{zero_option}; {engine.states}"
    offload_options = [option for state, option in engine.offload if state in job.offload]
    if not offload_options:
        return line
    states = ["gradients", "optimizer states"]
    if "weights" in job.offload:
        states.insert(0, "weights")
    return f"{line}; in host memory by {' '.join(offload_options)}: {', '.join(states)}"
