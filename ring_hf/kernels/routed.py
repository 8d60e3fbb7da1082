"""A kernel made of two: one takes the tiles it is best at, the other takes the rest of the same step."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..geometry import Tile
from .causal_blocks import Unfit
from .indexing import TokenIndex

if TYPE_CHECKING:
    from . import Kernel


@dataclass(frozen=True, slots=True)
class RoutedKernel:
    """`first` takes the tiles for which `takes(tile)` holds, `second` all others; lse mean the same to both."""

    NAME: str
    why_unsupported: Unfit
    takes: Callable[[Tile], bool]
    first: "Kernel"
    second: "Kernel"

    def forward(
        self,
        q_BHCD: torch.Tensor,
        k_BKSD: torch.Tensor,
        v_BKSE: torch.Tensor,
        tiles: Iterable[Tile],
        scale: float,
        softcap: float | None = None,
    ) -> Iterator[tuple[TokenIndex, torch.Tensor, torch.Tensor]]:
        """Yields `(queries, out, lse)` of one kernel, then of the other."""
        for kernel, dealt in self._dealt(tiles):
            yield from kernel.forward(q_BHCD, k_BKSD, v_BKSE, dealt, scale, softcap)

    def backward(
        self,
        dout_BHCE: torch.Tensor,
        q_BHCD: torch.Tensor,
        k_BKSD: torch.Tensor,
        v_BKSE: torch.Tensor,
        out_BHCE: torch.Tensor,
        lse_BHC: torch.Tensor,
        tiles: Iterable[Tile],
        scale: float,
        softcap: float | None = None,
    ) -> Iterator[tuple[TokenIndex, TokenIndex, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yields `(queries, keys, dq, dk, dv)` of one kernel, then of the other."""
        tensors = dout_BHCE, q_BHCD, k_BKSD, v_BKSE, out_BHCE, lse_BHC
        for kernel, dealt in self._dealt(tiles):
            yield from kernel.backward(*tensors, dealt, scale, softcap)

    def _dealt(self, tiles: Iterable[Tile]) -> list[tuple["Kernel", list[Tile]]]:
        """The kernels that have something to do, with their tiles."""
        taken: list[Tile] = []
        left: list[Tile] = []
        for tile in tiles:
            (taken if self.takes(tile) else left).append(tile)
        return [(kernel, dealt) for kernel, dealt in ((self.first, taken), (self.second, left)) if dealt]
