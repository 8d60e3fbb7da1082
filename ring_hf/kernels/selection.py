"""Choose an attention kernel by its name, by the name of a family, or by "auto".

"auto" is the first of `KERNELS` that supports the call: flash-attn where it is installed, else PyTorch's CUDA
operators, else PyTorch's CPU operator, else the eager reference. A kernel of the hub is only chosen by its own name,
because it is loaded over the network.
"""

import logging
import os
from collections.abc import Hashable

import torch

from . import cpu, cuda_cudnn, cuda_efficient, cuda_flash, flash_attn_2, flash_attn_3, flash_attn_4, hub, reference
from .kernel import Kernel

_BY_PREFERENCE: tuple[Kernel, ...] = (
    flash_attn_3.KERNEL,
    flash_attn_4.KERNEL,
    flash_attn_2.KERNEL,
    cuda_cudnn.KERNEL,
    cuda_flash.KERNEL,
    cuda_efficient.KERNEL,
    cpu.KERNEL,
    reference,
)
KERNELS: dict[str, Kernel] = {kernel.NAME: kernel for kernel in _BY_PREFERENCE}
# The name of a family stands for its first kernel that supports the call, in the order of KERNELS.
FAMILIES = {
    family: tuple(name for name in KERNELS if name.startswith(f"{family}_")) for family in ("flash_attn", "cuda")
}
logger = logging.getLogger("ring_hf")
_chosen_names: dict[Hashable, str] = {}  # by `_cache_key`
_logged_choices: set[str] = set()


def check_name(name: str) -> None:
    """Check the name of a kernel or family without importing or loading it.

    Raises:
        ValueError: if no kernel or family has this name.
    """
    if name == "auto" or name in FAMILIES or name in KERNELS or name in hub.KERNELS:
        return
    names = ", ".join(("auto", *FAMILIES, *KERNELS))
    raise ValueError(f"kernel={name!r} is not known. Choose one of {names}, or of the hub {', '.join(hub.KERNELS)}.")


@torch.compiler.disable  # it imports packages and queries devices, which a graph cannot hold
def choose(name: str, q: torch.Tensor, v: torch.Tensor, softcap: float | None = None) -> Kernel:
    """Return the first kernel that `name` stands for and that supports the call.

    The kernels are checked once per kind of call (`_cache_key`), and each choice is logged once. Refusals are not
    cached.

    Args:
        name: "auto", a key of `KERNELS` or `FAMILIES`, or a repository of the hub.
        q: queries `[B, H, C, D]`.
        v: values `[B, K, S, E]`.
        softcap: bound of the scores, None without one.

    Raises:
        ValueError: if no kernel or family has this name, or none of its kernels supports the call.
    """
    key = _cache_key(name, q, v, softcap)
    kernel_name = _chosen_names.get(key)
    if kernel_name is None:
        kernel_name = _first_supported(name, q, v, softcap)
        if key is not None:
            _chosen_names[key] = kernel_name
    return _find_kernel(kernel_name)


def candidates(name: str, q: torch.Tensor, v: torch.Tensor, softcap: float | None = None) -> dict[str, str | None]:
    """Return the kernels that `name` stands for, by preference, each with why it does not support the call or None.

    The arguments are those of `choose`.

    Raises:
        ValueError: if no kernel or family has this name.
    """
    check_name(name)
    names = tuple(KERNELS) if name == "auto" else FAMILIES.get(name, (name,))
    return {kernel_name: _find_kernel(kernel_name).why_unsupported(q, v, softcap) for kernel_name in names}


def clear_cache() -> None:
    """Discard all choices of `choose`: for tests that replace packages, devices or limits of kernels."""
    _chosen_names.clear()


def _cache_key(name: str, q: torch.Tensor, v: torch.Tensor, softcap: float | None) -> Hashable | None:
    """Return every value that any `why_unsupported` reads and that can change within a process.

    Return None for the symbolic sizes of a tracer, which cannot be hashed.
    """
    sizes = (*q.shape[:2], q.shape[-1], v.shape[-1])
    if any(isinstance(size, torch.SymInt) for size in sizes):
        return None
    settings = (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
        cuda_flash.activated_implementation(),
        os.environ.get(cuda_cudnn.AVOID_RECOMPILE),
    )
    return name, q.device, q.dtype, sizes, softcap, settings


def _first_supported(name: str, q: torch.Tensor, v: torch.Tensor, softcap: float | None) -> str:
    reasons = candidates(name, q, v, softcap)
    for kernel_name, reason in reasons.items():
        if reason is None:
            if kernel_name != name:
                _log_choice(kernel_name, reasons)
            return kernel_name
    explanation = "; ".join(reason if key == name else f"{key}: {reason}" for key, reason in reasons.items() if reason)
    if name == "auto":
        raise ValueError(f"No attention kernel fits: {explanation}.")
    raise ValueError(f'kernel={name!r} cannot serve this model: {explanation}. Use kernel="auto" or another kernel.')


def _find_kernel(name: str) -> Kernel:
    return hub.KERNELS[name] if name in hub.KERNELS else KERNELS[name]


def _log_choice(chosen: str, reasons: dict[str, str | None]) -> None:
    """Log once which kernel was chosen, and why each preferred one was not."""
    preferred = list(reasons)[: list(reasons).index(chosen)]
    explanation = "; ".join(f"not {name}, as {reasons[name]}" for name in preferred)
    line = f"kernel {chosen}: {explanation or 'the first choice'}"
    if line not in _logged_choices:
        _logged_choices.add(line)
        logger.info(line)
