"""Attention on tiles with PyTorch's CPU flash attention operator and its backward.

`aten._scaled_dot_product_flash_attention_for_cpu` returns lse, takes fewer key/value than query heads, and runs fp64,
fp32, bf16 (AMX where there is one) and fp16 without an S x S matrix. Its `is_causal` is aligned at the top left and it
knows no window: tiles are split (`pieces`). It wants one head dim: if that of the values differs (multi-head latent
attention), the smaller is padded with zeros.
"""

import torch
from torch.nn.functional import pad

from .pieces import PieceKernel

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Results, and their copies in fp32, stay a part of the shard.
_ROWS = 4096
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def unfit(q: torch.Tensor, v: torch.Tensor, softcap: float | None) -> str | None:
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
    return _forward(q, k, v, 0.0, causal, scale=scale)


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
    return _backward(dout, q, k, v, out, lse, 0.0, causal, scale=scale)


def _one_head_dim(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    width = max(x.shape[-1] for x in tensors)
    return tuple(x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1])) for x in tensors)


KERNEL = PieceKernel("cpu", unfit, _attend, _differentiate, _one_head_dim, _ROWS)
