"""Attention on tiles with the FlashAttention-2 inside PyTorch: CUDA without any other package.

`aten._flash_attention_forward` and `_backward` take windows, packed documents and fewer key/value than query heads,
and return lse; they know no soft-capping. What they compute is aligned at the bottom right, also `is_causal`, which is
therefore left False: the window says it all (`flash_calls`). Schemas from PyTorch 2.13, which the tests compare with
the installed one; limits from pytorch/pytorch:aten/src/ATen/native/transformers/cuda/sdp_utils.cpp and
flash_attn/flash_api.cpp beside it.

    _flash_attention_forward(query, key, value, cum_seq_q?, cum_seq_k?, max_q, max_k, dropout_p, is_causal,
        return_debug_mask, *, scale, window_size_left, window_size_right, ...) -> output, softmax_logsumexp, rng_state,
        unused, debug_attn_mask
    _flash_attention_backward(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k,
        dropout_p, is_causal, rng_state, unused, *, scale, window_size_left, window_size_right) -> dq, dk, dv

Letters: B batch, H query heads, K key/value heads, C queries of the shard, S keys of the block, D and E head dims.
"""

from typing import Any

import torch

from . import flash_calls
from .flash_calls import FlashKernel, KernelCall

_forward = torch.ops.aten._flash_attention_forward.default
_backward = torch.ops.aten._flash_attention_backward.default
# Too little shared memory for the backward of these head dims (sdp_utils: check_requires_grad_and_head_dim...).
_SMALL_DEVICES = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))


def unfit(q: torch.Tensor, v: torch.Tensor, softcap: float | None) -> str | None:
    """Why this kernel cannot serve such tensors, or None."""
    if (reason := flash_calls.unfit(q, v)) is not None:
        return reason
    if softcap is not None:
        return f"it has no soft-capping (softcap={softcap})"
    if not _is_built():
        return "this build of PyTorch has no flash attention for CUDA"
    width, found = max(q.shape[-1], v.shape[-1]), flash_calls.capability(q.device)
    if 192 < width <= 224 and found in _SMALL_DEVICES:
        return f"it has no backward for head dim {width} on compute capability {found[0]}.{found[1]}"
    return None


def _is_built() -> bool:
    return torch.backends.cuda.is_flash_attention_available()


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: KernelCall, scale: float, softcap: float | None
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
    call: KernelCall,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Where dropout's random numbers would begin: without dropout nobody reads it.
    begin, unused = (torch.zeros(shape, dtype=torch.uint64, device=q.device) for shape in ((2,), ()))
    no_dropout = 0.0, False, begin, unused
    return _backward(dout, q, k, v, out, lse, *_lengths(call, q, k), *no_dropout, scale=scale, **_window(call))


def _lengths(call: KernelCall, q: torch.Tensor, k: torch.Tensor) -> tuple[Any, ...]:
    documents = call.documents
    if documents is None:
        return None, None, q.shape[1], k.shape[1]
    return documents.cu_q, documents.cu_k, documents.max_q, documents.max_k


def _window(call: KernelCall) -> dict[str, int | None]:
    return {"window_size_left": call.left, "window_size_right": call.right}


KERNEL = FlashKernel("cuda_flash", unfit, _attend, _differentiate)
