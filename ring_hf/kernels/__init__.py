"""Attention on tiles: `(out, lse)` forward, and backward from the global `out` and `lse`. No communication here.

A kernel is a module with `NAME`, `unfit(q, v, softcap)`, `forward(...)` and `backward(...)`; `choose` picks one by
name. "auto" takes the first of `KERNELS` that fits: flash-attn where it is installed, else PyTorch's CUDA operators,
else PyTorch's CPU operator, else the eager reference.
"""

import logging
from types import ModuleType

import torch

from . import cpu, cuda, flash_attn, reference
from .merge import State, Sum, accumulate_dtype, merge_
from .places import Place, Tokens, Windows

KERNELS: dict[str, ModuleType] = {kernel.NAME: kernel for kernel in (flash_attn, cuda, cpu, reference)}
logger = logging.getLogger("ring_hf")
_told: set[str] = set()


@torch.compiler.disable  # packages and devices are looked for, which no graph can hold
def choose(name: str, q: torch.Tensor, v: torch.Tensor, softcap: float | None = None) -> ModuleType:
    """The kernel called `name`; "auto" takes the first of `KERNELS` that fits.

    Raises:
        ValueError: if there is no such kernel, or it cannot serve tensors like `q` and `v`, or the softcap.
    """
    if name == "auto":
        reasons = {kernel.NAME: kernel.unfit(q, v, softcap) for kernel in KERNELS.values()}
        for fitting, reason in reasons.items():
            if reason is None:
                _tell(fitting, reasons)
                return KERNELS[fitting]
        raise ValueError(f"No attention kernel fits: {'; '.join(f'{name}: {why}' for name, why in reasons.items())}.")
    if name not in KERNELS:
        raise ValueError(f"kernel={name!r} is not known. Choose one of auto, {', '.join(KERNELS)}.")
    reason = KERNELS[name].unfit(q, v, softcap)
    if reason is not None:
        raise ValueError(f'kernel={name!r} cannot serve this model: {reason}. Use kernel="auto" or another one.')
    return KERNELS[name]


def _tell(fitting: str, reasons: dict[str, str | None]) -> None:
    """Says once in the log which kernel was chosen, and why none of those before it."""
    before = list(reasons)[: list(reasons).index(fitting)]
    why = "; ".join(f"not {name}, as {reasons[name]}" for name in before)
    if (line := f"kernel {fitting}: {why or 'the first choice'}") not in _told:
        _told.add(line)
        logger.info(line)


__all__ = ["KERNELS", "Place", "State", "Sum", "Tokens", "Windows", "accumulate_dtype", "choose", "merge_"]
