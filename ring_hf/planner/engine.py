"""The engine a plan assumes: who holds weights, gradients and optimizer states, and whether training accepts it.

A table, because the planner imports nothing of the Transformers side; `tests/planner/test_engines.py` compares it with
the engines that `ContextParallelConfig` accepts and refuses.
"""

from dataclasses import dataclass

from .job import Job


@dataclass(frozen=True)
class Engine:
    """An engine of training.

    Attributes:
        name: as its users call it.
        states: what a device holds of weights, gradients and optimizer states.
        trains: whether training with context parallelism accepts it today.
    """

    name: str
    states: str
    trains: bool


ONE_PROCESS = Engine("one process", "the device holds all weights, gradients and optimizer states", True)
ENGINES = {  # by --zero
    0: Engine("DDP", "every device holds all weights, gradients and optimizer states", True),
    1: Engine("DeepSpeed ZeRO-1", "optimizer states are sharded over all devices", True),
    2: Engine("DeepSpeed ZeRO-2", "gradients and optimizer states are sharded over all devices", True),
    3: Engine(
        "FSDP2 or DeepSpeed ZeRO-3", "weights, gradients and optimizer states are sharded over all devices", True
    ),
}
DEEPSPEED = Engine("DeepSpeed without ZeRO", "every device has all weights, gradients and optimizer states", False)
OFFLOADED = {"optimizer", "weights"}  # by the engine; what layers keep is offloaded by `ring_hf.memory`


def engine_of(job: Job) -> Engine:
    """Return the engine that a job assumes: what it offloads and its optimizer may need more than `--zero` says."""
    deepspeed = job.optimizer == "adamw-bf16-master" or not OFFLOADED.isdisjoint(job.offload)
    if deepspeed:
        return ENGINES[job.zero] if job.zero else DEEPSPEED
    return ONE_PROCESS if job.devices == 1 else ENGINES[job.zero]


def engine_line(job: Job) -> str:
    """Say which engine a plan assumes, and whether training accepts it."""
    engine = engine_of(job)
    option = "" if engine is ONE_PROCESS else f" (--zero {job.zero})"
    verdict = "training accepts it" if engine.trains else "training REFUSES it: add --zero 1, 2 or 3"
    return f"engine: {engine.name}{option}; {verdict}; {engine.states}"
