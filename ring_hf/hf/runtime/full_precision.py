"""Compute a half-precision model in fp32 during a trial step, without a second copy of its weights.

In bf16, rounding makes the gradients of two correct computations differ by several percent, which would hide a small
mistake from a trial. Within `FullPrecisionMode()`, every PyTorch function receives its half-precision arguments
(including weights) as fp32 and returns fp32. Gradients come back in the dtype of the weights.

Engines that gather weights in hooks (FSDP2, ZeRO-3) still move them in their own dtype.

Operations without an fp32 implementation (kernels for half precision only) raise, and the trial is repeated in the
model's own precision.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

HALF_DTYPES = (torch.bfloat16, torch.float16)
ENGINE_PACKAGES = ("torch.distributed.fsdp", "deepspeed")
ZERO3_LINEAR_MODULE = "deepspeed.runtime.zero.linear"  # part of an engine package, but computes layers of the model


def trains_half_weights(model: nn.Module) -> bool:
    """Return whether any trained weight is in half precision, as TRL's adapters on quantised weights are in bf16."""
    return any(weight.dtype in HALF_DTYPES for weight in model.parameters() if weight.requires_grad)


class FullPrecisionMode(TorchFunctionMode):
    """Context in which PyTorch functions compute in fp32 instead of half precision.

    Automatic mixed precision, which acts below these functions, must be off.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        is_attribute = getattr(func, "__name__", "") in ("__get__", "__set__")  # .dtype, .grad, ...
        # `autograd.grad` takes the weights themselves, not their fp32 copies.
        if is_attribute or func is torch.autograd.grad or _is_called_by_engine():
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(Tensor, _to_fp32, (args, kwargs or {}))
        return tree_map_only(Tensor, _to_fp32, func(*args, **kwargs))


def can_run_in_fp32(model: nn.Module) -> bool:
    """Return whether a half-precision model can run in fp32: its kernels support it (bitsandbytes does not), and on
    CUDA there is free memory for the fp32 weights that autograd keeps (5 bytes per parameter)."""
    if any(type(module).__module__.startswith("bitsandbytes") for module in model.modules()):
        return False
    device = next(model.parameters()).device
    if device.type != "cuda":
        return True
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return 5 * sum(parameter.numel() for parameter in model.parameters()) < free_bytes


def _is_called_by_engine() -> bool:
    """Return whether FSDP2 or DeepSpeed called the PyTorch function that is being dispatched."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith(ENGINE_PACKAGES):
            return name != ZERO3_LINEAR_MODULE
        if not name.startswith("torch."):
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _to_fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in HALF_DTYPES else x
