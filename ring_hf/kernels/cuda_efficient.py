"""Attention on tiles with PyTorch's memory-efficient attention (cutlass): what its flash attention does not take.

That is fp32, fp16 below compute capability 8.0, head dims above 256, and values of another head dim without padding.
Read in PyTorch 2.13's headers (include/ATen/native/transformers/cuda/mem_eff_attention) and in pytorch/pytorch:
aten/src/ATen/native/transformers/cuda/{attention.cu,attention_backward.cu,sdp_utils.cpp}:

- `is_causal` is aligned at the top left. Windows are not asked for: the backward of the operator beneath forgets the
  bottom-right offset (kernel_backward.h:1656), so tiles are split (`pieces`).
- lse has rows of a multiple of 32 (kernel_forward.h:114); what is behind the queries is +inf, given and taken. Rows
  that see nothing have lse 0, which nobody could tell from a true 0.
- Backward takes the strides of lse but not those of `out`, whose rows must be H * E apart (kernel_backward.h:683).
- 16 byte loads: head dims, strides and storage offsets of q, k and v are multiples of that, or the tensor is copied.
- All heads must be alike: the groups of a key/value head become heads, key/value heads rows of the batch, and a group
  sees its keys through a stride of 0 (PyTorch's own way since its pull request 191085). Gradients of keys and values
  come back for each query head and are summed in fp32.

Schemas as of PyTorch 2.13, compared with the installed ones by the tests:

    _scaled_dot_product_efficient_attention(query, key, value, attn_bias?, compute_log_sumexp, dropout_p, is_causal, *,
        scale) -> output, log_sumexp, philox_seed, philox_offset
    _scaled_dot_product_efficient_attention_backward(grad_out_, query, key, value, attn_bias, out, logsumexp,
        philox_seed, philox_offset, dropout_p, grad_input_mask[4], is_causal, *, scale) -> dq, dk, dv, dbias

Letters: B batch, H query heads, K key/value heads, G query heads of each, C queries, S keys, D and E head dims.
"""

import torch
from torch.nn.functional import pad

from . import flash_varlen
from .causal_blocks import CausalBlockKernel, padded
from .flash_varlen import dotted
from .merge import accumulate_dtype

DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
_OLDEST, _NEWEST = (5, 0), (12, 1)
_BYTES = 16
_LSE = 32
_forward = torch.ops.aten._scaled_dot_product_efficient_attention.default
_backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default


def why_unsupported(q: torch.Tensor, v: torch.Tensor, softcap: float | None) -> str | None:
    """Why this kernel cannot serve such tensors, or None."""
    if q.device.type != flash_varlen.DEVICE:
        return f"the tensors are on {q.device.type}"
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype} is not one of {', '.join(str(dtype) for dtype in DTYPES)}"
    if softcap is not None:
        return f"it has no soft-capping (softcap={softcap})"
    if torch.version.hip:
        return "the device is driven by ROCm, whose kernels differ"
    if (found := flash_varlen.capability(q.device)) is None:
        return "PyTorch finds no CUDA device"
    if not _OLDEST <= found <= _NEWEST:
        return f"compute capability {dotted(found)} is not between {dotted(_OLDEST)} and {dotted(_NEWEST)}"
    if q.dtype == torch.bfloat16 and found < (8, 0):
        return f"it takes torch.bfloat16 from compute capability 8.0 on, not on {dotted(found)}"
    return None


def _attend(
    q_BHCD: torch.Tensor, k_BKSD: torch.Tensor, v_BKSE: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, num_kv = k_BKSD.shape[:2]
    q, k, v = _alike(q_BHCD, k_BKSD, v_BKSE)
    out, lse, *_ = _forward(q, k, v, None, True, 0.0, causal, scale=scale)
    lse = lse.narrow(-1, 0, q.shape[2])
    if q is q_BHCD:
        return out, lse
    return tuple(x.unflatten(0, (rows, num_kv)).flatten(1, 2) for x in (out, lse))


def _differentiate(
    dout_BHCE: torch.Tensor,
    q_BHCD: torch.Tensor,
    k_BKSD: torch.Tensor,
    v_BKSE: torch.Tensor,
    out_BHCE: torch.Tensor,
    lse_BHC: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, num_kv = k_BKSD.shape[:2]
    q, k, v = _alike(q_BHCD, k_BKSD, v_BKSE)
    dout, out, lse = (x if q is q_BHCD else _grouped(x, num_kv) for x in (dout_BHCE, out_BHCE, _lse_for(lse_BHC)))
    out = _dense_rows(out)
    # Where dropout's random numbers would begin: without dropout nobody reads it.
    seed, offset = (torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2))
    no_dropout = seed, offset, 0.0
    dq, dk, dv, _ = _backward(
        dout, q, k, v, None, out, lse, *no_dropout, [True, True, True, False], causal, scale=scale
    )
    if q is q_BHCD:
        return dq, dk, dv
    dk, dv = (x.sum(1, dtype=accumulate_dtype(x.dtype)).unflatten(0, (rows, num_kv)) for x in (dk, dv))
    return dq.unflatten(0, (rows, num_kv)).flatten(1, 2), dk, dv


def _alike(
    q_BHCD: torch.Tensor, k_BKSD: torch.Tensor, v_BKSE: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All with as many heads: as they are, or `[B * K, G, ...]`, keys and values through a stride of 0."""
    num_kv = k_BKSD.shape[1]
    groups = q_BHCD.shape[1] // num_kv
    if groups == 1:
        return q_BHCD, k_BKSD, v_BKSE
    k, v = (x.flatten(0, 1).unsqueeze(1).expand(-1, groups, -1, -1) for x in (k_BKSD, v_BKSE))
    return _grouped(q_BHCD, num_kv), k, v


def _grouped(x_BHC: torch.Tensor, num_kv: int) -> torch.Tensor:
    return x_BHC.unflatten(1, (num_kv, -1)).flatten(0, 1)


def _dense_rows(out_BHCE: torch.Tensor) -> torch.Tensor:
    """BSHD in memory, as backward takes for granted."""
    return out_BHCE.transpose(1, 2).contiguous().transpose(1, 2)


def _lse_for(lse_BHC: torch.Tensor) -> torch.Tensor:
    """Global lse as backward reads it: in fp32, rows of a multiple of 32 filled with +inf."""
    lse = lse_BHC.to(accumulate_dtype(lse_BHC.dtype)).contiguous()
    return pad(lse, (0, -lse.shape[2] % _LSE), value=torch.inf)


def _prepare(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Head dims and rows where 16 byte loads may begin; tokens and rows are cut out of them at multiples of that."""
    unit = _BYTES // tensors[0].element_size()

    def loadable(x: torch.Tensor) -> bool:
        return x.stride(-1) == 1 and not any(n % unit for n in (x.storage_offset(), *x.stride()[:-1]))

    wide = (padded(x, unit) for x in tensors)
    return tuple(x if loadable(x) else x.contiguous() for x in wide)


KERNEL = CausalBlockKernel("cuda_efficient", why_unsupported, _attend, _differentiate, _prepare)
