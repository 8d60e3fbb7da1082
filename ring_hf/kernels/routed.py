"""A kernel that routes each tile of a step to one of two kernels."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from ..geometry import Tile
from .indexing import TokenIndex
from .kernel import Kernel, SupportCheck


@dataclass(frozen=True, slots=True)
class RoutedKernel:
    """Route each tile to `first` if `accepts(tile)`, else to `second`. Both must use the same lse convention.

    Shapes and dtypes are those of `Kernel`.
    """

    NAME: str
    why_unsupported: SupportCheck
    accepts: Callable[[Tile], bool]
    first: Kernel
    second: Kernel

    def forward(
        self,
        q_BHCD: torch.Tensor,
        k_BKSD: torch.Tensor,
        v_BKSE: torch.Tensor,
        tiles: Iterable[Tile],
        scale: float,
        softcap: float | None = None,
    ) -> Iterator[tuple[TokenIndex, torch.Tensor, torch.Tensor]]:
        """Yield `(queries, out, lse)` of the first kernel, then of the second."""
        for kernel, routed_tiles in self._partition(tiles):
            yield from kernel.forward(q_BHCD, k_BKSD, v_BKSE, routed_tiles, scale, softcap)

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
        """Yield `(queries, keys, dq, dk, dv)` of the first kernel, then of the second."""
        for kernel, routed_tiles in self._partition(tiles):
            yield from kernel.backward(
                dout_BHCE, q_BHCD, k_BKSD, v_BKSE, out_BHCE, lse_BHC, routed_tiles, scale, softcap
            )

    def _partition(self, tiles: Iterable[Tile]) -> list[tuple[Kernel, list[Tile]]]:
        """Return the kernels that have tiles to compute, with their tiles."""
        accepted: list[Tile] = []
        remaining: list[Tile] = []
        for tile in tiles:
            (accepted if self.accepts(tile) else remaining).append(tile)
        pairs = (self.first, accepted), (self.second, remaining)
        return [(kernel, kernel_tiles) for kernel, kernel_tiles in pairs if kernel_tiles]
