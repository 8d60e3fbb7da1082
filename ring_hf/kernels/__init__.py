"""Attention on tiles: `(out, lse)` forward, and backward from the global `out` and `lse`. No communication here.

A kernel is a module with `NAME`, `unfit(q, v, softcap)`, `forward(...)` and `backward(...)`; `choose` picks one by
name.
"""

from types import ModuleType

import torch

from . import cpu, reference
from .merge import State, Sum, accumulate_dtype, merge_
from .places import Place, Tokens, Windows

KERNELS: dict[str, ModuleType] = {kernel.NAME: kernel for kernel in (cpu, reference)}


def choose(name: str, q: torch.Tensor, v: torch.Tensor, softcap: float | None = None) -> ModuleType:
    """The kernel called `name`; "auto" takes the first of `KERNELS` that fits.

    Raises:
        ValueError: if there is no such kernel, or it cannot serve tensors like `q` and `v`, or the softcap.
    """
    if name == "auto":
        reasons = {kernel.NAME: kernel.unfit(q, v, softcap) for kernel in KERNELS.values()}
        for fitting, reason in reasons.items():
            if reason is None:
                return KERNELS[fitting]
        raise ValueError(f"No attention kernel fits: {'; '.join(f'{name}: {why}' for name, why in reasons.items())}.")
    if name not in KERNELS:
        raise ValueError(f"kernel={name!r} is not known. Choose one of auto, {', '.join(KERNELS)}.")
    reason = KERNELS[name].unfit(q, v, softcap)
    if reason is not None:
        raise ValueError(f'kernel={name!r} cannot serve this model: {reason}. Use kernel="auto" or another one.')
    return KERNELS[name]


__all__ = ["KERNELS", "Place", "State", "Sum", "Tokens", "Windows", "accumulate_dtype", "choose", "merge_"]
