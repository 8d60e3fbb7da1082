"""What a Trainer adds to faults: its timeout and its progress for the watch of all ranks, the versions that all ranks
must run, and weights that must be finite before they are saved.
"""

import hashlib
import types
from collections.abc import Sequence
from typing import Any

import accelerate
import torch
import transformers

from ring_hf.parallel import LivenessWatch, assert_equal_across_ranks, watch_ranks
from ring_hf.version import __version__

from ..context import ProcessContext
from ..refusal import raise_on_all_ranks
from ..runtime.nonfinite import find_nonfinite_weights
from ..runtime.phases import describe_position


def watch_training(args: Any) -> LivenessWatch | None:
    """Watch all processes while `Trainer.train` runs in this one. A collective call of all processes.

    Args:
        args: `TrainingArguments`, whose `ddp_timeout` bounds the seconds without progress: also where torch's groups
            ignore it, as on CPUs and in the groups of a device mesh.
    """
    return watch_ranks(float(args.ddp_timeout), describe_position, _is_training)


def _is_training(frames: Sequence[types.FrameType]) -> bool:
    """Return whether a stack is inside `Trainer.train`: an exception that the script catches ends it unnoticed."""
    return any(
        frame.f_code.co_name == "train" and frame.f_code.co_filename.endswith("transformers/trainer.py")
        for frame in frames
    )


def compare_versions() -> None:
    """Raise if the processes run different software. A collective call of all processes.

    Raises:
        ValueError: on every rank, with the versions of all.
    """
    versions = {"ring_hf": __version__, "torch": torch.__version__}
    versions |= {"transformers": transformers.__version__, "accelerate": accelerate.__version__}
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    assert_equal_across_ranks({"the versions of the software": listed})


def compare_weights(accelerator_state: Any, model: torch.nn.Module) -> None:
    """Raise if FSDP2 would shard weights that differ between the processes, as after random numbers of other seeds. A
    collective call of all processes.

    DDP and DeepSpeed broadcast the weights of the first process, FSDP2 only with `cpu_ram_efficient_loading`. The
    first elements of every parameter are compared.

    Raises:
        ValueError: on every rank, with the hash of each.
    """
    plugin = getattr(accelerator_state, "fsdp_plugin", None)
    if plugin is None or plugin.fsdp_version != 2 or plugin.cpu_ram_efficient_loading:
        return
    parameters = list(model.parameters())
    if any(hasattr(parameter, "to_local") or parameter.is_meta for parameter in parameters):
        return  # sharded already, or loaded later
    samples = torch.cat([parameter.detach().flatten()[:16].double().cpu() for parameter in parameters])
    digest = hashlib.blake2b(samples.numpy().tobytes(), digest_size=8).hexdigest()
    assert_equal_across_ranks({"the weights (hash of the first ones of each parameter)": digest})


def check_before_saving(args: Any, model: torch.nn.Module, step: int, context: ProcessContext) -> None:
    """Raise if a checkpoint would hold weights that are not finite. A collective call of all processes.

    Args:
        args: `TrainingArguments`.
        step: optimizer steps so far.

    Raises:
        ValueError: on every rank.
    """
    error = find_nonfinite_weights(model.parameters())
    raise_on_all_ranks(None if error is None else f"After optimizer step {step}: {error}", {}, context)
