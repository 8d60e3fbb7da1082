"""The phases of a training step, read from a stack: "training step, forward pass, exchange between ranks".

A stack says where a thread is, however it came there: in a Trainer or a loop, in any engine, in an exception. So no
code has to announce what it does.
"""

import os
import sysconfig
import types
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

EXCHANGE, COLLECTIVE = "exchange between ranks", "collective"
GATHER, REDUCE = "all_gather of parameters", "reduction of gradients"


class Phase(NamedTuple):
    """Functions whose frames say what a thread does.

    Attributes:
        file: end of the path of the file that defines them.
        functions: their names; none for all functions of the file.
        name: of the phase.
    """

    file: str
    functions: tuple[str, ...]
    name: str


PHASES = (
    Phase("transformers/trainer.py", ("get_batch_samples",), "loading of the next batch"),
    Phase("transformers/trainer.py", ("training_step",), "training step"),
    Phase("transformers/trainer.py", ("evaluate", "predict"), "evaluation"),
    Phase("transformers/trainer.py", ("_save_checkpoint", "save_model"), "saving"),
    Phase("transformers/trainer.py", ("_load_from_checkpoint", "_load_optimizer_and_scheduler"), "loading"),
    Phase("transformers/trainer_callback.py", ("call_event",), "callbacks"),
    Phase("torch/utils/data/_utils/fetch.py", ("fetch",), "dataset and collator"),
    Phase("torch/utils/data/dataloader.py", ("_try_get_data",), "wait for a worker of the data loader"),
    Phase("torch/nn/modules/module.py", ("_call_impl",), "forward pass"),
    Phase("torch/utils/checkpoint.py", ("unpack_hook", "backward"), "recomputation"),
    Phase("torch/autograd/graph.py", ("_engine_run_backward",), "backward pass"),
    Phase("accelerate/accelerator.py", ("backward",), "backward pass"),
    Phase("accelerate/accelerator.py", ("clip_grad_norm_",), "clipping of gradients"),
    Phase("torch/optim/optimizer.py", ("wrapper",), "optimizer"),
    Phase("deepspeed/runtime/engine.py", ("step",), "optimizer"),
    # Engines may wait for their collectives in C++, which leaves no frame of `distributed_c10d.py`.
    Phase("deepspeed/runtime/zero/partitioned_param_coordinator.py", ("fetch_sub_module",), GATHER),
    Phase("deepspeed/runtime/zero/partition_parameters.py", ("all_gather", "all_gather_coalesced", "wait"), GATHER),
    Phase("deepspeed/runtime/zero/stage3.py", ("__reduce_and_partition_ipg_grads",), REDUCE),
    Phase("torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py", ("unshard", "wait_for_unshard"), GATHER),
    Phase("torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py", ("post_backward", "finalize_backward"), REDUCE),
    Phase("torch/distributed/fsdp/_runtime_utils.py", ("_unshard",), GATHER),
    Phase("torch/distributed/fsdp/_runtime_utils.py", ("_post_backward_hook",), REDUCE),
    Phase("ring_hf/parallel/transport.py", (), EXCHANGE),
    Phase("ring_hf/parallel/ulysses.py", (), EXCHANGE),
    Phase("ring_hf/parallel/consensus.py", (), "comparison of all ranks"),
    Phase("torch/distributed/distributed_c10d.py", (), COLLECTIVE),
)
_LIBRARIES = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), str(Path(__file__).resolve().parents[2]))


def describe_position(frames: Sequence[types.FrameType]) -> str:
    """Return the phases of a stack, the outermost first, and the innermost line that is no library's.

    Args:
        frames: of one thread, the outermost first.
    """
    phases: list[str] = []
    line = ""
    for frame in frames:
        path = frame.f_code.co_filename
        phase = next((phase.name for phase in PHASES if _matches(phase, path, frame.f_code.co_name)), None)
        if phase is not None and phase not in phases:
            phases.append(phase)
        if not path.startswith(_LIBRARIES) and os.path.isfile(path):
            line = f" ({os.path.basename(path)}:{frame.f_lineno}, {frame.f_code.co_name})"
    return f"{', '.join(phases) or 'code outside of a training step'}{line}"


def _matches(phase: Phase, path: str, function: str) -> bool:
    return path.endswith(phase.file) and (not phase.functions or function in phase.functions)
