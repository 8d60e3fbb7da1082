"""Attention on tiles with the FlashAttention inside PyTorch: CUDA without any other package.

`aten._flash_attention_forward` and `_backward` take windows, packed documents and fewer key/value than query heads,
and return lse; they have no soft-capping. Their masks are aligned at the bottom right, `is_causal` too, which
therefore stays False: the window describes every mask (`flash_varlen`). They run FlashAttention-2, or the
implementation that the user activated for the whole process with `torch.nn.attention.activate_flash_attention_impl`,
whose limits are checked and whose name is logged. Schemas and sources: tests/kernels/README.md.

Letters: B batch, H query heads, K key/value heads, C queries of the shard, S keys of the block, D and E head dims.
"""

import functools
import importlib.metadata
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.attention

from . import flash_varlen
from .flash_varlen import FlashKernel, FlashLaunch, format_version

logger = logging.getLogger("ring_hf")

_ATEN_FORWARD = torch.ops.aten._flash_attention_forward.default
_ATEN_BACKWARD = torch.ops.aten._flash_attention_backward.default
# Too little shared memory for the backward of these head dims (sdp_utils: check_requires_grad_and_head_dim...).
_SMALL_DEVICES = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))


@dataclass(frozen=True, slots=True)
class ImplementationLimits:
    """Limits of an implementation that was activated.

    Args:
        majors: the major compute capabilities it supports.
        max_head_dims: the largest head dim by major compute capability, where it is below that of FlashAttention-2.
            Values are padded to the head dim of the keys.
        max_deterministic_head_dim: the largest head dim with a deterministic backward.
    """

    majors: tuple[int, ...]
    max_head_dims: Mapping[int, int]
    max_deterministic_head_dim: int


# hopper/flash_api.cpp and flash_attn/cute/interface.py of Dao-AILab/flash-attention, and PyTorch's wrappers of both.
LIMITS = {"FA3": ImplementationLimits((9,), {}, 192), "FA4": ImplementationLimits((9, 10), {10: 128}, 256)}
_FIRST_UNSUPPORTED_BETA = 19  # since this beta of 4.0.0, FlashAttention-4 returns four results


def why_unsupported(q: torch.Tensor, v: torch.Tensor, softcap: float | None) -> str | None:
    """Return why this kernel does not support a call, or None; see `Kernel`."""
    if (reason := flash_varlen.why_unsupported(q, v)) is not None:
        return reason
    if softcap is not None:
        return f"it has no soft-capping (softcap={softcap})"
    if not _is_built():
        return "this build of PyTorch has no flash attention for CUDA"
    head_dim, capability = max(q.shape[-1], v.shape[-1]), flash_varlen.get_capability(q.device)
    assert capability is not None
    implementation = activated_implementation()
    if implementation is not None:
        return _why_implementation_unsupported(implementation, head_dim, capability)
    if 192 < head_dim <= 224 and capability in _SMALL_DEVICES:
        return f"it has no backward for head dim {head_dim} on compute capability {format_version(capability)}"
    return None


def _is_built() -> bool:
    return torch.backends.cuda.is_flash_attention_available()


def activated_implementation() -> str | None:
    """Return "FA3" or "FA4" if `activate_flash_attention_impl` replaced FlashAttention-2 in PyTorch, else None."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return current() if current else None


def _why_implementation_unsupported(name: str, head_dim: int, capability: tuple[int, int]) -> str | None:
    """Return why an activated implementation does not support a head dim on a device; log its name if it does."""
    if name not in LIMITS:
        return f"{name}, which was activated in PyTorch, is not known here: {', '.join(LIMITS)} are"
    limits = LIMITS[name]
    activated = f"{name} was activated in PyTorch but"
    undo = "torch.nn.attention.restore_flash_attention_impl() undoes it"
    major = capability[0]
    if major not in limits.majors:
        majors = " and ".join(f"{supported}.x" for supported in limits.majors)
        return f"{activated} requires compute capability {majors}, not {format_version(capability)}; {undo}"
    max_head_dim = limits.max_head_dims.get(major, flash_varlen.MAX_HEAD_DIM)
    if head_dim > max_head_dim:
        return f"{activated} takes head dims up to {max_head_dim} on this device, not {head_dim}; {undo}"
    if torch.are_deterministic_algorithms_enabled() and head_dim > limits.max_deterministic_head_dim:
        return f"{activated} is not deterministic for head dim {head_dim}; {undo}"
    if name == "FA4" and (version := _unsupported_flash_attn_4()) is not None:
        return (
            f"flash-attn-4 {version} returns more results than PyTorch unpacks; "
            f"install a version before 4.0.0b{_FIRST_UNSUPPORTED_BETA}"
        )
    _log_implementation(name)
    return None


def _unsupported_flash_attn_4() -> str | None:
    """Return the installed version of flash-attn-4 if PyTorch's wrapper cannot call it, else None."""
    try:
        version = importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return None
    match = re.fullmatch(r"4\.0\.0\.?(?:b|beta)(\d+)", version.split("+")[0])
    return version if match is None or int(match.group(1)) >= _FIRST_UNSUPPORTED_BETA else None


@functools.cache
def _log_implementation(name: str) -> None:
    logger.info("kernel cuda_flash runs %s, which was activated in PyTorch", name)


def _launch_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, launch: FlashLaunch, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    lengths, window = _lengths(launch, q, k), _window(launch)
    out, lse, *_ = _ATEN_FORWARD(q, k, v, *lengths, 0.0, False, False, scale=scale, **window)
    return out, lse


def _launch_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    launch: FlashLaunch,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # The state of dropout's random numbers, which are not read without dropout.
    rng_state, unused = (torch.zeros(shape, dtype=torch.uint64, device=q.device) for shape in ((2,), ()))
    dropout = 0.0, False, rng_state, unused
    lengths, window = _lengths(launch, q, k), _window(launch)
    return _ATEN_BACKWARD(dout, q, k, v, out, lse, *lengths, *dropout, scale=scale, **window)


def _lengths(launch: FlashLaunch, q: torch.Tensor, k: torch.Tensor) -> tuple[Any, ...]:
    """Return the arguments `cum_seq_q, cum_seq_k, max_q, max_k`."""
    varlen = launch.varlen
    if varlen is None:
        return None, None, q.shape[1], k.shape[1]
    return varlen.cu_seqlens_q, varlen.cu_seqlens_k, varlen.max_seqlen_q, varlen.max_seqlen_k


def _window(launch: FlashLaunch) -> dict[str, int | None]:
    return {"window_size_left": launch.left, "window_size_right": launch.right}


KERNEL = FlashKernel("cuda_flash", why_unsupported, _launch_forward, _launch_backward)
