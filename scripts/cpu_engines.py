"""Arguments with which a Trainer runs on FSDP2 or ZeRO-3 on CPU processes, for scripts that watch how they end.

Accelerate has no FSDP on CPUs and would run DDP: it is told that there is another device, and then runs its own code.
DeepSpeed would first compile a kernel for shared memory, which is left out, and keeps weights as small as these whole
unless its thresholds are 0.
"""

import importlib
import os
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

ENGINES = ("DDP", "FSDP2", "ZeRO-3")


def environment_of(engine: str) -> dict[str, str]:
    """Return the environment variables with which a launch for an engine has to start."""
    if engine == "ZeRO-3":
        return {"ACCELERATE_USE_CPU": "false"}
    return {"ACCELERATE_USE_CPU": "true", **({"ACCELERATE_TORCH_DEVICE": "cpu"} if engine == "FSDP2" else {})}


def engine_settings(engine: str) -> dict[str, Any]:
    """Return arguments of `TrainingArguments`; to be called before those are made."""
    if engine == "DDP":
        return {"use_cpu": True}
    if engine == "FSDP2":
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
        os.environ["FSDP_OFFLOAD_PARAMS"] = "false"
        settings = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "cpu_ram_efficient_loading": False}
        configured = {"use_configured_state": True}
        return {"accelerator_config": configured, "fsdp": "full_shard auto_wrap", "fsdp_config": settings}
    backend: Any = importlib.import_module("deepspeed.comm.torch")  # the attribute of that name is torch itself
    backend.build_shm_op = lambda: None
    zeros = ("stage3_param_persistence_threshold", "stage3_max_reuse_distance", "stage3_max_live_parameters")
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True, **dict.fromkeys(zeros, 0)}
    automatic = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    config = {**dict.fromkeys((*automatic, "gradient_clipping"), "auto"), "zero_optimization": zero}
    return {"use_cpu": True, "deepspeed": {**config, "zero_force_ds_cpu_optimizer": False}}
