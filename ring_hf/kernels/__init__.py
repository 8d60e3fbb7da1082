"""Attention on tiles: `(out, lse)` forward, and backward from the global `out` and `lse`. No communication here.

Whatever has the shape of `Kernel` is one, a module or an object. `choose` picks one by name, by the name of a family,
or "auto": the first of `KERNELS` that fits, so flash-attn where it is installed, else PyTorch's CUDA operators, else
PyTorch's CPU operator, else the eager reference. A kernel of the hub is only taken by its own name, as it is loaded
over the network.
"""

import logging
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

from ..geometry import Tile
from . import cpu, cuda_cudnn, cuda_efficient, cuda_flash, flash_attn_2, flash_attn_3, flash_attn_4, hub, reference
from .indexing import GatherIndex, StridedWindows, TokenIndex
from .merge import GradAccumulator, OutLseAccumulator, accumulate_dtype, merge_


class Kernel(Protocol):
    """Attention on tiles; a result names the tokens it is for."""

    @property
    def NAME(self) -> str: ...

    def why_unsupported(self, q: torch.Tensor, v: torch.Tensor, softcap: float | None) -> str | None:
        """Why this kernel cannot serve such tensors, or None."""

    def forward(
        self,
        q_BHCD: torch.Tensor,
        k_BKSD: torch.Tensor,
        v_BKSE: torch.Tensor,
        tiles: Iterable[Tile],
        scale: float,
        softcap: float | None = None,
    ) -> Iterator[tuple[TokenIndex, torch.Tensor, torch.Tensor]]:
        """Yields `(queries, out, lse)`."""

    def backward(
        self,
        dout_BHCE: torch.Tensor,
        q_BHCD: torch.Tensor,
        k_BKSD: torch.Tensor,
        v_BKSE: torch.Tensor,
        out_BHCE: torch.Tensor,
        lse_BHC: torch.Tensor,
        tiles: Iterable[Tile],
        scale: float,
        softcap: float | None = None,
    ) -> Iterator[tuple[TokenIndex, TokenIndex, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yields `(queries, keys, dq, dk, dv)`, from the global `out` and `lse`."""


_IN_ORDER: tuple[Kernel, ...] = (
    flash_attn_3.KERNEL,
    flash_attn_4.KERNEL,
    flash_attn_2.KERNEL,
    cuda_cudnn.KERNEL,
    cuda_flash.KERNEL,
    cuda_efficient.KERNEL,
    cpu.KERNEL,
    reference,
)
KERNELS: dict[str, Kernel] = {kernel.NAME: kernel for kernel in _IN_ORDER}
# Of a family, as of all, the first that fits is taken.
FAMILIES = {
    family: tuple(name for name in KERNELS if name.startswith(f"{family}_")) for family in ("flash_attn", "cuda")
}
logger = logging.getLogger("ring_hf")
_told: set[str] = set()


def check_name(name: str) -> None:
    """Raises ValueError if no kernel or family has this name; nothing is looked for or loaded."""
    if name != "auto" and not any(name in known for known in (FAMILIES, KERNELS, hub.KERNELS)):
        known = ", ".join(("auto", *FAMILIES, *KERNELS))
        raise ValueError(
            f"kernel={name!r} is not known. Choose one of {known}, or of the hub {', '.join(hub.KERNELS)}."
        )


@torch.compiler.disable  # packages and devices are looked for, which no graph can hold
def choose(name: str, q: torch.Tensor, v: torch.Tensor, softcap: float | None = None) -> Kernel:
    """The first kernel of those that `name` stands for that fits, told once in the log.

    Raises:
        ValueError: if there is no such kernel, or none can serve tensors like `q` and `v`, or the softcap.
    """
    reasons = candidates(name, q, v, softcap)
    for fitting, reason in reasons.items():
        if reason is None:
            if fitting != name:
                _tell(fitting, reasons)
            return _kernel(fitting)
    why = "; ".join(reason if other == name else f"{other}: {reason}" for other, reason in reasons.items() if reason)
    if name == "auto":
        raise ValueError(f"No attention kernel fits: {why}.")
    raise ValueError(f'kernel={name!r} cannot serve this model: {why}. Use kernel="auto" or another one.')


def candidates(name: str, q: torch.Tensor, v: torch.Tensor, softcap: float | None = None) -> dict[str, str | None]:
    """The kernels that `name` stands for in order of preference, each with the reason why it does not fit, or None."""
    check_name(name)
    names = FAMILIES.get(name, (name,)) if name != "auto" else tuple(KERNELS)
    return {one: _kernel(one).why_unsupported(q, v, softcap) for one in names}


def _kernel(name: str) -> Kernel:
    return hub.KERNELS[name] if name in hub.KERNELS else KERNELS[name]


def _tell(fitting: str, reasons: dict[str, str | None]) -> None:
    """Says once in the log which kernel was chosen, and why none of those before it."""
    before = list(reasons)[: list(reasons).index(fitting)]
    why = "; ".join(f"not {name}, as {reasons[name]}" for name in before)
    if (line := f"kernel {fitting}: {why or 'the first choice'}") not in _told:
        _told.add(line)
        logger.info(line)


__all__ = [
    "FAMILIES",
    "KERNELS",
    "GatherIndex",
    "GradAccumulator",
    "Kernel",
    "OutLseAccumulator",
    "StridedWindows",
    "TokenIndex",
    "accumulate_dtype",
    "candidates",
    "check_name",
    "choose",
    "merge_",
]
