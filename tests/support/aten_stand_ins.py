"""Stand-ins for PyTorch's memory-efficient and cuDNN attention: their schemas and shapes, in fp64 on a CPU.

Arguments, order, defaults and results are those of PyTorch 2.13's schemas, which a test compares with the installed
ones. All compute with the reference kernel and reproduce the peculiarities of the operators: causal masks aligned at
the top left; lse padded to 32 with +inf, 0 for rows without visible keys, and read through its strides; `out` read as
if its rows were H * E apart; gradients of keys and values for each query head; cuDNN's lse `[B, H, S, 1]` and the
strides that its cached graphs assume. Requirements and silent assumptions of the real operators are asserted, except
half precision: the tests compare in fp64.

Letters: B batch, H query heads, K key/value heads, S tokens, D and E head dims.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch._meta_registrations import alloc_with_matching_layout

from ring_hf.geometry import Tile
from ring_hf.kernels import cuda_cudnn, cuda_efficient, cuda_flash, flash_varlen, reference
from tests.support.flash_stand_ins import CALLS, stand_in

ADAPTERS = ("cuda_efficient", "cuda_cudnn")


def _tile(q, k, is_causal) -> Tile:
    return Tile(0, q.shape[0], 0, q.shape[2], 0, k.shape[2], None, 0 if is_causal else None)


def _compute_forward(q, k, v, is_causal, scale):
    """Return `(out, lse)`, BSHD in memory and BHS; lse is -inf for rows without visible keys."""
    out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)
    lse = torch.full(out.shape[:3], -torch.inf, dtype=q.dtype)
    for queries, tile_out, tile_lse in reference.forward(q, k, v, [_tile(q, k, is_causal)], scale):
        queries.gather(out).copy_(tile_out)
        queries.gather(lse).copy_(tile_lse)
    return out, lse


def _compute_backward(dout, q, k, v, out, lse, is_causal, scale):
    dq, dk, dv = (x.new_zeros(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v))
    for queries, keys, *grads in reference.backward(dout, q, k, v, out, lse, [_tile(q, k, is_causal)], scale):
        for total, tokens, grad in zip((dq, dk, dv), (queries, keys, keys), grads, strict=True):
            tokens.gather(total).add_(grad)
    return dq, dk, dv


def _check_no_dropout(dropout_p, *rng_state) -> None:
    assert type(dropout_p) is float and dropout_p == 0.0
    for x in rng_state:
        assert x.dtype == torch.int64 and x.shape == ()


def _check(q, k, v) -> None:
    assert q.dim() == k.dim() == v.dim() == 4 and q.shape[0] == k.shape[0] == v.shape[0]
    assert k.shape[1:3] == v.shape[1:3] and q.shape[3] == k.shape[3]
    assert q.numel() and k.numel() and v.numel()
    assert q.dtype == k.dtype == v.dtype


def _check_efficient(q, k, v, attn_bias) -> None:
    _check(q, k, v)
    assert q.shape[1] == k.shape[1], "all heads must be alike"
    assert attn_bias is None
    multiple = 16 // q.element_size()
    for x in (q, k, v):
        assert x.stride(3) == 1 and x.shape[3] % multiple == 0
        assert not any(n % multiple for n in (x.storage_offset(), *x.stride()[:3])), "16-byte loads"


# fmt: off
def efficient_forward(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
    _check_efficient(query, key, value, attn_bias)
    _check_no_dropout(dropout_p)
    CALLS["efficient"] += 1
    out, lse = _compute_forward(query, key, value, is_causal, scale)
    lse.masked_fill_(lse == -torch.inf, 0.0)
    assert compute_log_sumexp is True
    padded = torch.full((*lse.shape[:2], -(-lse.shape[2] // 32) * 32), torch.inf, dtype=lse.dtype)
    padded[..., : lse.shape[2]] = lse
    return out, padded, torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)


def efficient_backward(grad_out_, query, key, value, attn_bias, out, logsumexp, philox_seed, philox_offset, dropout_p,
                       grad_input_mask, is_causal=False, *, scale=None):
    _check_efficient(query, key, value, attn_bias)
    _check_no_dropout(dropout_p, philox_seed, philox_offset)
    assert grad_input_mask == [True, True, True, False]
    (rows, heads, length, _), value_dim = query.shape, value.shape[3]
    assert grad_out_.shape == out.shape == (rows, heads, length, value_dim) and out.dtype == query.dtype
    assert not any(n % 8 for n in logsumexp.stride()[:2]) and logsumexp.shape[2] == -(-length // 32) * 32
    assert logsumexp.dtype == query.dtype  # fp32 beside half precision
    lse = logsumexp.as_strided((rows, heads, logsumexp.shape[2]), (*logsumexp.stride()[:2], 1))
    assert (lse[..., length:] == torch.inf).all(), "padded rows would be computed"
    batch_stride, head_stride, *_ = out.stride()
    out = out.as_strided((rows, heads, length, value_dim), (batch_stride, head_stride, heads * value_dim, 1))
    return *_compute_backward(grad_out_, query, key, value, out, lse[..., :length], is_causal, scale), None


def _check_cudnn(q, k, v, is_causal) -> None:
    _check(q, k, v)
    assert q.shape[1] % k.shape[1] == 0
    head_dims = q.shape[3], v.shape[3]
    assert head_dims[0] % 8 == head_dims[1] % 8 == 0 and (max(head_dims) <= 128 or head_dims == (192, 128))
    assert q.shape[2] >= flash_varlen.MIN_DENSE_QUERIES and (q.shape[2] == k.shape[2] or not is_causal)
    assert q.shape[2] % cuda_cudnn.TOKEN_MULTIPLE == k.shape[2] % cuda_cudnn.TOKEN_MULTIPLE == 0
    for x in (q, k, v):
        assert torch.empty_like(x).stride() == x.stride(), "the graph assumes other strides of the gradients"


def cudnn_forward(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False,
                  return_debug_mask=False, *, scale=None):
    _check_cudnn(query, key, value, is_causal)
    _check_no_dropout(dropout_p)
    CALLS["cudnn"] += 1
    assert compute_log_sumexp is True and attn_bias is None and return_debug_mask is False
    out, lse = _compute_forward(query, key, value, is_causal, scale)
    result = alloc_with_matching_layout(query, (*query.shape[:3], value.shape[3])).copy_(out)
    seed, offset = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    return result, lse.unsqueeze(-1), None, None, query.shape[2], key.shape[2], seed, offset, None


def cudnn_backward(grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q,
                   cum_seq_k, max_q, max_k, dropout_p, is_causal, *, scale=None):
    _check_cudnn(query, key, value, is_causal)
    _check_no_dropout(dropout_p, philox_seed, philox_offset)
    assert attn_bias is cum_seq_q is cum_seq_k is None and (max_q, max_k) == (query.shape[2], key.shape[2])
    graph = alloc_with_matching_layout(query, (*query.shape[:3], value.shape[3]))
    for x in (out, grad_out):
        assert x.shape == graph.shape and x.stride() == graph.stride() and x.dtype == query.dtype
    lse = torch.empty(*query.shape[:3], 1)
    assert logsumexp.shape == lse.shape and logsumexp.stride() == lse.stride() and logsumexp.dtype == query.dtype
    grads = _compute_backward(grad_out, query, key, value, out, logsumexp.squeeze(-1), is_causal, scale)
    return tuple(torch.empty_like(x).copy_(grad) for x, grad in zip((query, key, value), grads, strict=True))
# fmt: on


@contextlib.contextmanager
def aten_stand_in(adapter: str, large: int = 5, unit: int = 1) -> Iterator[str]:
    """Install stand-ins for tensors on a CPU in fp64, and yield the name of the kernel.

    cuDNN computes tiles of at least `large` queries and multiples of `unit`, the stand-in of flash attention others.
    """
    with stand_in("aten", large), contextlib.ExitStack() as patches:
        for module, name, value in (
            (cuda_efficient, "DTYPES", (torch.float64,)),
            (cuda_efficient, "_ATEN_FORWARD", efficient_forward),
            (cuda_efficient, "_ATEN_BACKWARD", efficient_backward),
            (cuda_cudnn, "_ATEN_FORWARD", cudnn_forward),
            (cuda_cudnn, "_ATEN_BACKWARD", cudnn_backward),
            (cuda_cudnn, "_cudnn_version", lambda: 92000),
            (cuda_cudnn, "TOKEN_MULTIPLE", unit),
            (cuda_flash, "activated_implementation", lambda: None),
        ):
            patches.enter_context(mock.patch.object(module, name, value))
        yield adapter
