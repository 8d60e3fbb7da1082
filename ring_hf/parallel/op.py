"""Ring attention as one PyTorch operator, `torch.ops.ring_hf.ring_attention`.

Being one operator, activation checkpointing can save it (a checkpointed layer then does not run the ring again), FLOP
counters and `torch.compile` see a single opaque call, and nothing about a batch lives outside its arguments.

Letters: B batch, H query heads, K key/value heads, C tokens of this rank, D head dim.
"""

from typing import Any

import torch
from torch import Tensor

from ..geometry import Mask, Plan, WholeSequence, make_plan
from ..kernels import accumulate_dtype, choose
from .groups import group_of
from .schedule import ring_backward, ring_forward
from .transport import Ring


def _prepare(
    q: Tensor,
    layout: str,
    length: int,
    num_ranks: int,
    documents: list[int],
    num_tokens: list[int],
    causal: bool,
    window: int,
    group: str,
) -> tuple[Plan, Ring | None]:
    sequence = WholeSequence.from_ints(layout, length, num_ranks, documents, num_tokens)
    ring = Ring(group_of(group)) if num_ranks > 1 else None
    plan = make_plan(sequence, Mask(causal, window or None), ring.rank if ring else 0, q.shape[0], q.shape[2])
    return plan, ring


@torch.library.custom_op("ring_hf::ring_attention", mutates_args=())
def _ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: str,
    length: int,
    num_ranks: int,
    documents: list[int],
    num_tokens: list[int],
    causal: bool,
    window: int,
    scale: float,
    group: str,
    kernel: str,
    overlap: bool,
) -> tuple[Tensor, Tensor]:
    plan, ring = _prepare(q, layout, length, num_ranks, documents, num_tokens, causal, window, group)
    out, lse = ring_forward(q, k, v, plan, ring, choose(kernel, q, v), scale, overlap)
    return out.to(q.dtype), lse


@_ring_attention.register_fake
def _(q, k, v, layout, length, num_ranks, documents, num_tokens, causal, window, scale, group, kernel, overlap):
    batch, heads, tokens, _ = q.shape
    out = q.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)
    return out, q.new_empty(batch, heads, tokens, dtype=accumulate_dtype(q.dtype))


@torch.library.custom_op("ring_hf::ring_attention_backward", mutates_args=())
def _ring_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: str,
    length: int,
    num_ranks: int,
    documents: list[int],
    num_tokens: list[int],
    causal: bool,
    window: int,
    scale: float,
    group: str,
    kernel: str,
    overlap: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    plan, ring = _prepare(q, layout, length, num_ranks, documents, num_tokens, causal, window, group)
    # A query that saw nothing has lse -inf; with +inf its weights exp(score - lse) are 0 instead of NaN.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    return ring_backward(dout, q, k, v, out, lse, plan, ring, choose(kernel, q, v), scale, overlap)


@_ring_attention_backward.register_fake
def _(dout, q, k, v, *_):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dout, _dlse):
    q, k, v, out, lse = ctx.saved_tensors
    return *_ring_attention_backward(dout, q, k, v, out, lse, *ctx.settings), *(None for _ in ctx.settings)


_ring_attention.register_autograd(_backward, setup_context=_setup_context)


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sequence: WholeSequence,
    group: str = "",
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    kernel: str = "auto",
    overlap: bool = True,
) -> tuple[Tensor, Tensor]:
    """Exact attention over a sequence whose tokens are dealt to the ranks of `group`; every rank calls it.

    Args:
        q: this rank's queries `[B, H, C, D]`, C = sequence.length / sequence.num_ranks; any strides.
        k, v: this rank's keys `[B, K, C, D]` and values `[B, K, C, Dv]`; H a multiple of K, never repeated.
        sequence: the whole batch as all ranks see it: layout, padded length, documents, right padding.
        group: name from `register_group`; unused with one rank.
        causal, window: the mask, see `geometry.Mask`.
        scale: factor on the scores, `D ** -0.5` by default.
        kernel: "auto", or a key of `kernels.KERNELS`.
        overlap: compute while the next block travels; False only to measure what that is worth.

    Returns:
        `out [B, H, C, Dv]` in q's dtype and `lse [B, H, C]` (natural log, at least fp32, no gradient).

    Raises:
        ValueError: for shapes, dtypes or kernels that do not fit. With one rank, q may be shorter than k: the queries
            are then the last ones.
    """
    check_tensors(q, k, v, sequence)
    Mask(causal, window)
    choose(kernel, q, v)
    if sequence.num_ranks > 1 and (size := group_of(group).size()) != sequence.num_ranks:
        raise ValueError(
            f"The sequence is dealt to {sequence.num_ranks} ranks, but the group has {size}. Describe the sequence "
            f"with num_ranks={size}, or pass the group of the ranks that hold it."
        )
    return _ring_attention(
        q,
        k,
        v,
        sequence.layout,
        sequence.length,
        sequence.num_ranks,
        *sequence.to_ints(),
        causal,
        window or 0,
        q.shape[-1] ** -0.5 if scale is None else scale,
        group,
        kernel,
        overlap,
    )


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: tuple[tuple[int, ...], ...] | None = None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The same attention in one process, without any exchange: `(out, lse)`.

    Args:
        q, k, v: `[B, H, Q, D]`, `[B, K, S, D]`, `[B, K, S, Dv]`; the queries are the last Q of the S tokens.
        documents: per batch row the cumulative boundaries `(0, ..., S)`, None for one document per row.
    """
    sequence = WholeSequence("contiguous", k.shape[2], 1, documents)
    return ring_attention(q, k, v, sequence=sequence, causal=causal, window=window, scale=scale, kernel=kernel)


def check_tensors(q: Tensor, k: Tensor, v: Tensor, sequence: WholeSequence) -> None:
    """Raises `ValueError` unless the shapes, dtypes and devices of one rank's shard fit together and the sequence."""
    if {x.ndim for x in (q, k, v)} != {4}:
        raise ValueError(f"q, k and v must be [batch, heads, tokens, head_dim], got {_shapes(q, k, v)}.")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v do not belong together: {_shapes(q, k, v)} as [batch, heads, tokens, head_dim].")
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{q.shape[1]} query heads cannot share {k.shape[1]} key/value heads: the first must be a multiple of the "
            "second."
        )
    if len({x.dtype for x in (q, k, v)}) > 1 or len({x.device for x in (q, k, v)}) > 1:
        found = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise ValueError(f"q, k and v must agree in dtype and device, got {found}. Cast them to one.")
    tokens = sequence.length // sequence.num_ranks
    if k.shape[2] != tokens or (q.shape[2] != tokens if sequence.num_ranks > 1 else q.shape[2] > tokens):
        raise ValueError(
            f"This rank holds {q.shape[2]} queries and {k.shape[2]} keys, but its shard of {sequence.length} tokens "
            f"over {sequence.num_ranks} ranks is {tokens}. Pass the shard of every tensor, cut with the same layout."
        )
    if sequence.num_rows not in (None, q.shape[0]):
        raise ValueError(
            f"The batch has {q.shape[0]} rows, its description {sequence.num_rows}. Build both from the same batch."
        )


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(x.shape)) for x in tensors)
