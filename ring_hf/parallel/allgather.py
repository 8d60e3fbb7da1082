"""All keys and values at once, in the plan's order, so that a few large tiles remain; gradients are reduce-scattered.

Letters: R ring ranks, B batch, K key/value heads, C tokens of a rank, S = R * C, D and E head dims.
"""

from dataclasses import dataclass

import torch

from ..geometry import Plan
from ..kernels import GradAccumulator, accumulate_dtype
from .buffers import Buffer
from .transport import PendingExchange, RingComm


@dataclass(frozen=True)
class AllGatherTransport:
    """The transport of the name "allgather"."""

    comm: RingComm
    overlap: bool = True

    def blocks(self, k_BKCD: torch.Tensor, v_BKCE: torch.Tensor, plan: Plan) -> "KVBlocks":
        return KVBlocks(k_BKCD, v_BKCE, plan, self)

    def gradients(self, k_BKCD: torch.Tensor, v_BKCE: torch.Tensor, plan: Plan) -> "KVGradients":
        return KVGradients(k_BKCD, v_BKCE, plan, self)


class KVBlocks:
    """One block: everything. Values travel while keys are put in order; nothing can be computed before."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, plan: Plan, transport: AllGatherTransport) -> None:
        self._own, self._plan, self._comm, self._overlap = (k, v), plan, transport.comm, transport.overlap
        self._block: list[Buffer] = []

    def start_step(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather the keys and values of all ranks: `[B, K, S, D]` and `[B, K, S, E]`."""
        pending = []
        for x in self._own:
            pending.append(self._comm.all_gather(x))
            if not self._overlap:
                pending[-1].wait()
        for x, exchange in zip(self._own, pending, strict=True):
            self._block.append(self._in_order(x, exchange))
        k, v = (block.parts[0] for block in self._block)
        return k, v

    def _in_order(self, x_BKCD: torch.Tensor, exchange: PendingExchange) -> Buffer:
        exchange.wait()
        assert exchange.receive is not None
        batch, heads, tokens, dim = x_BKCD.shape
        block = self._comm.acquire(((batch, heads, tokens * self._comm.size, dim),), x_BKCD.dtype, compute=True)
        torch.cat(self._slices(exchange.receive.parts[0]), dim=2, out=block.parts[0])
        self._comm.record_use(exchange.receive)
        self._comm.release(exchange.receive)
        return block

    def _slices(self, x_RBKCD: torch.Tensor) -> list[torch.Tensor]:
        return [x_RBKCD[part.rank, :, :, part.start : part.stop] for part in self._plan.steps[0].block]

    def finish_step(self, step: int) -> None:
        """Release the block. The compute is queued by now."""
        while self._block:
            block = self._block.pop()
            self._comm.record_use(block)
            self._comm.release(block)


class KVGradients:
    """dK and dV of all keys, summed over the ranks in at least fp32 and returned to the owners of the keys."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, plan: Plan, transport: AllGatherTransport) -> None:
        self._like, self._plan, self._comm, self._overlap = (k, v), plan, transport.comm, transport.overlap
        self._dtype = accumulate_dtype(k.dtype)
        batch, heads, tokens = k.shape[:3]
        whole = (batch, heads, tokens * self._comm.size)
        self._sums: list[GradAccumulator] = [
            GradAccumulator(x.new_empty(1).expand(*whole, x.shape[3]), self._dtype) for x in (k, v)
        ]

    def for_step(self, step: int) -> tuple[GradAccumulator, GradAccumulator]:
        """Return the accumulators of this rank's dK and dV for all keys."""
        dk, dv = self._sums
        return dk, dv

    def send(self, step: int) -> None:
        """There is only one step: everything is sent at its end."""

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `(dk, dv)` of this rank's own keys in their dtype, summed over all ranks and rounded once."""
        pending: list[PendingExchange] = []
        while self._sums:
            total_BKSD = self._sums.pop(0).total.to(self._dtype)
            pending.append(self._comm.reduce_scatter(self._by_owner(total_BKSD, self._like[len(pending)])))
            del total_BKSD
            if not self._overlap:
                pending[-1].wait()
        grads = []
        for x_BKCD, exchange in zip(self._like, pending, strict=True):
            exchange.wait()
            assert exchange.receive is not None
            grads.append(exchange.receive.parts[0].to(x_BKCD.dtype))
            self._comm.release(exchange.send)
        return grads[0], grads[1]

    def _by_owner(self, total_BKSD: torch.Tensor, x_BKCD: torch.Tensor) -> Buffer:
        """`[R, B, K, C, D]`: the sums in the order of the ranks that own the keys."""
        buffer = self._comm.acquire(((self._comm.size, *x_BKCD.shape),), self._dtype, compute=True)
        offset = 0
        for part in self._plan.steps[0].block:
            size = part.stop - part.start
            buffer.parts[0][part.rank, :, :, part.start : part.stop] = total_BKSD[:, :, offset : offset + size]
            offset += size
        self._comm.record_use(buffer)
        return buffer
