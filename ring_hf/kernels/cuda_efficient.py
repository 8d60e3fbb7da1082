"""Attention on tiles with PyTorch's memory-efficient attention (cutlass), for calls its flash attention cannot take.

These are fp32, fp16 below compute capability 8.0, head dims above 256, and values with another head dim than the keys
without padding. `is_causal` is aligned at the top left and windows are not used, so tiles are split into blocks
(`causal_blocks`). All heads must be alike: the query heads of a key/value head become heads, key/value heads become
rows of the batch, and gradients of keys and values are summed over heads in fp32. Layouts that the operators require,
schemas and sources: tests/kernels/README.md.

Letters: B batch, H query heads, K key/value heads, G query heads of each, C queries, S keys, D and E head dims.
"""

import torch
from torch.nn.functional import pad

from . import flash_varlen
from .causal_blocks import CausalBlockKernel, pad_to_multiple
from .flash_varlen import format_version
from .merge import accumulate_dtype

DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
_MIN_CAPABILITY, _MAX_CAPABILITY = (5, 0), (12, 1)
_LOAD_BYTES = 16  # head dims, strides and storage offsets must be multiples of it
_LSE_MULTIPLE = 32  # rows of lse are padded to a multiple of it (kernel_forward.h:114)
_ATEN_FORWARD = torch.ops.aten._scaled_dot_product_efficient_attention.default
_ATEN_BACKWARD = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default


def why_unsupported(q: torch.Tensor, v: torch.Tensor, softcap: float | None) -> str | None:
    """Return why this kernel does not support a call, or None; see `Kernel`."""
    if q.device.type != flash_varlen.DEVICE_TYPE:
        return f"the tensors are on {q.device.type}"
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype} is not one of {', '.join(str(dtype) for dtype in DTYPES)}"
    if softcap is not None:
        return f"it has no soft-capping (softcap={softcap})"
    if torch.version.hip:
        return "the device is driven by ROCm, whose kernels differ"
    capability = flash_varlen.get_capability(q.device)
    if capability is None:
        return "PyTorch finds no CUDA device"
    text = format_version(capability)
    if not _MIN_CAPABILITY <= capability <= _MAX_CAPABILITY:
        bounds = f"{format_version(_MIN_CAPABILITY)} and {format_version(_MAX_CAPABILITY)}"
        return f"compute capability {text} is not between {bounds}"
    if q.dtype == torch.bfloat16 and capability < (8, 0):
        return f"it takes torch.bfloat16 from compute capability 8.0 on, not on {text}"
    return None


def _forward_block(
    q_BHCD: torch.Tensor, k_BKSD: torch.Tensor, v_BKSE: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows, num_kv_heads = k_BKSD.shape[:2]
    q, k, v = _equalize_heads(q_BHCD, k_BKSD, v_BKSE)
    out, lse, *_ = _ATEN_FORWARD(q, k, v, None, True, 0.0, causal, scale=scale)
    lse = lse.narrow(-1, 0, q.shape[2])
    if q is q_BHCD:
        return out, lse
    return tuple(x.unflatten(0, (num_rows, num_kv_heads)).flatten(1, 2) for x in (out, lse))


def _backward_block(
    dout_BHCE: torch.Tensor,
    q_BHCD: torch.Tensor,
    k_BKSD: torch.Tensor,
    v_BKSE: torch.Tensor,
    out_BHCE: torch.Tensor,
    lse_BHC: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_rows, num_kv_heads = k_BKSD.shape[:2]
    q, k, v = _equalize_heads(q_BHCD, k_BKSD, v_BKSE)
    dout, out, lse = dout_BHCE, out_BHCE, _pad_lse(lse_BHC)
    if q is not q_BHCD:
        dout, out, lse = (_move_groups_to_batch(x, num_kv_heads) for x in (dout, out, lse))
    out = _to_dense_rows(out)
    # The state of dropout's random numbers, which are not read without dropout.
    seed, offset = (torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2))
    needs_grad = [True, True, True, False]
    dq, dk, dv, _ = _ATEN_BACKWARD(dout, q, k, v, None, out, lse, seed, offset, 0.0, needs_grad, causal, scale=scale)
    if q is q_BHCD:
        return dq, dk, dv
    dk, dv = (x.sum(1, dtype=accumulate_dtype(x.dtype)).unflatten(0, (num_rows, num_kv_heads)) for x in (dk, dv))
    return dq.unflatten(0, (num_rows, num_kv_heads)).flatten(1, 2), dk, dv


def _equalize_heads(
    q_BHCD: torch.Tensor, k_BKSD: torch.Tensor, v_BKSE: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q, k and v with equally many heads: unchanged, or `[B * K, G, ...]` with k and v as views of stride 0."""
    num_kv_heads = k_BKSD.shape[1]
    num_groups = q_BHCD.shape[1] // num_kv_heads
    if num_groups == 1:
        return q_BHCD, k_BKSD, v_BKSE
    k, v = (x.flatten(0, 1).unsqueeze(1).expand(-1, num_groups, -1, -1) for x in (k_BKSD, v_BKSE))
    return _move_groups_to_batch(q_BHCD, num_kv_heads), k, v


def _move_groups_to_batch(x_BHC: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Return `[B, H, C, ...]` as `[B * K, G, C, ...]`."""
    return x_BHC.unflatten(1, (num_kv_heads, -1)).flatten(0, 1)


def _to_dense_rows(out_BHCE: torch.Tensor) -> torch.Tensor:
    """Return `out` in BSHD in memory, which backward assumes (kernel_backward.h:683)."""
    return out_BHCE.transpose(1, 2).contiguous().transpose(1, 2)


def _pad_lse(lse_BHC: torch.Tensor) -> torch.Tensor:
    """Return the global lse as backward reads it: in fp32, rows padded to a multiple of 32 with +inf."""
    lse = lse_BHC.to(accumulate_dtype(lse_BHC.dtype)).contiguous()
    return pad(lse, (0, -lse.shape[2] % _LSE_MULTIPLE), value=torch.inf)


def _prepare(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Pad head dims and align rows to 16 bytes; blocks are then cut out at multiples of that."""
    multiple = _LOAD_BYTES // tensors[0].element_size()

    def is_aligned(x: torch.Tensor) -> bool:
        return x.stride(-1) == 1 and not any(n % multiple for n in (x.storage_offset(), *x.stride()[:-1]))

    padded = (pad_to_multiple(x, multiple) for x in tensors)
    return tuple(x if is_aligned(x) else x.contiguous() for x in padded)


KERNEL = CausalBlockKernel("cuda_efficient", why_unsupported, _forward_block, _backward_block, _prepare)
