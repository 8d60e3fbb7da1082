"""Models in fp64 without the roundings to fp32 that they ask for themselves.

Norms and routers of Transformers compute in fp32 whatever the dtype of the model. Two computations that differ by
1e-16 then agree bit for bit, or differ by 1e-7, where a number was rounded to the other side. Within
`DoublePrecision()` such casts of fp64 do nothing, so that results can be compared at the precision of fp64.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

CASTS = {Tensor.to, Tensor.type}


class DoublePrecision(TorchFunctionMode):
    """Context in which fp64 tensors stay fp64."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_double = bool(args) and isinstance(args[0], Tensor) and args[0].dtype == torch.float64
        if is_double and func is Tensor.float:
            return args[0]
        if is_double and (func in CASTS or "dtype" in kwargs):
            args, kwargs = tree_map_only(torch.dtype, _widened, (args, kwargs))
        return func(*args, **kwargs)


def _widened(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float32 else dtype
