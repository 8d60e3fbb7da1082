"""Compute a half-precision model in fp32 for the length of a trial step, without another copy of it.

In bf16, rounding makes gradients of two right computations differ by per cents, and a trial could not tell a small
mistake from it. Within `computing()`, every function of PyTorch gets its half-precision arguments, weights among
them, as fp32, and so does whoever uses its results. Gradients come back in the dtype of the weights.

Engines that gather weights in hooks (FSDP2, ZeRO-3) move them as they are.

What cannot run so (kernels for half precision only) fails, and its caller tries again in the model's own precision.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

HALF = (torch.bfloat16, torch.float16)
ENGINES = ("torch.distributed.fsdp", "deepspeed")
COMPUTES = "deepspeed.runtime.zero.linear"  # ZeRO-3 has linear layers of its own


class computing(TorchFunctionMode):
    """Within, functions of PyTorch compute in fp32 what they would compute in half precision.

    Automatic mixed precision, which works below these functions, must be off.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        attribute = getattr(func, "__name__", "") in ("__get__", "__set__")  # such as .dtype or .grad
        # Whose inputs are the weights themselves, not what they become.
        if attribute or func is torch.autograd.grad or _is_called_by_engine():
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs or {}))
        return tree_map_only(Tensor, _widened, func(*args, **kwargs))


def fits(model: nn.Module) -> bool:
    """Return whether a half-precision model can run in fp32: its kernels know it, and there is memory for weights that
    autograd keeps as fp32."""
    if any(type(module).__module__.startswith("bitsandbytes") for module in model.modules()):
        return False
    device = next(model.parameters()).device
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return 5 * sum(parameter.numel() for parameter in model.parameters()) < free


def _is_called_by_engine() -> bool:
    """Return whether the function of PyTorch that is being called was called by FSDP2 or DeepSpeed."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith(ENGINES):
            return name != COMPUTES
        if not name.startswith("torch."):
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in HALF else x
