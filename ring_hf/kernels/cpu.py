"""Attention on tiles with PyTorch's CPU flash attention operator and its backward.

`aten._scaled_dot_product_flash_attention_for_cpu` returns lse, takes fewer key/value than query heads, and runs fp64,
fp32, bf16 (with AMX where the CPU has it) and fp16 without an S x S matrix. Its `is_causal` is aligned at the top left
and it has no window, so tiles are split into blocks (`causal_blocks`). It needs one head dim for q, k and v: if the
values have another one (multi-head latent attention), the smaller is padded with zeros.

The operator reads all keys and values of a head once for every few hundred queries, and in backward adds to their
gradients as often. Keys and values far beyond the cache of a core cost a tenth of its speed and more (scripts/LOG.md),
so long keys are computed in slices, whose results are merged like those of blocks.
"""

import torch
from torch.nn.functional import pad

from .causal_blocks import CausalBlockKernel
from .merge import accumulate_dtype, merge_

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# A limit keeps results, and their copies in fp32, small beside the shard.
_MAX_QUERY_ROWS = 4096
# Bytes of the keys and values of one head that are read repeatedly: half in backward, which also writes gradients.
_FORWARD_SLICE_BYTES = 2**22
_BACKWARD_SLICE_BYTES = 2**21
_ATEN_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_ATEN_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def why_unsupported(q: torch.Tensor, v: torch.Tensor, softcap: float | None) -> str | None:
    """Return why this kernel does not support a call, or None; see `Kernel`."""
    if q.device.type != "cpu":
        return f"the tensors are on {q.device.type}"
    if q.dtype not in _DTYPES:
        return f"dtype {q.dtype} is not one of {', '.join(str(dtype) for dtype in _DTYPES)}"
    if softcap is not None:
        return f"it has no soft-capping (softcap={softcap})"
    return None


def _forward_block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    key_slices = _slice_keys(k, v, _FORWARD_SLICE_BYTES)
    if len(key_slices) == 1:
        return _ATEN_FORWARD(q, k, v, 0.0, causal, scale=scale)
    out, lse = q.new_empty(0), q.new_empty(0)
    for keys in key_slices:
        queries = _queries_of(keys, causal)
        slice_out, slice_lse = _ATEN_FORWARD(q[:, :, queries], k[:, :, keys], v[:, :, keys], 0.0, causal, scale=scale)
        if keys.start == 0:
            out, lse = slice_out.to(accumulate_dtype(q.dtype)), slice_lse
        else:
            merge_(out[:, :, queries], lse[:, :, queries], slice_out, slice_lse)
    return out, lse


def _backward_block(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    key_slices = _slice_keys(k, v, _BACKWARD_SLICE_BYTES)
    if len(key_slices) == 1:
        return _ATEN_BACKWARD(dout, q, k, v, out, lse, 0.0, causal, scale=scale)
    dq, dk, dv = q.new_empty(0), torch.empty_like(k), torch.empty_like(v)
    for keys in key_slices:
        queries = _queries_of(keys, causal)
        slice_dq, dk[:, :, keys], dv[:, :, keys] = _ATEN_BACKWARD(
            dout[:, :, queries],
            q[:, :, queries],
            k[:, :, keys],
            v[:, :, keys],
            out[:, :, queries],
            lse[:, :, queries],
            0.0,
            causal,
            scale=scale,
        )
        if keys.start == 0:
            dq = slice_dq.to(accumulate_dtype(q.dtype))
        else:
            dq[:, :, queries].add_(slice_dq)
    return dq.to(q.dtype), dk, dv


def _queries_of(keys: slice, causal: bool) -> slice:
    """Return the queries of a block that attend to any of these keys."""
    return slice(keys.start, None) if causal else slice(None)


def _slice_keys(k: torch.Tensor, v: torch.Tensor, max_bytes: int) -> list[slice]:
    """Return the fewest slices of equal size whose keys and values, of one head, take `max_bytes` at most."""
    num_k = k.shape[2]
    bytes_per_token = k.element_size() * (k.shape[3] + v.shape[3])
    num_slices = -(-num_k * bytes_per_token // max_bytes)
    size = -(-num_k // num_slices)
    return [slice(start, min(start + size, num_k)) for start in range(0, num_k, size)]


def _pad_to_one_head_dim(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    head_dim = max(x.shape[-1] for x in tensors)
    return tuple(x if x.shape[-1] == head_dim else pad(x, (0, head_dim - x.shape[-1])) for x in tensors)


KERNEL = CausalBlockKernel(
    "cpu", why_unsupported, _forward_block, _backward_block, _pad_to_one_head_dim, _MAX_QUERY_ROWS
)
