"""Attention over a shared sequence as one PyTorch operator, `torch.ops.ring_hf.ring_attention`.

As one operator it can be saved by activation checkpointing (a checkpointed layer then exchanges nothing again),
FLOP counters and `torch.compile` see a single opaque call, and nothing about a batch lives outside its arguments.

Letters: B batch, H query heads, K key/value heads, C tokens of this ring rank, D and E head dims.
"""

from typing import Any

import torch
from torch import Tensor

from ..geometry import Plan, make_plan
from ..kernels import accumulate_dtype, choose
from .groups import group_of
from .op_arguments import AttentionOpArgs, from_json
from .schedule import ring_backward, ring_forward, sinks_gradient, transport_of
from .transport import RingComm, Transport


def prepare(args: AttentionOpArgs, num_rows: int, num_queries: int, device: torch.device) -> tuple[Plan, Transport]:
    """Return this ring rank's plan for `num_queries` tokens, and the transport that carries it out."""
    sequence, options, comm = args.sequence, args.options, None
    if sequence.ring_size > 1:
        comm = RingComm(group_of(args.group), device, sequence.ulysses, options.transport == "double_ring")
    rank = comm.rank if comm else 0
    plan = make_plan(sequence, args.spec.mask, rank, num_rows, num_queries, options.transport, options.inner_ring_size)
    return plan, transport_of(options.transport, comm, options.overlap)


@torch.library.custom_op("ring_hf::ring_attention", mutates_args=())
def ring_attention_op(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: str) -> tuple[Tensor, Tensor]:
    """`(out [B, H, C, E], lse [B, H, C])` for `q [B, H, C, D]`, `k [B, K, C, D]`, `v [B, K, C, E]`, `sinks [H]`.

    `call` is the text form of `AttentionOpArgs`.
    """
    args = from_json(call)
    plan, transport = prepare(args, q.shape[0], q.shape[2], q.device)
    kernel = choose(args.options.kernel, q, v, args.spec.softcap)
    out, lse = ring_forward(q, k, v, plan, transport, kernel, args.spec, sinks)
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
    args = from_json(call)
    plan, transport = prepare(args, q.shape[0], q.shape[2], q.device)
    kernel = choose(args.options.kernel, q, v, args.spec.softcap)
    # A query that sees no key has lse -inf; with +inf its weights exp(score - lse) are 0 instead of NaN.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    grads = ring_backward(dout, q, k, v, out, lse, plan, transport, kernel, args.spec)
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
