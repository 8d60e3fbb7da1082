"""Attention over a shared sequence as one PyTorch operator, `torch.ops.ring_hf.ring_attention`.

Being one operator, activation checkpointing can save it (a checkpointed layer then does not exchange anything again),
FLOP counters and `torch.compile` see a single opaque call, and nothing about a batch lives outside its arguments.

Letters: B batch, H query heads, K key/value heads, C tokens of this rank's place of the ring, D and E head dims.
"""

from typing import Any

import torch
from torch import Tensor

from ..geometry import Plan, make_plan
from ..kernels import accumulate_dtype, choose
from .groups import group_of
from .op_arguments import Call, decode
from .schedule import ring_backward, ring_forward, sinks_gradient
from .transport import Ring


def prepare(call: Call, num_rows: int, num_queries: int, device: torch.device) -> tuple[Plan, Ring | None]:
    """The plan of this rank, for so many queries of its place, and the ring that carries it out."""
    ring = None
    if call.sequence.ring_size > 1:
        ring = Ring(group_of(call.group), device, call.sequence.ulysses, call.transport == "double_ring")
    place = ring.rank if ring else 0
    plan = make_plan(call.sequence, call.mask, place, num_rows, num_queries, call.transport, call.inner)
    return plan, ring


@torch.library.custom_op("ring_hf::ring_attention", mutates_args=())
def ring_attention_op(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: str) -> tuple[Tensor, Tensor]:
    """`(out [B, H, C, E], lse [B, H, C])` for `q [B, H, C, D]`, `k [B, K, C, D]`, `v [B, K, C, E]`, `sinks [H]`.

    `call` is the text form of a `Call`.
    """
    settings = decode(call)
    plan, ring = prepare(settings, q.shape[0], q.shape[2], q.device)
    kernel = choose(settings.kernel, q, v, settings.softcap)
    maths = settings.scale, settings.softcap, sinks
    out, lse = ring_forward(q, k, v, plan, ring, kernel, *maths, settings.overlap)
    return out.to(q.dtype), lse


@ring_attention_op.register_fake
def _(q, k, v, sinks, call):
    batch, heads, tokens, _ = q.shape
    out = q.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)
    return out, q.new_empty(batch, heads, tokens, dtype=accumulate_dtype(q.dtype))


@torch.library.custom_op("ring_hf::ring_attention_backward", mutates_args=())
def _ring_attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor, call: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    settings = decode(call)
    plan, ring = prepare(settings, q.shape[0], q.shape[2], q.device)
    kernel = choose(settings.kernel, q, v, settings.softcap)
    # A query that saw nothing has lse -inf; with +inf its weights exp(score - lse) are 0 instead of NaN.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    maths = settings.scale, settings.softcap
    grads = ring_backward(dout, q, k, v, out, lse, plan, ring, kernel, *maths, settings.overlap)
    return *grads, q.new_empty(0) if sinks is None else sinks_gradient(dout, out, lse, sinks)


@_ring_attention_backward.register_fake
def _(dout, q, k, v, sinks, out, lse, call):
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dsinks


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, ctx.call = inputs
    ctx.save_for_backward(q, k, v, sinks, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dout, _dlse):
    q, k, v, sinks, out, lse = ctx.saved_tensors
    *grads, dsinks = _ring_attention_backward(dout, q, k, v, sinks, out, lse, ctx.call)
    return *grads, None if sinks is None else dsinks, None


ring_attention_op.register_autograd(_backward, setup_context=_setup_context)
