"""A whole ring on one device: the attention of every rank is computed in turn, from its own plan.

This shows that kernels and geometry are exact on a device. The exchange is not emulated.

Letters: B batch, H query heads, K key/value heads, S tokens of the sequence, C of a rank, D and E head dims.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..geometry import AttentionSpec, Plan, RingOptions, ShardedSequence, head_split, make_plan
from ..kernels import choose
from ..parallel.schedule import ring_backward, ring_forward, sinks_gradient
from ..parallel.sharding import cut, join
from .single_device import Residents, SingleDeviceTransport

WHOLE_SHARDS = RingOptions(transport="ring")


@dataclass(frozen=True)
class Emulation:
    """A ring, its attention and its options.

    Attributes:
        options: `transport` says how blocks are cut and must not be "auto".

    Raises:
        ValueError: if the ring has one rank.
    """

    sequence: ShardedSequence
    spec: AttentionSpec
    options: RingOptions = WHOLE_SHARDS

    def __post_init__(self) -> None:
        if self.sequence.ring_size == 1:
            raise ValueError("num_ranks=1 is no ring. Emulate at least 2 ranks, or call local_attention.")

    def plan(self, rank: int, num_rows: int) -> Plan:
        """Return the plan of ring rank `rank`."""
        options = self.options
        return make_plan(
            self.sequence, self.spec.mask, rank, num_rows, None, options.transport, options.inner_ring_size
        )

    def shards(self, x_BHSD: Tensor) -> list[Tensor]:
        """Return the shards `[B, H, C, D]` of all ranks, in the order of the ring."""
        return [cut(x_BHSD, self.sequence.ring_segments(rank), 2) for rank in range(self.sequence.ring_size)]

    def whole(self, shards: list[Tensor]) -> Tensor:
        """Return the whole sequence `[B, H, S, D]`: the inverse of `shards`."""
        return join(shards, [self.sequence.ring_segments(rank) for rank in range(len(shards))], 2)

    def forward(
        self, rank: int, q_BHCD: Tensor, residents: Residents, sinks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return one rank's `(out [B, H, C, E], lse [B, H, C])`, as its operator does."""
        k, v = residents.k[rank], residents.v[rank]
        kernel = choose(self.options.kernel, q_BHCD, v, self.spec.softcap)
        plan, transport = self.plan(rank, q_BHCD.shape[0]), SingleDeviceTransport(residents)
        out, lse = ring_forward(q_BHCD, k, v, plan, transport, kernel, self.spec, sinks)
        return out.to(q_BHCD.dtype), lse

    def backward(
        self, rank: int, dout_BHCE: Tensor, q_BHCD: Tensor, out_BHCE: Tensor, lse_BHC: Tensor, residents: Residents
    ) -> Tensor:
        """Return one rank's dq `[B, H, C, D]`; add its shares of dk and dv to `residents.sums`."""
        k, v = residents.k[rank], residents.v[rank]
        kernel = choose(self.options.kernel, q_BHCD, v, self.spec.softcap)
        plan, transport = self.plan(rank, q_BHCD.shape[0]), SingleDeviceTransport(residents)
        lse = lse_BHC.masked_fill(lse_BHC == -torch.inf, torch.inf)
        dq, _, _ = ring_backward(dout_BHCE, q_BHCD, k, v, out_BHCE, lse, plan, transport, kernel, self.spec)
        return dq


def emulated_attention(
    q: Tensor, k: Tensor, v: Tensor, emulation: Emulation, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return `(out [B, H, S, E], lse [B, H, S])` of a whole sequence, rank by rank; only out is differentiable.

    With Ulysses, each rank of a Ulysses group attends with its share of the heads.

    Args:
        q, k, v: `[B, H, S, D]`, `[B, K, S, D]` and `[B, K, S, E]`.
        sinks: `[H]`.
    """
    ulysses = emulation.sequence.ulysses
    if ulysses == 1:
        return _Emulated.apply(q, k, v, sinks, emulation)
    parts = []
    for share in head_split(q.shape[1], k.shape[1], ulysses):
        if not share.num_q:
            continue
        queries, keys = slice(share.q_start, share.q_start + share.num_q), list(share.kv)
        own_sinks = None if sinks is None else sinks[queries]
        parts.append(_Emulated.apply(q[:, queries], k[:, keys], v[:, keys], own_sinks, emulation))
    out, lse = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
    return out, lse


class _Emulated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, emulation: Emulation
    ) -> tuple[Tensor, Tensor]:
        residents = Residents(emulation.shards(k), emulation.shards(v))
        results = [emulation.forward(rank, x, residents, sinks) for rank, x in enumerate(emulation.shards(q))]
        out, lse = (emulation.whole(list(column)) for column in zip(*results, strict=True))
        ctx.emulation = emulation
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        emulation: Emulation = ctx.emulation
        residents = Residents(emulation.shards(k), emulation.shards(v))
        dout_R, q_R, out_R, lse_R = (emulation.shards(x) for x in (grads[0], q, out, lse))
        dq = [
            emulation.backward(rank, dout_R[rank], q_R[rank], out_R[rank], lse_R[rank], residents)
            for rank in range(len(q_R))
        ]
        dk, dv = (emulation.whole(of_ranks).to(k.dtype) for of_ranks in residents.sums)
        dsinks = None if sinks is None else sinks_gradient(grads[0], out, lse, sinks)
        return emulation.whole(dq), dk, dv, dsinks, None
