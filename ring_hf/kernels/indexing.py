"""Where in a rank's tensors a kernel's result belongs: regular windows of a dim, or any tokens.

A kernel is given all tiles of a step at once, and says with each result which queries (and keys) it is for.
`StridedWindows` are views, for kernels that run a tile or a run of equal rectangles in one call; `GatherIndex` holds
indices, for kernels that run many tiles of different lengths in one call.

Letters: B batch, H heads, S tokens of the shard or block, T tokens of a call.
"""

from dataclasses import dataclass

import torch

from ..geometry import Piece, Tile


@dataclass(frozen=True, slots=True)
class StridedWindows:
    """`count` runs of `size` tokens, `stride` apart, the first from `start`, in `num_rows` batch rows from `row`.

    A result has the shape `[num_rows, H, size, ...]` for one run, else `[num_rows, H, count, size, ...]`.
    """

    row: int
    num_rows: int
    start: int
    size: int
    count: int = 1
    stride: int = 0

    @classmethod
    def queries(cls, tile: Tile, piece: Piece) -> "StridedWindows":
        """The queries of a piece of a tile."""
        return cls(tile.row, tile.num_rows, tile.q + piece.q, piece.num_q, piece.count, piece.stride)

    @classmethod
    def keys(cls, tile: Tile, piece: Piece) -> "StridedWindows":
        """The keys of a piece of a tile."""
        return cls(tile.row, tile.num_rows, tile.k + piece.k, piece.num_k, piece.count, piece.stride)

    def of(self, x_BHS: torch.Tensor) -> torch.Tensor:
        """A view of these tokens of `x [B, H, S, ...]`, in the shape of a result."""
        rows = x_BHS.narrow(0, self.row, self.num_rows)
        if self.count == 1:
            return rows.narrow(2, self.start, self.size)
        view = rows.narrow(2, self.start, (self.count - 1) * self.stride + self.size).unfold(2, self.size, self.stride)
        return view.movedim(-1, 3)


@dataclass(frozen=True, slots=True, eq=False)
class GatherIndex:
    """Tokens by batch row and place, each at most once; a result has the shape `[T, H, ...]`."""

    rows_T: torch.Tensor
    tokens_T: torch.Tensor

    def of(self, x_BHS: torch.Tensor) -> torch.Tensor:
        """A copy of these tokens of `x [B, H, S, ...]`: `[T, H, ...]`."""
        return x_BHS.transpose(1, 2)[self.rows_T, self.tokens_T]

    def put(self, x_BHS: torch.Tensor, values_TH: torch.Tensor) -> None:
        """Writes the tokens back."""
        x_BHS.transpose(1, 2)[self.rows_T, self.tokens_T] = values_TH


TokenIndex = StridedWindows | GatherIndex
