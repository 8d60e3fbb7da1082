"""A transport without a network: one process holds the blocks of all ranks, and computes for one rank after the other.

The plan, the schedule and the kernels are those of a real ring; only the blocks come from memory. So a single device
shows that its kernels are exact on every tile that any rank would get, and how long they take (`ring_emulation`).

Letters: B batch, K key/value heads, C tokens of a rank, D head dim.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..geometry import Plan, Slice
from ..kernels import GradAccumulator, accumulate_dtype

Block = tuple[Slice, ...]


class Residents:
    """Keys and values of all ranks of a ring, and the sums of their gradients in at least fp32.

    Args:
        k_RBKCD, v_RBKCD: shards `[B, K, C, D]` in the order of the ring.
    """

    def __init__(self, k_RBKCD: Sequence[torch.Tensor], v_RBKCD: Sequence[torch.Tensor]) -> None:
        self.k, self.v = list(k_RBKCD), list(v_RBKCD)
        self._blocks: dict[Block, tuple[torch.Tensor, torch.Tensor]] = {}
        self._sums: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None

    @property
    def sums(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """dK and dV `[B, K, C, D]` of every rank: zeros before any backward pass."""
        if self._sums is None:
            dtype = accumulate_dtype(self.k[0].dtype)
            dk, dv = ([torch.zeros_like(x, dtype=dtype) for x in shards] for shards in (self.k, self.v))
            self._sums = dk, dv
        return self._sums

    def block(self, block: Block) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of a block: a rank's own tensors if it is a whole shard, else a copy made once."""
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
        """Build everything that exists before a rank computes, so that a timing afterwards is of the compute alone."""
        for plan in plans:
            for step in plan.steps:
                self.block(step.block)
        self.sums  # noqa: B018 (made when first asked for)

    def whole(self, block: Block) -> bool:
        """Return whether a block is the whole shard of one rank."""
        return len(block) == 1 and block[0].stop - block[0].start == self.k[0].shape[2]


@dataclass(frozen=True)
class SingleDeviceTransport:
    """A transport whose blocks are all in this process."""

    residents: Residents

    def blocks(self, k_BKCD: torch.Tensor, v_BKCE: torch.Tensor, plan: Plan) -> "KVBlocks":
        return KVBlocks(plan, self.residents)

    def gradients(self, k_BKCD: torch.Tensor, v_BKCE: torch.Tensor, plan: Plan) -> "KVGradients":
        return KVGradients(plan, self.residents)


class KVBlocks:
    """Keys and values of all ranks, in memory."""

    def __init__(self, plan: Plan, residents: Residents) -> None:
        self._plan, self._residents = plan, residents

    def start_step(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the block of this step."""
        return self._residents.block(self._plan.steps[step].block)

    def finish_step(self, step: int) -> None:
        """Every block is here already."""


class KVGradients:
    """dK and dV, added to the sums of the owners of the keys."""

    def __init__(self, plan: Plan, residents: Residents) -> None:
        self._plan, self._residents = plan, residents
        self._current: tuple[GradAccumulator, GradAccumulator] | None = None

    def for_step(self, step: int) -> tuple[GradAccumulator, GradAccumulator]:
        """Return the sums of the block's owner if it is a whole shard, else empty ones."""
        block, residents = self._plan.steps[step].block, self._residents
        dk, dv = (
            self._sum(x, of_ranks, block) for x, of_ranks in zip(residents.block(block), residents.sums, strict=True)
        )
        self._current = dk, dv
        return dk, dv

    def _sum(self, x: torch.Tensor, of_ranks: list[torch.Tensor], block: Block) -> GradAccumulator:
        if self._residents.whole(block):
            return GradAccumulator(x, of_ranks[block[0].rank].dtype, lambda: of_ranks[block[0].rank])
        return GradAccumulator(x, of_ranks[0].dtype)

    def send(self, step: int) -> None:
        """Split the sums of a block that several ranks own among them."""
        block, current = self._plan.steps[step].block, self._current
        self._current = None
        if current is None or self._residents.whole(block):
            return
        for own, of_ranks in zip(current, self._residents.sums, strict=True):
            offset, total = 0, own.total
            for part in block:
                size = part.stop - part.start
                of_ranks[part.rank][:, :, part.start : part.stop].add_(total[:, :, offset : offset + size])
                offset += size

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's `(dk, dv)` so far, rounded; complete when all ranks have computed."""
        dk, dv = self._residents.sums
        k, v = self._residents.k, self._residents.v
        return dk[self._plan.rank].to(k[0].dtype), dv[self._plan.rank].to(v[0].dtype)
