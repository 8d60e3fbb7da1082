"""Stand-ins for flash-attn 2 and PyTorch's CUDA flash attention: their signatures and shapes, in fp64 on a CPU.

Each has the arguments, order, defaults and results of the version it stands for, read in
Dao-AILab/flash-attention@<tag>:flash_attn/flash_attn_interface.py, and in PyTorch 2.13's schemas, which a test
compares with the installed ones. All compute with the reference kernel what
Dao-AILab/flash-attention@v2.8.3:csrc/flash_attn/flash_api.cpp does, its faults included: windows aligned at the bottom
right and clamped to the longest keys, lse read through a raw pointer, +inf for rows that see nothing, gradients
overwritten. What the real ones demand of their arguments is asserted; half precision is not, so that fp64 can judge.

Letters: B batch, H query heads, K key/value heads, S tokens, T tokens of a packed call, D head dim.
"""

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import torch

from ring_hf.geometry import Tile
from ring_hf.kernels import cuda_flash, flash_attn_2, flash_calls, reference

CALLS: Counter[str] = Counter()


def clamped(left: int, right: int, longest_k: int) -> tuple[int | None, int | None]:
    """What the host code makes of a window: flash_api.cpp:399-400 and 141-142."""
    left, right = (-1 if x >= longest_k else x for x in (left, right))
    if left < 0 <= right:
        left = longest_k
    elif right < 0 <= left:
        right = longest_k
    return (None, None) if left < 0 else (left, right)


def _tile(q, k, left, right, longest_k) -> Tile:
    left, right = clamped(left, right, longest_k)
    apart = k.shape[1] - q.shape[1]
    lo, hi = None if left is None else apart - left, None if right is None else apart + right
    return Tile(0, q.shape[0], 0, q.shape[1], 0, k.shape[1], lo, hi)


def _check(q, k, v, *others) -> None:
    for x in (q, k, v, *others):
        assert x.stride(-1) == 1 and x.dtype == q.dtype and x.device == q.device
        assert not any(n % 8 for n in x.stride()[:-1])
        assert x.shape[-1] == q.shape[-1]
    assert q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    assert k.shape == v.shape and q.shape[-2] % k.shape[-2] == 0
    assert q.shape[0] > 0


def _spans(cu_q, cu_k, max_q, max_k, q, k) -> list[tuple[slice, slice]]:
    """The documents of a packed call."""
    assert type(max_q) is int and type(max_k) is int
    for cu, longest, x in ((cu_q, max_q, q), (cu_k, max_k, k)):
        assert cu.dtype == torch.int32 and cu.is_contiguous() and cu[0] == 0
        assert cu[-1] == x.shape[0], "tokens outside all documents stay uninitialised"
        assert cu.diff().max() <= longest and cu.diff().min() > 0
    assert len(cu_q) == len(cu_k)
    q_slices, k_slices = ([slice(a, b) for a, b in itertools.pairwise(cu)] for cu in (cu_q, cu_k))
    return list(zip(q_slices, k_slices, strict=True))


def compute_forward(q, k, v, documents, max_k, scale, left, right, softcap):
    """`(out, lse)`: BSHD and BHS, or with `documents` THD and HT."""
    _check(q, k, v)
    CALLS["packed" if documents else "dense"] += 1
    if documents:
        parts = [
            compute_one(q[a][None], k[b][None], v[b][None], max_k, scale, left, right, softcap) for a, b in documents
        ]
        return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], 1).contiguous()
    return compute_one(q, k, v, max_k, scale, left, right, softcap)


def compute_one(q, k, v, longest_k, scale, left, right, softcap):
    out = torch.zeros_like(q).transpose(1, 2)
    lse = torch.full(out.shape[:3], torch.inf, dtype=q.dtype)
    tiles = [_tile(q, k, left, right, longest_k)]
    at = (x.transpose(1, 2) for x in (q, k, v))
    for queries, one_out, one_lse in reference.forward(*at, tiles, scale, softcap):
        queries.of(out).copy_(one_out)
        queries.of(lse).copy_(one_lse)
    return out.transpose(1, 2), lse


def compute_backward(dout, q, k, v, out, lse, documents, max_k, scale, left, right, softcap):
    """`(dq, dk, dv)`; lse is read through its pointer, as if it were contiguous BHS or HT."""
    _check(q, k, v, dout, out)
    assert lse.dtype == q.dtype and lse.is_contiguous()  # fp32 beside half precision
    heads, length = q.shape[-2], q.shape[0] if documents else q.shape[1]
    shape = (heads, length) if documents else (q.shape[0], heads, length)
    assert lse.numel() == math.prod(shape)
    lse = lse.view(-1).view(shape)
    if not documents:
        return gradients_of_one(dout, q, k, v, out, lse, max_k, scale, left, right, softcap)
    parts = [
        gradients_of_one(
            *(x[None] for x in (dout[a], q[a], k[b], v[b], out[a], lse[:, a])), max_k, scale, left, right, softcap
        )
        for a, b in documents
    ]
    return tuple(torch.cat([part[n][0] for part in parts]) for n in range(3))


def gradients_of_one(dout, q, k, v, out, lse, longest_k, scale, left, right, softcap):
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    tile = _tile(q.transpose(1, 2), k.transpose(1, 2), left, right, longest_k)
    for queries, keys, *grads in reference.backward(dout, q, k, v, out, lse, [tile], scale, softcap):
        for total, place, grad in zip((dq, dk, dv), (queries, keys, keys), grads, strict=True):
            place.of(total).add_(grad)
    return tuple(x.transpose(1, 2) for x in (dq, dk, dv))


def _no_extras(dropout_p, causal, alibi_slopes, *nones) -> None:
    assert type(dropout_p) is float and dropout_p == 0.0 and causal is False
    assert alibi_slopes is None and all(x is None for x in nones)


def _capped(softcap):
    assert type(softcap) is float
    return softcap or None


class Operator:
    """A custom operator: it hides the signature of its function, as `torch.library.custom_op` does."""

    def __init__(self, function) -> None:
        self._init_fn = function

    def __call__(self, *args, **kwargs):
        return self._init_fn(*args, **kwargs)


# flash-attn 2.6.2 and 2.6.3: the window is a tuple, forward returns 8, backward 4.
# fmt: off
def _forward_26(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_softmax):
    _no_extras(dropout_p, causal, alibi_slopes)
    out, lse = compute_forward(q, k, v, None, k.shape[1], softmax_scale, *window_size, _capped(softcap))
    return out, q, k, v, out, lse, None, torch.empty(2, dtype=torch.int64)


def _varlen_forward_26(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
                       causal, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, return_softmax=False,
                       block_table=None, leftpad_k=None, seqused_k=None):
    _no_extras(dropout_p, causal, alibi_slopes, block_table, leftpad_k, seqused_k)
    documents = _spans(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q, k)
    out, lse = compute_forward(q, k, v, documents, max_seqlen_k, softmax_scale, *window_size, _capped(softcap))
    return out, q, k, v, out, lse, None, torch.empty(2, dtype=torch.int64)


def _write(grads, dq, dk, dv, deterministic):
    assert type(deterministic) is bool
    CALLS["deterministic"] += deterministic
    for into, grad in zip((dq, dk, dv), grads, strict=True):
        if into is not None:
            into.copy_(grad)
    return torch.empty(0)  # softmax_d


def _backward_26(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size, softcap,
                 alibi_slopes, deterministic, rng_state=None):
    _no_extras(dropout_p, causal, alibi_slopes, rng_state)
    window = (k.shape[1], softmax_scale, *window_size, _capped(softcap))
    grads = compute_backward(dout, q, k, v, out, softmax_lse, None, *window)
    return dq, dk, dv, _write(grads, dq, dk, dv, deterministic)


def _varlen_backward_26(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                        max_seqlen_k, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
                        deterministic, rng_state=None):
    _no_extras(dropout_p, causal, alibi_slopes, rng_state)
    documents = _spans(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q, k)
    window = (max_seqlen_k, softmax_scale, *window_size, _capped(softcap))
    grads = compute_backward(dout, q, k, v, out, softmax_lse, documents, *window)
    return dq, dk, dv, _write(grads, dq, dk, dv, deterministic)


# flash-attn 2.7.0 to 2.7.2: two bounds, forward returns 4, backward softmax_d alone.
def _forward_27(q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
                return_softmax):
    _no_extras(dropout_p, causal, alibi_slopes)
    window = (k.shape[1], softmax_scale, window_size_left, window_size_right, _capped(softcap))
    return *compute_forward(q, k, v, None, *window), torch.empty(0), torch.empty(2, dtype=torch.int64)


def _varlen_forward_27(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
                       causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
                       return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None):
    _no_extras(dropout_p, causal, alibi_slopes, block_table, leftpad_k, seqused_k)
    documents = _spans(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q, k)
    window = (max_seqlen_k, softmax_scale, window_size_left, window_size_right, _capped(softcap))
    return *compute_forward(q, k, v, documents, *window), torch.empty(0), torch.empty(2, dtype=torch.int64)


def _backward_27(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
                 window_size_right, softcap, alibi_slopes, deterministic, rng_state=None):
    _no_extras(dropout_p, causal, alibi_slopes, rng_state)
    window = (k.shape[1], softmax_scale, window_size_left, window_size_right, _capped(softcap))
    return _write(compute_backward(dout, q, k, v, out, softmax_lse, None, *window), dq, dk, dv, deterministic)


def _varlen_backward_27(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                        max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
                        alibi_slopes, deterministic, rng_state=None):
    _no_extras(dropout_p, causal, alibi_slopes, rng_state)
    documents = _spans(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q, k)
    window = (max_seqlen_k, softmax_scale, window_size_left, window_size_right, _capped(softcap))
    return _write(compute_backward(dout, q, k, v, out, softmax_lse, documents, *window), dq, dk, dv, deterministic)


# flash-attn 2.7.3 to 2.8.3: the packed ones can clear their results first.
def _varlen_forward_28(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
                       causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
                       return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False):
    return _varlen_forward_27(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                              softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
                              return_softmax, block_table, leftpad_k, seqused_k)


def _varlen_backward_28(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                        max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
                        alibi_slopes, deterministic, rng_state=None, zero_tensors=False):
    return _varlen_backward_27(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                               max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
                               softcap, alibi_slopes, deterministic, rng_state)


# PyTorch 2.13.
def aten_forward(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *,
                 scale=None, window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None,
                 block_table=None, num_splits=None):
    _no_extras(dropout_p, is_causal, alibi_slopes, seqused_k, block_table, num_splits)
    documents = None if cum_seq_q is None else _spans(cum_seq_q, cum_seq_k, max_q, max_k, query, key)
    assert documents or (max_q, max_k) == (query.shape[1], key.shape[1])
    window = (-1 if x is None else x for x in (window_size_left, window_size_right))
    out, lse = compute_forward(query, key, value, documents, max_k, scale, *window, None)
    return out, lse, torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64), torch.empty(0)


def aten_backward(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p,
                  is_causal, rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None):
    _no_extras(dropout_p, is_causal, None)
    assert rng_state.dtype == unused.dtype == torch.uint64
    documents = None if cum_seq_q is None else _spans(cum_seq_q, cum_seq_k, max_q, max_k, query, key)
    assert documents or (max_q, max_k) == (query.shape[1], key.shape[1])
    window = (-1 if x is None else x for x in (window_size_left, window_size_right))
    return compute_backward(grad_out, query, key, value, out, logsumexp, documents, max_k, scale, *window, None)
# fmt: on


def _module(wrap, *functions) -> SimpleNamespace:
    return SimpleNamespace(**{name: wrap(function) for name, function in zip(_NAMES, functions, strict=True)})


_NAMES = ("_flash_attn_forward", "_flash_attn_varlen_forward", "_flash_attn_backward", "_flash_attn_varlen_backward")
PACKAGES = {
    "2.6.3": _module(lambda f: f, _forward_26, _varlen_forward_26, _backward_26, _varlen_backward_26),
    "2.7.2.post1": _module(Operator, _forward_27, _varlen_forward_27, _backward_27, _varlen_backward_27),
    "2.8.3": _module(Operator, _forward_27, _varlen_forward_28, _backward_27, _varlen_backward_28),
}
ADAPTERS = ("aten", *PACKAGES)


@contextlib.contextmanager
def stand_in(adapter: str, large: int = 12) -> Iterator[str]:
    """Puts a stand-in where the adapter looks, for tensors on a CPU in fp64; gives the kernel's name.

    Tiles from `large` queries on are dense calls.
    """
    flash_calls._grouped.cache_clear()
    with contextlib.ExitStack() as patches:

        def patch(module, name, value):
            patches.enter_context(mock.patch.object(module, name, value))

        patch(flash_calls, "DEVICE", "cpu")
        patch(flash_calls, "DTYPES", (torch.float64,))
        patch(flash_calls, "LARGE", large)
        patch(flash_calls, "capability", lambda device: (9, 0))
        if adapter == "aten":
            patch(cuda_flash, "_forward", aten_forward)
            patch(cuda_flash, "_backward", aten_backward)
            patch(cuda_flash, "_is_built", lambda: True)
            yield cuda_flash.KERNEL.NAME
        else:
            found = adapter, flash_attn_2.form_of(adapter), PACKAGES[adapter]
            patch(flash_attn_2, "installed", lambda: found)
            yield flash_attn_2.KERNEL.NAME
    flash_calls._grouped.cache_clear()
