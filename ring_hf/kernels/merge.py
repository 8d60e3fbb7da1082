"""Merging partial softmax results, and the fp32 state they are merged into.

Two partial results over disjoint keys combine as

    lse = log(exp(lse_a) + exp(lse_b))
    out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b

The form below is the stable one (as in ring-flash-attention's discussion 34): with w = sigmoid(lse_b - lse_a),
`out = out_a + w * (out_b - out_a)` and `lse = logaddexp(lse_a, lse_b)`. A side that saw nothing has lse = -inf.

Letters: B batch, H query heads, S local tokens, D head dim.
"""

import torch

from ..geometry import Piece, Tile


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs: partial results are never summed in half precision."""
    return torch.promote_types(dtype, torch.float32)


def merge_(out: torch.Tensor, lse: torch.Tensor, block_out: torch.Tensor, block_lse: torch.Tensor) -> None:
    """Merges `block_out, block_lse` into `out [..., D], lse [...]` in place; lse -inf on a side: it saw nothing."""
    # -inf on both sides: the difference is NaN, and nothing plus nothing stays nothing.
    weight = torch.sigmoid(torch.nan_to_num_(block_lse - lse, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf))
    out.lerp_(block_out.to(out.dtype), weight.to(out.dtype).unsqueeze(-1))
    torch.logaddexp(lse, block_lse.to(lse.dtype), out=lse)


def windows(x: torch.Tensor, start: int, size: int, count: int, stride: int) -> torch.Tensor:
    """Dim 2 of `x [B, H, S, ...]` cut to `start:start+size`, `count` times `stride` apart.

    A view: `[B, H, size, ...]` for one window, else `[B, H, count, size, ...]`.
    """
    if count == 1:
        return x.narrow(2, start, size)
    view = x.narrow(2, start, (count - 1) * stride + size).unfold(2, size, stride)
    return view.movedim(-1, 3)


class State:
    """Output and lse of one rank's queries while tiles arrive: `out [B, H, S, D]`, `lse [B, H, S]`, at least fp32."""

    def __init__(self, q: torch.Tensor, head_dim: int) -> None:
        batch, heads, length, _ = q.shape
        dtype = accumulate_dtype(q.dtype)
        # BSHD in memory: the order in which models go on reading the output.
        self.out = torch.zeros(batch, length, heads, head_dim, dtype=dtype, device=q.device).transpose(1, 2)
        self.lse = torch.full((batch, heads, length), -torch.inf, dtype=dtype, device=q.device)
        self._untouched = True

    def add(self, tile: Tile, piece: Piece, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Merges a kernel's result for the queries of `piece` (shapes of `windows`)."""
        rows = slice(tile.row, tile.row + tile.num_rows)
        where = (tile.q + piece.q, piece.num_q, piece.count, piece.stride)
        mine, mine_lse = windows(self.out[rows], *where), windows(self.lse[rows], *where)
        if self._untouched:
            mine.copy_(out)
            mine_lse.copy_(lse)
            self._untouched = False
        else:
            merge_(mine, mine_lse, out, lse)
