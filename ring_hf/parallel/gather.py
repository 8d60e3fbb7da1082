"""All keys and values at once, in the plan's order, so that few large tiles remain; gradients are reduce-scattered.

Letters: R ring ranks, B batch, K key/value heads, C tokens of a rank, S = R * C, D head dim.
"""

import torch

from ..geometry import Plan
from ..kernels import Sum, accumulate_dtype
from .transport import Ring


class Blocks:
    """One block: everything. There is nothing to compute while it comes."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, plan: Plan, ring: Ring, overlap: bool) -> None:
        self._own, self._plan, self._ring = (k, v), plan, ring

    def post(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Gathers the keys and values of all ranks."""
        k, v = (self._gather(x) for x in self._own)
        return k, v

    def _gather(self, x_BKCD: torch.Tensor) -> torch.Tensor:
        x_RBKCD = self._ring.all_gather(x_BKCD)
        parts = [x_RBKCD[part.rank, :, :, part.start : part.stop] for part in self._plan.steps[0].block]
        return torch.cat(parts, dim=2)

    def wait(self, step: int) -> None:
        """Nothing is under way."""


class Gradients:
    """dK and dV of all keys, summed over the ranks in at least fp32 and returned to their owners."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, plan: Plan, ring: Ring, overlap: bool) -> None:
        self._like, self._plan, self._ring = (k, v), plan, ring
        self._dtype = accumulate_dtype(k.dtype)
        batch, heads, tokens = k.shape[:3]
        whole = (batch, heads, tokens * ring.size)
        self._sums: list[Sum] = [Sum(x.new_empty(1).expand(*whole, x.shape[3]), self._dtype) for x in (k, v)]

    def share(self, step: int) -> tuple[Sum, Sum]:
        """Empty sums for what this rank adds to the dK and dV of the block."""
        dk, dv = self._sums
        return dk, dv

    def send(self, step: int) -> None:
        """There is one step: everything goes home at its end."""

    def home(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`(dk, dv)` of this rank's own keys in their dtype, summed over all ranks and rounded once."""
        grads: list[torch.Tensor] = []
        while self._sums:
            total_BKSD = self._sums.pop(0).total.to(self._dtype)
            x_BKCD = self._like[len(grads)]
            by_owner_RBKCD = total_BKSD.new_empty(self._ring.size, *x_BKCD.shape)
            place = 0
            for part in self._plan.steps[0].block:
                size = part.stop - part.start
                by_owner_RBKCD[part.rank, :, :, part.start : part.stop] = total_BKSD[:, :, place : place + size]
                place += size
            del total_BKSD
            grads.append(self._ring.reduce_scatter(by_owner_RBKCD).to(x_BKCD.dtype))
        return grads[0], grads[1]
