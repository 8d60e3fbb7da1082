"""The schedule, forward and backward: start the next exchange, compute the tiles of this block, finish the exchange.

Ring Attention (Liu et al. 2023, arXiv 2310.01889) for any layout, mask and transport: the plan alone says what to
compute in a step, and the transport how its block gets here. Backward moves keys and values again; the gradients of a
block travel in fp32 to the owner of its keys.

An attention sink (Xiao et al. 2023, arXiv 2309.17453, learned per head as in gpt-oss) is one more key with a score and
no value: it joins the softmax once, after the last step, and backward needs nothing for it but the final lse.

Letters: B batch, H query heads, K key/value heads, C tokens of this rank, D and E head dims.
"""

import torch

from ..geometry import AttentionSpec, Plan, split
from ..kernels import GradAccumulator, Kernel, OutLseAccumulator, accumulate_dtype
from .allgather import AllGatherTransport
from .direct_fetch import DirectFetchTransport
from .ring import RingTransport
from .transport import RingComm, Transport

TRANSPORTS: dict[str, type[RingTransport] | type[AllGatherTransport] | type[DirectFetchTransport]] = {
    "ring": RingTransport,
    "double_ring": RingTransport,
    "allgather": AllGatherTransport,
    "direct": DirectFetchTransport,
}


def transport_of(name: str, comm: RingComm | None, overlap: bool = True) -> Transport:
    """Return the transport called `name`; with one rank (`comm` is None) nothing travels."""
    return RingTransport(None) if comm is None else TRANSPORTS[name](comm, overlap)


def ring_forward(
    q_BHCD: torch.Tensor,
    k_BKCD: torch.Tensor,
    v_BKCE: torch.Tensor,
    plan: Plan,
    transport: Transport,
    kernel: Kernel,
    spec: AttentionSpec,
    sinks_H: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's `(out [B, H, C, E], lse [B, H, C])` in at least fp32."""
    scale = spec.scale_for(q_BHCD.shape[-1])
    result = OutLseAccumulator(q_BHCD, v_BKCE.shape[-1])
    blocks = transport.blocks(k_BKCD, v_BKCE, plan)
    # Partial results are as large as the shard: each is dropped before the next one is made.
    for number, step in enumerate(plan.steps):
        k, v = blocks.start_step(number)
        for queries, out, lse in kernel.forward(q_BHCD, k, v, step.tiles, scale, spec.softcap):
            result.merge(queries, out, lse)
            del out, lse
        del k, v
        blocks.finish_step(number)
    if sinks_H is not None:
        result.add_sinks(sinks_H)
    return result.out, result.lse


def ring_backward(
    dout_BHCE: torch.Tensor,
    q_BHCD: torch.Tensor,
    k_BKCD: torch.Tensor,
    v_BKCE: torch.Tensor,
    out_BHCE: torch.Tensor,
    lse_BHC: torch.Tensor,
    plan: Plan,
    transport: Transport,
    kernel: Kernel,
    spec: AttentionSpec,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return this rank's `(dq, dk, dv)` in the dtypes of q, k and v; `out` and `lse` are global."""
    scale = spec.scale_for(q_BHCD.shape[-1])
    dq = GradAccumulator(q_BHCD, _sum_dtype(plan, q_BHCD.dtype))
    blocks = transport.blocks(k_BKCD, v_BKCE, plan)
    grads = transport.gradients(k_BKCD, v_BKCE, plan)
    # As in forward, no name keeps a tensor as large as the shard longer than it is needed.
    for number, step in enumerate(plan.steps):
        k, v = blocks.start_step(number)
        dk, dv = grads.for_step(number)
        tensors = dout_BHCE, q_BHCD, k, v, out_BHCE, lse_BHC
        for queries, keys, dq_part, dk_part, dv_part in kernel.backward(*tensors, step.tiles, scale, spec.softcap):
            dq.add(queries, dq_part)
            del dq_part
            dk.add(keys, dk_part)
            dv.add(keys, dv_part)
            del dk_part, dv_part
        del tensors
        del k, v, dk, dv
        grads.send(number)
        blocks.finish_step(number)
    return dq.total.to(q_BHCD.dtype), *grads.finish()


def sinks_gradient(
    dout_BHCE: torch.Tensor, out_BHCE: torch.Tensor, lse_BHC: torch.Tensor, sinks_H: torch.Tensor
) -> torch.Tensor:
    """Return `d sinks [H]` from this rank's queries: a sink takes `exp(sink - lse)` of a row's weight and adds 0."""
    weight_BHC = torch.exp(sinks_H.to(lse_BHC.dtype)[:, None] - lse_BHC)
    delta_BHC = (dout_BHCE.to(lse_BHC.dtype) * out_BHCE).sum(-1)
    return -(weight_BHC * delta_BHC).sum((0, 2)).to(sinks_H.dtype)


def _sum_dtype(plan: Plan, dtype: torch.dtype) -> torch.dtype:
    """fp32, unless no query gets more than two partial results: their sum is rounded once either way."""
    num_parts = sum(len(split(tile.num_q, tile.num_k, tile.lo, tile.hi)) for step in plan.steps for tile in step.tiles)
    return accumulate_dtype(dtype) if num_parts > 2 else dtype
