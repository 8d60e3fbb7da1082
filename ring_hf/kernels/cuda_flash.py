"""Attention on tiles with the FlashAttention inside PyTorch: CUDA without any other package.

`aten._flash_attention_forward` and `_backward` take windows, packed documents and fewer key/value than query heads,
and return lse; they know no soft-capping. What they compute is aligned at the bottom right, also `is_causal`, which is
therefore left False: the window says it all (`flash_calls`). Schemas from PyTorch 2.13, which the tests compare with
the installed one; limits from pytorch/pytorch:aten/src/ATen/native/transformers/cuda/sdp_utils.cpp and
flash_attn/flash_api.cpp beside it.

These operators run FlashAttention-2, or what `torch.nn.attention.activate_flash_attention_impl("FA3")` or `("FA4")`
put in their place for the whole process (where PyTorch has it; the package must be installed). That is the user's to
call, once, before training: it changes every attention of PyTorch. Here its limits are heeded and its name is logged.
Read in PyTorch 2.13's torch/nn/attention/_fa3.py and _fa4.py: the same arguments, no dropout, rows that see nothing
have lse -inf. FlashAttention-4 must return two results there, so be older than 4.0.0b19.

    _flash_attention_forward(query, key, value, cum_seq_q?, cum_seq_k?, max_q, max_k, dropout_p, is_causal,
        return_debug_mask, *, scale, window_size_left, window_size_right, ...) -> output, softmax_logsumexp, rng_state,
        unused, debug_attn_mask
    _flash_attention_backward(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k,
        dropout_p, is_causal, rng_state, unused, *, scale, window_size_left, window_size_right) -> dq, dk, dv

Letters: B batch, H query heads, K key/value heads, C queries of the shard, S keys of the block, D and E head dims.
"""

import functools
import importlib.metadata
import logging
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.attention

from . import flash_varlen
from .flash_varlen import FlashKernel, FlashLaunch, dotted

logger = logging.getLogger("ring_hf")

_forward = torch.ops.aten._flash_attention_forward.default
_backward = torch.ops.aten._flash_attention_backward.default
# Too little shared memory for the backward of these head dims (sdp_utils: check_requires_grad_and_head_dim...).
_SMALL_DEVICES = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))


@dataclass(frozen=True, slots=True)
class Limits:
    """Of an implementation that was activated: major compute capabilities, and head dims by them."""

    majors: tuple[int, ...]
    widest: dict[int, int]  # by major compute capability; values are padded to the head dim of the keys
    deterministic: int  # widest whose backward can be


# hopper/flash_api.cpp and flash_attn/cute/interface.py of Dao-AILab/flash-attention, and PyTorch's wrappers of both.
LIMITS = {"FA3": Limits((9,), {}, 192), "FA4": Limits((9, 10), {10: 128}, 256)}
_FOUR_RESULTS = 19  # from this beta of 4.0.0 on


def why_unsupported(q: torch.Tensor, v: torch.Tensor, softcap: float | None) -> str | None:
    """Why this kernel cannot serve such tensors, or None."""
    if (reason := flash_varlen.why_unsupported(q, v)) is not None:
        return reason
    if softcap is not None:
        return f"it has no soft-capping (softcap={softcap})"
    if not _is_built():
        return "this build of PyTorch has no flash attention for CUDA"
    width, found = max(q.shape[-1], v.shape[-1]), flash_varlen.capability(q.device)
    assert found is not None
    if (name := activated()) is not None:
        return _unfit_for(name, width, found)
    if 192 < width <= 224 and found in _SMALL_DEVICES:
        return f"it has no backward for head dim {width} on compute capability {dotted(found)}"
    return None


def _is_built() -> bool:
    return torch.backends.cuda.is_flash_attention_available()


def activated() -> str | None:
    """What `activate_flash_attention_impl` put in the place of FlashAttention-2, "FA3" or "FA4"; else None."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return current() if current else None


def _unfit_for(name: str, width: int, found: tuple[int, int]) -> str | None:
    """Why an activated implementation cannot serve a head dim on a device, or None, which is logged."""
    if name not in LIMITS:
        return f"{name}, which was activated in PyTorch, is not known here: {', '.join(LIMITS)} are"
    limits, undo = LIMITS[name], "torch.nn.attention.restore_flash_attention_impl() undoes it"
    if found[0] not in limits.majors:
        majors = " and ".join(f"{major}.x" for major in limits.majors)
        return f"{name} was activated in PyTorch but is for compute capability {majors}, not {dotted(found)}; {undo}"
    if width > (widest := limits.widest.get(found[0], flash_varlen.WIDEST)):
        return f"{name} was activated in PyTorch but takes head dims up to {widest} here, not {width}; {undo}"
    if torch.are_deterministic_algorithms_enabled() and width > limits.deterministic:
        return f"{name} was activated in PyTorch but is not deterministic for head dim {width}; {undo}"
    if name == "FA4" and (version := _too_new()) is not None:
        return f"flash-attn-4 {version} returns more than PyTorch unpacks; install one before 4.0.0b{_FOUR_RESULTS}"
    _tell(name)
    return None


def _too_new() -> str | None:
    """The installed version of flash-attn-4 if PyTorch's wrapper cannot call it, else None."""
    try:
        version = importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return None
    found = re.fullmatch(r"4\.0\.0\.?(?:b|beta)(\d+)", version.split("+")[0])
    return version if found is None or int(found.group(1)) >= _FOUR_RESULTS else None


@functools.cache
def _tell(name: str) -> None:
    logger.info("kernel cuda_flash runs %s, which was activated in PyTorch", name)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: FlashLaunch, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = _forward(q, k, v, *_lengths(call, q, k), 0.0, False, False, scale=scale, **_window(call))
    return out, lse


def _differentiate(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: FlashLaunch,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Where dropout's random numbers would begin: without dropout nobody reads it.
    begin, unused = (torch.zeros(shape, dtype=torch.uint64, device=q.device) for shape in ((2,), ()))
    no_dropout = 0.0, False, begin, unused
    return _backward(dout, q, k, v, out, lse, *_lengths(call, q, k), *no_dropout, scale=scale, **_window(call))


def _lengths(call: FlashLaunch, q: torch.Tensor, k: torch.Tensor) -> tuple[Any, ...]:
    documents = call.documents
    if documents is None:
        return None, None, q.shape[1], k.shape[1]
    return documents.cu_q, documents.cu_k, documents.max_q, documents.max_k


def _window(call: FlashLaunch) -> dict[str, int | None]:
    return {"window_size_left": call.left, "window_size_right": call.right}


KERNEL = FlashKernel("cuda_flash", why_unsupported, _attend, _differentiate)
