"""Which tokens of a rank's tensors a kernel's result is for: regular windows of the token dim, or any tokens.

A kernel receives all tiles of a step and yields each result with the index of its queries (and keys).
`StridedWindows` are views, for kernels that run a tile or a run of equal rectangles in one call. `GatherIndex` holds
index tensors, for kernels that run many tiles of different lengths in one call.

Letters: B batch, H heads, S tokens of the shard or block, T tokens of a call.
"""

from dataclasses import dataclass

import torch

from ..geometry import CausalBlock, Tile


@dataclass(frozen=True, slots=True)
class StridedWindows:
    """`count` windows of `size` tokens, `stride` tokens apart, the first from token `start`.

    They cover `num_rows` batch rows from `row`. A result has the shape `[num_rows, H, size, ...]` if `count` is 1,
    else `[num_rows, H, count, size, ...]`.
    """

    row: int
    num_rows: int
    start: int
    size: int
    count: int = 1
    stride: int = 0

    @classmethod
    def queries(cls, tile: Tile, block: CausalBlock) -> "StridedWindows":
        """Return the queries of a block of a tile."""
        return cls(tile.row, tile.num_rows, tile.q + block.q, block.num_q, block.count, block.stride)

    @classmethod
    def keys(cls, tile: Tile, block: CausalBlock) -> "StridedWindows":
        """Return the keys of a block of a tile."""
        return cls(tile.row, tile.num_rows, tile.k + block.k, block.num_k, block.count, block.stride)

    def gather(self, x_BHS: torch.Tensor) -> torch.Tensor:
        """Return a view of these tokens of `x [B, H, S, ...]`, in the shape of a result."""
        rows = x_BHS.narrow(0, self.row, self.num_rows)
        if self.count == 1:
            return rows.narrow(2, self.start, self.size)
        view = rows.narrow(2, self.start, (self.count - 1) * self.stride + self.size).unfold(2, self.size, self.stride)
        return view.movedim(-1, 3)


@dataclass(frozen=True, slots=True, eq=False)
class GatherIndex:
    """Tokens by batch row and position, int64 `[T]` each, no token twice. A result has the shape `[T, H, ...]`."""

    rows_T: torch.Tensor
    tokens_T: torch.Tensor

    def gather(self, x_BHS: torch.Tensor) -> torch.Tensor:
        """Return a copy of these tokens of `x [B, H, S, ...]`: `[T, H, ...]`."""
        return x_BHS.transpose(1, 2)[self.rows_T, self.tokens_T]

    def scatter(self, x_BHS: torch.Tensor, values_TH: torch.Tensor) -> None:
        """Write `values [T, H, ...]` to these tokens of `x [B, H, S, ...]`."""
        x_BHS.transpose(1, 2)[self.rows_T, self.tokens_T] = values_TH


TokenIndex = StridedWindows | GatherIndex
