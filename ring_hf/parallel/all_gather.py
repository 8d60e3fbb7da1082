"""All keys and values at once, in the plan's order, so that few large tiles remain; gradients are reduce-scattered.

Letters: R ring ranks, B batch, K key/value heads, C tokens of a rank, S = R * C, D head dim.
"""

import torch

from ..geometry import Plan
from ..kernels import GradAccumulator, accumulate_dtype
from .buffers import Buffer
from .transport import PendingExchange, Ring


class Blocks:
    """One block: everything. Values come while keys are put in order; nothing can be computed before."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, plan: Plan, ring: Ring, overlap: bool) -> None:
        self._own, self._plan, self._ring, self._overlap = (k, v), plan, ring, overlap
        self._block: list[Buffer] = []

    def post(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Gathers the keys and values of all ranks."""
        coming = []
        for x in self._own:
            coming.append(self._ring.all_gather(x))
            if not self._overlap:
                coming[-1].wait()
        for x, exchange in zip(self._own, coming, strict=True):
            self._block.append(self._ordered(x, exchange))
        k, v = (block.parts[0] for block in self._block)
        return k, v

    def _ordered(self, x_BKCD: torch.Tensor, exchange: PendingExchange) -> Buffer:
        exchange.wait()
        assert exchange.receive is not None
        batch, heads, tokens, dim = x_BKCD.shape
        block = self._ring.take(((batch, heads, tokens * self._ring.size, dim),), x_BKCD.dtype, compute=True)
        torch.cat(self._slices(exchange.receive.parts[0]), dim=2, out=block.parts[0])
        self._ring.touched(exchange.receive)
        self._ring.give(exchange.receive)
        return block

    def _slices(self, x_RBKCD: torch.Tensor) -> list[torch.Tensor]:
        return [x_RBKCD[part.rank, :, :, part.start : part.stop] for part in self._plan.steps[0].block]

    def wait(self, step: int) -> None:
        """The compute is queued."""
        while self._block:
            block = self._block.pop()
            self._ring.touched(block)
            self._ring.give(block)


class Gradients:
    """dK and dV of all keys, summed over the ranks in at least fp32 and returned to their owners."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, plan: Plan, ring: Ring, overlap: bool) -> None:
        self._like, self._plan, self._ring, self._overlap = (k, v), plan, ring, overlap
        self._dtype = accumulate_dtype(k.dtype)
        batch, heads, tokens = k.shape[:3]
        whole = (batch, heads, tokens * ring.size)
        self._sums: list[GradAccumulator] = [
            GradAccumulator(x.new_empty(1).expand(*whole, x.shape[3]), self._dtype) for x in (k, v)
        ]

    def share(self, step: int) -> tuple[GradAccumulator, GradAccumulator]:
        """Empty sums for what this rank adds to the dK and dV of the block."""
        dk, dv = self._sums
        return dk, dv

    def send(self, step: int) -> None:
        """There is one step: everything goes home at its end."""

    def home(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`(dk, dv)` of this rank's own keys in their dtype, summed over all ranks and rounded once."""
        coming: list[PendingExchange] = []
        while self._sums:
            total_BKSD = self._sums.pop(0).total.to(self._dtype)
            coming.append(self._ring.reduce_scatter(self._by_owner(total_BKSD, self._like[len(coming)])))
            del total_BKSD
            if not self._overlap:
                coming[-1].wait()
        grads = []
        for x_BKCD, exchange in zip(self._like, coming, strict=True):
            exchange.wait()
            assert exchange.receive is not None
            grads.append(exchange.receive.parts[0].to(x_BKCD.dtype))
            self._ring.give(exchange.send)
        return grads[0], grads[1]

    def _by_owner(self, total_BKSD: torch.Tensor, x_BKCD: torch.Tensor) -> Buffer:
        buffer = self._ring.take(((self._ring.size, *x_BKCD.shape),), self._dtype, compute=True)
        place = 0
        for part in self._plan.steps[0].block:
            size = part.stop - part.start
            buffer.parts[0][part.rank, :, :, part.start : part.stop] = total_BKSD[:, :, place : place + size]
            place += size
        self._ring.touched(buffer)
        return buffer
