"""The schedule, forward and backward: post the next exchange, compute the tiles that are here, wait, swap.

Ring Attention (Liu et al. 2023, arXiv 2310.01889) for any layout, mask and transport: what to compute in a step comes
from the plan alone, and how its block gets here from the transport. Backward brings keys and values again; the
gradients of a block travel in fp32 and come home to its owner.

An attention sink (Xiao et al. 2023, arXiv 2309.17453, learned per head as in gpt-oss) is one more key with a score and
no value: it joins the softmax once, after the last step, and needs nothing but the final lse in backward.

Letters: B batch, H query heads, K key/value heads, C tokens of this rank, D head dim.
"""

from types import ModuleType

import torch

from ..geometry import Plan, split
from ..kernels import GradAccumulator, Kernel, OutLseAccumulator, accumulate_dtype
from . import all_gather, direct_fetch, single_device
from . import ring as ring_transport
from .transport import Ring

TRANSPORTS: dict[str, ModuleType] = {
    "ring": ring_transport,
    "double_ring": ring_transport,
    "allgather": all_gather,
    "direct": direct_fetch,
}
TRANSPORTS["resident"] = single_device  # of a plan whose every block is in this process (`emulation`)


def _transport(plan: Plan) -> ModuleType:
    return TRANSPORTS[plan.transport] if plan.num_ranks > 1 else ring_transport


def ring_forward(
    q_BHCD: torch.Tensor,
    k_BKCD: torch.Tensor,
    v_BKCD: torch.Tensor,
    plan: Plan,
    ring: Ring | None,
    kernel: Kernel,
    scale: float,
    softcap: float | None,
    sinks_H: torch.Tensor | None,
    overlap: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's `(out [B, H, C, D], lse [B, H, C])` in at least fp32."""
    state = OutLseAccumulator(q_BHCD, v_BKCD.shape[-1])
    blocks = _transport(plan).Blocks(k_BKCD, v_BKCD, plan, ring, overlap)
    # Results are as large as the shard: each is dropped before the next one is made.
    for number, step in enumerate(plan.steps):
        k, v = blocks.post(number)
        for queries, out, lse in kernel.forward(q_BHCD, k, v, step.tiles, scale, softcap):
            state.add(queries, out, lse)
            del out, lse
        del k, v
        blocks.wait(number)
    if sinks_H is not None:
        state.add_sinks(sinks_H)
    return state.out, state.lse


def ring_backward(
    dout_BHCD: torch.Tensor,
    q_BHCD: torch.Tensor,
    k_BKCD: torch.Tensor,
    v_BKCD: torch.Tensor,
    out_BHCD: torch.Tensor,
    lse_BHC: torch.Tensor,
    plan: Plan,
    ring: Ring | None,
    kernel: Kernel,
    scale: float,
    softcap: float | None,
    overlap: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This rank's `(dq, dk, dv)` in the dtypes of q, k and v, from the global `out` and `lse` of its queries."""
    dq = GradAccumulator(q_BHCD, _sum_dtype(plan, q_BHCD.dtype))
    blocks = _transport(plan).Blocks(k_BKCD, v_BKCD, plan, ring, overlap)
    grads = _transport(plan).Gradients(k_BKCD, v_BKCD, plan, ring, overlap)
    # As in forward, nothing as large as the shard is held by a name longer than it is needed.
    for number, step in enumerate(plan.steps):
        k, v = blocks.post(number)
        dk, dv = grads.share(number)
        tensors = dout_BHCD, q_BHCD, k, v, out_BHCD, lse_BHC
        for queries, keys, one_dq, one_dk, one_dv in kernel.backward(*tensors, step.tiles, scale, softcap):
            dq.add(queries, one_dq)
            del one_dq
            dk.add(keys, one_dk)
            dv.add(keys, one_dv)
            del one_dk, one_dv
        del tensors
        del k, v, dk, dv
        grads.send(number)
        blocks.wait(number)
    return dq.total.to(q_BHCD.dtype), *grads.home()


def sinks_gradient(
    dout_BHCD: torch.Tensor, out_BHCD: torch.Tensor, lse_BHC: torch.Tensor, sinks_H: torch.Tensor
) -> torch.Tensor:
    """`d sinks [H]` from this rank's queries: each sink took `exp(sink - lse)` of a row's weight and gave nothing."""
    taken_BHC = torch.exp(sinks_H.to(lse_BHC.dtype)[:, None] - lse_BHC)
    delta_BHC = (dout_BHCD.to(lse_BHC.dtype) * out_BHCD).sum(-1)
    return -(taken_BHC * delta_BHC).sum((0, 2)).to(sinks_H.dtype)


def _sum_dtype(plan: Plan, dtype: torch.dtype) -> torch.dtype:
    """fp32, unless no query gets more than two results: their sum is rounded once either way."""
    pieces = sum(len(split(tile.num_q, tile.num_k, tile.lo, tile.hi)) for step in plan.steps for tile in step.tiles)
    return accumulate_dtype(dtype) if pieces > 2 else dtype
