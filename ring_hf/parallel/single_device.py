"""A transport without a wire: one process holds the blocks of all ranks, and computes for one after the other.

The plan, the schedule and the kernels are those of a real ring; only what `post` returns comes from memory. So one
device shows that its kernels are exact on every tile that any rank would get, and what they take (`emulation`).

Letters: B batch, K key/value heads, C tokens of a rank, D head dim.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..geometry import Plan, Slice
from ..kernels import GradAccumulator, accumulate_dtype

Block = tuple[Slice, ...]


class Residents:
    """Keys and values of all ranks of a ring, and the sums of their gradients in at least fp32.

    Args:
        k_RBKCD, v_RBKCD: shards in the order of the ring.
    """

    def __init__(self, k_RBKCD: Sequence[torch.Tensor], v_RBKCD: Sequence[torch.Tensor]) -> None:
        self.k, self.v = list(k_RBKCD), list(v_RBKCD)
        self._blocks: dict[Block, tuple[torch.Tensor, torch.Tensor]] = {}
        self._sums: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None

    @property
    def sums(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """dK and dV of every rank: zeros before any backward pass."""
        if self._sums is None:
            dtype = accumulate_dtype(self.k[0].dtype)
            dk, dv = ([torch.zeros_like(x, dtype=dtype) for x in shards] for shards in (self.k, self.v))
            self._sums = dk, dv
        return self._sums

    def block(self, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a block: a rank's own tensors if it is a whole shard, else put together once."""
        if self.whole(block):
            return self.k[block[0].rank], self.v[block[0].rank]
        if block not in self._blocks:
            parts = [
                [shards[part.rank][:, :, part.start : part.stop] for part in block] for shards in (self.k, self.v)
            ]
            k, v = (
                torch.cat(part, 2) if part else x[0][:, :, :0] for part, x in zip(parts, (self.k, self.v), strict=True)
            )
            self._blocks[block] = k, v
        return self._blocks[block]

    def prepare(self, plans: Iterable[Plan]) -> None:
        """Makes everything that exists before a rank computes: what is timed afterwards is compute alone."""
        for plan in plans:
            for step in plan.steps:
                self.block(step.block)
        self.sums  # noqa: B018 (made when first asked for)

    def whole(self, block: Block) -> bool:
        """Whether a block is the whole shard of one rank."""
        return len(block) == 1 and block[0].stop - block[0].start == self.k[0].shape[2]


class Blocks:
    """Keys and values that never travel."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, plan: Plan, ring: Residents, overlap: bool) -> None:
        self._plan, self._residents = plan, ring

    def post(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The block of this step."""
        return self._residents.block(self._plan.steps[step].block)

    def wait(self, step: int) -> None:
        """Everything is here."""


class Gradients:
    """dK and dV, added to the sums of their owners."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, plan: Plan, ring: Residents, overlap: bool) -> None:
        self._plan, self._residents = plan, ring
        self._here: tuple[GradAccumulator, GradAccumulator] | None = None

    def share(self, step: int) -> tuple[GradAccumulator, GradAccumulator]:
        """The sums of the block's owner if it is a whole shard, else empty ones."""
        block, residents = self._plan.steps[step].block, self._residents
        dk, dv = (
            self._sum(x, of_ranks, block) for x, of_ranks in zip(residents.block(block), residents.sums, strict=True)
        )
        self._here = dk, dv
        return dk, dv

    def _sum(self, x: torch.Tensor, of_ranks: list[torch.Tensor], block: Block) -> GradAccumulator:
        if self._residents.whole(block):
            return GradAccumulator(x, of_ranks[block[0].rank].dtype, lambda: of_ranks[block[0].rank])
        return GradAccumulator(x, of_ranks[0].dtype)

    def send(self, step: int) -> None:
        """After a step: a block of several ranks' keys gives every owner its part."""
        block, here = self._plan.steps[step].block, self._here
        self._here = None
        if here is None or self._residents.whole(block):
            return
        for own, of_ranks in zip(here, self._residents.sums, strict=True):
            place, total = 0, own.total
            for part in block:
                size = part.stop - part.start
                of_ranks[part.rank][:, :, part.start : part.stop].add_(total[:, :, place : place + size])
                place += size

    def home(self) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's `(dk, dv)` so far, rounded: whole when all ranks have computed."""
        found: list[Any] = [
            of_ranks[self._plan.rank].to(shards[0].dtype)
            for of_ranks, shards in zip(self._residents.sums, (self._residents.k, self._residents.v), strict=True)
        ]
        return found[0], found[1]
