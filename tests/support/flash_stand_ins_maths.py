"""What FlashAttention computes from its arguments, in fp64 on a CPU: windows, limits and lse as in its sources.

Everything is computed with the reference kernel. Each rule of a version names the line of its source. Requirements of
the real functions on tensors are asserted, except half precision.

    version 2     windows are clamped to the longest keys, wrongly if there are fewer keys than queries; lse is read
                  through a raw pointer; rows without visible keys: +inf (v2.8.3:csrc/flash_attn/flash_api.cpp,
                  src/softmax.h)
    version 3     windows are clamped correctly; lse is read through a raw pointer; rows without visible keys: -inf,
                  or +inf if there is no key (v2.8.3:hopper/flash_api.cpp, softmax.h)
    version 4     windows are taken literally, None does not bind; lse is checked; rows without visible keys: -inf
                  (fa4-v4.0.0.beta27:flash_attn/cute/interface.py, softmax.py)

Letters: B batch, H query heads, K key/value heads, S tokens, T tokens of a packed launch, D head dim.
"""

import itertools
import math
from collections import Counter

import torch

from ring_hf.geometry import Tile
from ring_hf.kernels import reference

# Counts dense and packed forward calls, deterministic backward calls, calls by head dims, and kernels loaded from the
# hub.
CALLS: Counter[str | tuple[int, int]] = Counter()
Bounds = tuple[int | None, int | None]  # visible tokens left and right of the aligned diagonal


def clamp_window_2(left: int, right: int, max_q: int, max_k: int) -> Bounds:
    """Return the window that the host code passes on: csrc/flash_attn/flash_api.cpp:399-400 and 141-142."""
    left, right = (-1 if bound >= max_k else bound for bound in (left, right))
    if left < 0 <= right:
        left = max_k
    elif right < 0 <= left:
        right = max_k
    return (None, None) if left < 0 else (left, right)


def clamp_window_3(left: int, right: int, max_q: int, max_k: int) -> Bounds:
    """Return the window that the host code passes on: hopper/flash_api.cpp:761-762 and 144-145."""
    left, right = -1 if left >= max_k - 1 else left, -1 if right >= max_q - 1 else right
    return None if left < 0 else left, None if right < 0 else right


def clamp_window_4(left: int | None, right: int | None, max_q: int, max_k: int) -> Bounds:
    """Return the window that the host code passes on: flash_attn/cute/interface.py:385-407 of beta27."""
    return (None, None) if left is not None and right is not None and left + right < 0 else (left, right)


def _tile(q, k, bounds: Bounds) -> Tile:
    (left, right), shift = bounds, k.shape[1] - q.shape[1]
    lo, hi = None if left is None else shift - left, None if right is None else shift + right
    return Tile(0, q.shape[0], 0, q.shape[1], 0, k.shape[1], lo, hi)


def supports_head_dims_2(head_dim: int, value_dim: int) -> bool:
    return head_dim == value_dim <= 256


def supports_head_dims_3(head_dim: int, value_dim: int) -> bool:
    """hopper/flash_api.cpp:748-752."""
    is_latent = 128 < head_dim <= 192 and 96 < value_dim <= 128
    return max(head_dim, value_dim) <= 256 and (head_dim == value_dim or is_latent)


def supports_head_dims_4(head_dim: int, value_dim: int) -> bool:
    """flash_attn/cute/interface.py:107-124 of beta27, for compute capability 9.x."""
    return 8 <= head_dim <= 256 and 8 <= value_dim <= 256


def _check(supports_head_dims, q, k, v, *outs) -> None:
    for x in (q, k, v, *outs):
        assert x.stride(-1) == 1 and x.dtype == q.dtype and x.device == q.device
        assert not any(n % 8 for n in x.stride()[:-1]) and x.shape[-1] % 8 == 0
    assert q.shape[-1] == k.shape[-1] and all(x.shape == (*q.shape[:-1], v.shape[-1]) for x in outs)
    assert supports_head_dims(q.shape[-1], v.shape[-1]), f"no kernel for head dims {q.shape[-1]}, {v.shape[-1]}"
    assert k.shape[:-1] == v.shape[:-1] and q.shape[-2] % k.shape[-2] == 0
    assert q.shape[0] > 0
    CALLS[q.shape[-1], v.shape[-1]] += 1


def document_slices(cu_q, cu_k, max_q, max_k, q, k) -> list[tuple[slice, slice]]:
    """Return the queries and the keys of each document of a packed call."""
    assert type(max_q) is int and type(max_k) is int
    for cu_seqlens, max_seqlen, x in ((cu_q, max_q, q), (cu_k, max_k, k)):
        assert cu_seqlens.dtype == torch.int32 and cu_seqlens.is_contiguous() and cu_seqlens[0] == 0
        assert cu_seqlens[-1] == x.shape[0], "tokens outside all documents stay uninitialised"
        assert cu_seqlens.diff().max() <= max_seqlen and cu_seqlens.diff().min() > 0
    assert len(cu_q) == len(cu_k)
    q_slices, k_slices = ([slice(a, b) for a, b in itertools.pairwise(cu_seqlens)] for cu_seqlens in (cu_q, cu_k))
    return list(zip(q_slices, k_slices, strict=True))


def compute_forward(
    q, k, v, documents, bounds, scale, softcap, supports_head_dims=supports_head_dims_2, empty_row_lse=math.inf
):
    """Return `(out, lse)`: BSHD and BHS, or with `documents` THD and HT."""
    _check(supports_head_dims, q, k, v)
    CALLS["packed" if documents else "dense"] += 1
    if not documents:
        return _dense_forward(q, k, v, bounds, scale, softcap, empty_row_lse)
    results = [
        _dense_forward(q[queries][None], k[keys][None], v[keys][None], bounds, scale, softcap, empty_row_lse)
        for queries, keys in documents
    ]
    return torch.cat([out[0] for out, _ in results]), torch.cat([lse[0] for _, lse in results], 1).contiguous()


def _dense_forward(q, k, v, bounds, scale, softcap, empty_row_lse):
    out = q.new_zeros(*q.shape[:-1], v.shape[-1]).transpose(1, 2)
    lse = torch.full(out.shape[:3], empty_row_lse, dtype=q.dtype)
    tile = _tile(q, k, bounds)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    for queries, tile_out, tile_lse in reference.forward(q, k, v, [tile], scale, softcap):
        queries.gather(out).copy_(tile_out)
        queries.gather(lse).copy_(torch.where(tile_lse == -math.inf, empty_row_lse, tile_lse))
    return out.transpose(1, 2), lse


def compute_backward(
    dout,
    q,
    k,
    v,
    out,
    lse,
    documents,
    bounds,
    scale,
    softcap,
    supports_head_dims=supports_head_dims_2,
    reads_raw_lse=True,
):
    """Return `(dq, dk, dv)`. A raw lse is read through its pointer, as if it were contiguous BHS or HT."""
    _check(supports_head_dims, q, k, v, dout, out)
    heads, length = q.shape[-2], q.shape[0] if documents else q.shape[1]
    shape = (heads, length) if documents else (q.shape[0], heads, length)
    assert lse.dtype == q.dtype and lse.is_contiguous()  # fp32 beside half precision
    assert lse.numel() == math.prod(shape) if reads_raw_lse else lse.shape == shape
    lse = lse.view(-1).view(shape)
    if not documents:
        return _dense_backward(dout, q, k, v, out, lse, bounds, scale, softcap)
    results = []
    for queries, keys in documents:
        tensors = dout[queries], q[queries], k[keys], v[keys], out[queries], lse[:, queries]
        results.append(_dense_backward(*(x[None] for x in tensors), bounds, scale, softcap))
    return tuple(torch.cat([grad[0] for grad in grads]) for grads in zip(*results, strict=True))


def _dense_backward(dout, q, k, v, out, lse, bounds, scale, softcap):
    tile = _tile(q, k, bounds)
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for queries, keys, *grads in reference.backward(dout, q, k, v, out, lse, [tile], scale, softcap):
        for total, tokens, grad in zip((dq, dk, dv), (queries, keys, keys), grads, strict=True):
            tokens.gather(total).add_(grad)
    return tuple(x.transpose(1, 2) for x in (dq, dk, dv))
