"""Attention on tiles with PyTorch's CPU flash attention operator and its backward.

`aten._scaled_dot_product_flash_attention_for_cpu` returns lse, takes fewer key/value than query heads, and runs fp64,
fp32, bf16 (AMX where there is one) and fp16 without an S x S matrix. Its `is_causal` is aligned at the top left and it
knows no window: tiles are split (`pieces`). It wants one head dim: if that of the values differs (multi-head latent
attention), the smaller is padded with zeros.

It reads all keys and values of a head once for every few hundred queries, and backward it adds to their gradients as
often. Far beyond a core's cache that costs a tenth of its speed and more (scripts/LOG.md), so long keys are taken a
slice at a time, and the results merged as those of blocks are.
"""

import torch
from torch.nn.functional import pad

from .causal_blocks import CausalBlockKernel
from .merge import accumulate_dtype, merge_

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Results, and their copies in fp32, stay a part of the shard.
_ROWS = 4096
# Bytes of one head's keys and values that are read again and again: backward there are their gradients beside them.
_FORWARD_SLICE, _BACKWARD_SLICE = 2**22, 2**21
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def why_unsupported(q: torch.Tensor, v: torch.Tensor, softcap: float | None) -> str | None:
    """Why this kernel cannot serve such tensors, or None."""
    if q.device.type != "cpu":
        return f"the tensors are on {q.device.type}"
    if q.dtype not in _DTYPES:
        return f"dtype {q.dtype} is not one of {', '.join(str(dtype) for dtype in _DTYPES)}"
    if softcap is not None:
        return f"it has no soft-capping (softcap={softcap})"
    return None


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    slices = _slices(k, v, _FORWARD_SLICE)
    if len(slices) == 1:
        return _forward(q, k, v, 0.0, causal, scale=scale)
    out, lse = q.new_empty(0), q.new_empty(0)
    for place in slices:
        seen = slice(place.start, None) if causal else slice(None)  # by these queries and later ones
        one_out, one_lse = _forward(q[:, :, seen], k[:, :, place], v[:, :, place], 0.0, causal, scale=scale)
        if not place.start:
            out, lse = one_out.to(accumulate_dtype(q.dtype)), one_lse
        else:
            merge_(out[:, :, seen], lse[:, :, seen], one_out, one_lse)
    return out, lse


def _differentiate(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    slices = _slices(k, v, _BACKWARD_SLICE)
    if len(slices) == 1:
        return _backward(dout, q, k, v, out, lse, 0.0, causal, scale=scale)
    dq, dk, dv = q.new_empty(0), torch.empty_like(k), torch.empty_like(v)
    for place in slices:
        seen = slice(place.start, None) if causal else slice(None)
        given = dout[:, :, seen], q[:, :, seen], k[:, :, place], v[:, :, place], out[:, :, seen], lse[:, :, seen]
        one_dq, dk[:, :, place], dv[:, :, place] = _backward(*given, 0.0, causal, scale=scale)
        if not place.start:
            dq = one_dq.to(accumulate_dtype(q.dtype))
        else:
            dq[:, :, seen].add_(one_dq)
    return dq.to(q.dtype), dk, dv


def _slices(k: torch.Tensor, v: torch.Tensor, num_bytes: int) -> list[slice]:
    """The keys in as few slices of equal size as hold `num_bytes` at most."""
    num_k, per_token = k.shape[2], k.element_size() * (k.shape[3] + v.shape[3])
    size = -(-num_k // -(-num_k * per_token // num_bytes))
    return [slice(start, min(start + size, num_k)) for start in range(0, num_k, size)]


def _one_head_dim(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    width = max(x.shape[-1] for x in tensors)
    return tuple(x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1])) for x in tensors)


KERNEL = CausalBlockKernel("cpu", why_unsupported, _attend, _differentiate, _one_head_dim, _ROWS)
