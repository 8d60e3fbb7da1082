"""What FlashAttention computes from the arguments of a call, in fp64 on a CPU: windows, limits and lse as the sources.

All compute with the reference kernel. What is said of a version is at the place of its source that is named; what the
real functions demand of tensors is asserted, half precision excepted.

    version 2     windows clamped to the longest keys, wrongly if there are fewer than queries; lse read through a raw
                  pointer; rows that see nothing: +inf (v2.8.3:csrc/flash_attn/flash_api.cpp, src/softmax.h)
    version 3     windows clamped rightly; lse read through a raw pointer; rows that see nothing: -inf, or +inf if
                  there is no key (v2.8.3:hopper/flash_api.cpp, softmax.h)
    version 4     windows taken literally, None without bound; lse checked; rows that see nothing: -inf
                  (fa4-v4.0.0.beta27:flash_attn/cute/interface.py, softmax.py)

Letters: B batch, H query heads, K key/value heads, S tokens, T tokens of a packed call, D head dim.
"""

import itertools
import math
from collections import Counter

import torch

from ring_hf.geometry import Tile
from ring_hf.kernels import reference

# Dense and packed forward calls, deterministic backward calls, calls by head dims, kernels loaded from the hub.
CALLS: Counter[str | tuple[int, int]] = Counter()
Bounds = tuple[int | None, int | None]  # how far left and right of the aligned diagonal


def clamped_by_two(left: int, right: int, longest_q: int, longest_k: int) -> Bounds:
    """What the host code makes of a window: csrc/flash_attn/flash_api.cpp:399-400 and 141-142."""
    left, right = (-1 if x >= longest_k else x for x in (left, right))
    if left < 0 <= right:
        left = longest_k
    elif right < 0 <= left:
        right = longest_k
    return (None, None) if left < 0 else (left, right)


def clamped_by_three(left: int, right: int, longest_q: int, longest_k: int) -> Bounds:
    """What the host code makes of a window: hopper/flash_api.cpp:761-762 and 144-145."""
    left, right = -1 if left >= longest_k - 1 else left, -1 if right >= longest_q - 1 else right
    return None if left < 0 else left, None if right < 0 else right


def taken_by_four(left: int | None, right: int | None, longest_q: int, longest_k: int) -> Bounds:
    """What the host code makes of a window: flash_attn/cute/interface.py:385-407 of beta27."""
    return (None, None) if left is not None and right is not None and left + right < 0 else (left, right)


def _tile(q, k, bounds: Bounds) -> Tile:
    (left, right), apart = bounds, k.shape[1] - q.shape[1]
    lo, hi = None if left is None else apart - left, None if right is None else apart + right
    return Tile(0, q.shape[0], 0, q.shape[1], 0, k.shape[1], lo, hi)


def one_head_dim(head_dim: int, value_dim: int) -> bool:
    return head_dim == value_dim <= 256


def dims_of_three(head_dim: int, value_dim: int) -> bool:
    """hopper/flash_api.cpp:748-752."""
    latent = 128 < head_dim <= 192 and 96 < value_dim <= 128
    return max(head_dim, value_dim) <= 256 and (head_dim == value_dim or latent)


def dims_of_four(head_dim: int, value_dim: int) -> bool:
    """flash_attn/cute/interface.py:107-124 of beta27, for compute capability 9.x."""
    return 8 <= head_dim <= 256 and 8 <= value_dim <= 256


def _check(fits, q, k, v, *outs) -> None:
    for x in (q, k, v, *outs):
        assert x.stride(-1) == 1 and x.dtype == q.dtype and x.device == q.device
        assert not any(n % 8 for n in x.stride()[:-1]) and x.shape[-1] % 8 == 0
    assert q.shape[-1] == k.shape[-1] and all(x.shape == (*q.shape[:-1], v.shape[-1]) for x in outs)
    assert fits(q.shape[-1], v.shape[-1]), f"no kernel for head dims {q.shape[-1]}, {v.shape[-1]}"
    assert k.shape[:-1] == v.shape[:-1] and q.shape[-2] % k.shape[-2] == 0
    assert q.shape[0] > 0
    CALLS[q.shape[-1], v.shape[-1]] += 1


def spans(cu_q, cu_k, max_q, max_k, q, k) -> list[tuple[slice, slice]]:
    """The documents of a packed call."""
    assert type(max_q) is int and type(max_k) is int
    for cu, longest, x in ((cu_q, max_q, q), (cu_k, max_k, k)):
        assert cu.dtype == torch.int32 and cu.is_contiguous() and cu[0] == 0
        assert cu[-1] == x.shape[0], "tokens outside all documents stay uninitialised"
        assert cu.diff().max() <= longest and cu.diff().min() > 0
    assert len(cu_q) == len(cu_k)
    q_slices, k_slices = ([slice(a, b) for a, b in itertools.pairwise(cu)] for cu in (cu_q, cu_k))
    return list(zip(q_slices, k_slices, strict=True))


def compute_forward(q, k, v, documents, bounds, scale, softcap, fits=one_head_dim, unseen=math.inf):
    """`(out, lse)`: BSHD and BHS, or with `documents` THD and HT."""
    _check(fits, q, k, v)
    CALLS["packed" if documents else "dense"] += 1
    if documents:
        parts = [
            _one_forward(q[a][None], k[b][None], v[b][None], bounds, scale, softcap, unseen) for a, b in documents
        ]
        return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], 1).contiguous()
    return _one_forward(q, k, v, bounds, scale, softcap, unseen)


def _one_forward(q, k, v, bounds, scale, softcap, unseen):
    out = q.new_zeros(*q.shape[:-1], v.shape[-1]).transpose(1, 2)
    lse = torch.full(out.shape[:3], unseen, dtype=q.dtype)
    at = (x.transpose(1, 2) for x in (q, k, v))
    for queries, one_out, one_lse in reference.forward(*at, [_tile(q, k, bounds)], scale, softcap):
        queries.of(out).copy_(one_out)
        queries.of(lse).copy_(torch.where(one_lse == -math.inf, unseen, one_lse))
    return out.transpose(1, 2), lse


def compute_backward(dout, q, k, v, out, lse, documents, bounds, scale, softcap, fits=one_head_dim, raw=True):
    """`(dq, dk, dv)`; a raw lse is read through its pointer, as if it were contiguous BHS or HT."""
    _check(fits, q, k, v, dout, out)
    heads, length = q.shape[-2], q.shape[0] if documents else q.shape[1]
    shape = (heads, length) if documents else (q.shape[0], heads, length)
    assert lse.dtype == q.dtype and lse.is_contiguous()  # fp32 beside half precision
    assert lse.numel() == math.prod(shape) if raw else lse.shape == shape
    lse = lse.view(-1).view(shape)
    if not documents:
        return _one_backward(dout, q, k, v, out, lse, bounds, scale, softcap)
    parts = [
        _one_backward(*(x[None] for x in (dout[a], q[a], k[b], v[b], out[a], lse[:, a])), bounds, scale, softcap)
        for a, b in documents
    ]
    return tuple(torch.cat([part[n][0] for part in parts]) for n in range(3))


def _one_backward(dout, q, k, v, out, lse, bounds, scale, softcap):
    tile = _tile(q, k, bounds)
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for queries, keys, *grads in reference.backward(dout, q, k, v, out, lse, [tile], scale, softcap):
        for total, place, grad in zip((dq, dk, dv), (queries, keys, keys), grads, strict=True):
            place.of(total).add_(grad)
    return tuple(x.transpose(1, 2) for x in (dq, dk, dv))
