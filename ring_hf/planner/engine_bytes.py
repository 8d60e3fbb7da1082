"""The engine a plan assumes: who holds weights, gradients and optimizer states, and how a launch asks for it.

A table, because the planner imports nothing of the Transformers side; `tests/planner/test_engines.py` compares it with
the engines that `ContextParallelConfig` accepts. A `Job` that no engine can run is refused when it is made.
"""

from dataclasses import dataclass

from .training_job import Job


@dataclass(frozen=True)
class Engine:
    """An engine of training.

    Attributes:
        name: as its users call it.
        states: what a device holds of weights, gradients and optimizer states.
        family: how the files in `configs/accelerate` that start it begin; "" for one process.
        offload: by what `--offload` names, the options of `accelerate launch` that ask for it.
    """

    name: str
    states: str
    family: str = ""
    offload: tuple[tuple[str, str], ...] = ()


_ZERO = ("zero3", (("optimizer", "--offload_optimizer_device cpu"), ("weights", "--offload_param_device cpu")))
ONE_PROCESS = Engine("one process", "the device holds all weights, gradients and optimizer states")
DDP = Engine("DDP", "every device holds all weights, gradients and optimizer states", "ddp")
FSDP2 = Engine(
    "FSDP2",
    "weights, gradients and optimizer states are sharded over all devices",
    "fsdp2",
    (("weights", "--fsdp_offload_params true"),),
)
ZERO = {  # by stage
    1: Engine("DeepSpeed ZeRO-1", "optimizer states are sharded over all devices", *_ZERO),
    2: Engine("DeepSpeed ZeRO-2", "gradients and optimizer states are sharded over all devices", *_ZERO),
    3: Engine("DeepSpeed ZeRO-3", "weights, gradients and optimizer states are sharded over all devices", *_ZERO),
}
ENGINES = (ONE_PROCESS, DDP, FSDP2, *ZERO.values())


def engine_of(job: Job) -> Engine:
    """Return the engine that a job assumes."""
    if job.is_deepspeed:
        return ZERO[job.zero]
    if job.zero:
        return FSDP2
    return ONE_PROCESS if job.devices == 1 else DDP


def engine_line(job: Job) -> str:
    """Say which engine a plan assumes, and what of its states is in host memory."""
    engine = engine_of(job)
    option = "" if engine is ONE_PROCESS else f" (--zero {job.zero})"
    offload = [option for name, option in engine.offload if name in job.offload]
    host = f"; in host memory by {' '.join(offload)}: {', '.join(_on_host(job))}" if offload else ""
    return f"engine: {engine.name}{option}; {engine.states}{host}"


def _on_host(job: Job) -> list[str]:
    names = ["gradients", "optimizer states"]
    return ["weights", *names] if "weights" in job.offload else names
