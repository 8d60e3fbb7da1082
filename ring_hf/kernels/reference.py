"""The eager truth: softmax attention on one tile, any dtype and device, fp64 included.

Builds the tile's scores in full, so it is for tests, odd dtypes and head dims. Every other kernel is compared with it.
Backward is FlashAttention-2's (Dao 2023, arXiv 2307.08691, algorithm 2) without blocks: with the *global* lse,
P = exp(S - lse) are the final probabilities, whatever part of the keys is at hand.

Letters: B batch, K key/value heads, G query heads per key/value head (H = K * G), Q queries, S keys, D head dim.
"""

from collections.abc import Iterator

import torch

from ..geometry import Piece, Tile
from .merge import accumulate_dtype

NAME = "reference"


def unfit(q: torch.Tensor, v: torch.Tensor) -> str | None:
    """Why this kernel cannot serve such tensors, or None."""
    return None if q.dtype.is_floating_point else f"dtype {q.dtype} is not a floating point type"


def forward(
    q_BHQD: torch.Tensor, k_BKSD: torch.Tensor, v_BKSD: torch.Tensor, tile: Tile, scale: float
) -> Iterator[tuple[Piece, torch.Tensor, torch.Tensor]]:
    """Yields `(piece, out [B, H, Q, D], lse [B, H, Q])`; tensors are already cut to the tile."""
    scores_BKGQS = _scores(q_BHQD, k_BKSD, tile, scale)
    lse_BKGQ = torch.logsumexp(scores_BKGQS, dim=-1)
    weights = torch.exp(scores_BKGQS - _finite(lse_BKGQ).unsqueeze(-1))
    out = torch.einsum("bkgqs,bksd->bkgqd", weights, v_BKSD.to(weights.dtype))
    yield Piece(0, tile.num_q, 0, tile.num_k, "full"), out.flatten(1, 2), lse_BKGQ.flatten(1, 2)


def backward(
    dout_BHQD: torch.Tensor,
    q_BHQD: torch.Tensor,
    k_BKSD: torch.Tensor,
    v_BKSD: torch.Tensor,
    out_BHQD: torch.Tensor,
    lse_BHQ: torch.Tensor,
    tile: Tile,
    scale: float,
) -> Iterator[tuple[Piece, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yields `(piece, dq, dk, dv)` in at least fp32, from the global `out` and `lse`."""
    scores_BKGQS = _scores(q_BHQD, k_BKSD, tile, scale)
    dtype, heads = scores_BKGQS.dtype, k_BKSD.shape[1]

    def grouped(x: torch.Tensor) -> torch.Tensor:
        return x.to(dtype).unflatten(1, (heads, -1))

    weights = torch.exp(scores_BKGQS - _finite(grouped(lse_BHQ)).unsqueeze(-1))
    dout, q = grouped(dout_BHQD), grouped(q_BHQD)
    dv = torch.einsum("bkgqs,bkgqd->bksd", weights, dout)
    dweights = torch.einsum("bkgqd,bksd->bkgqs", dout, v_BKSD.to(dtype))
    delta = (dout * grouped(out_BHQD)).sum(-1, keepdim=True)
    dscores = weights * (dweights - delta) * scale
    dq = torch.einsum("bkgqs,bksd->bkgqd", dscores, k_BKSD.to(dtype)).flatten(1, 2)
    dk = torch.einsum("bkgqs,bkgqd->bksd", dscores, q)
    yield Piece(0, tile.num_q, 0, tile.num_k, "full"), dq, dk, dv


def _scores(q_BHQD: torch.Tensor, k_BKSD: torch.Tensor, tile: Tile, scale: float) -> torch.Tensor:
    dtype = accumulate_dtype(q_BHQD.dtype)
    q = q_BHQD.to(dtype).unflatten(1, (k_BKSD.shape[1], -1))
    scores = torch.einsum("bkgqd,bksd->bkgqs", q, k_BKSD.to(dtype)) * scale
    return scores.masked_fill_(~visible(tile, q.device), -torch.inf)


def visible(tile: Tile, device: torch.device) -> torch.Tensor:
    """The tile's band as a boolean `[num_q, num_k]`."""
    apart = torch.arange(tile.num_k, device=device) - torch.arange(tile.num_q, device=device).unsqueeze(1)
    seen = torch.ones_like(apart, dtype=torch.bool)
    if tile.lo is not None:
        seen &= apart >= tile.lo
    if tile.hi is not None:
        seen &= apart <= tile.hi
    return seen


def _finite(lse: torch.Tensor) -> torch.Tensor:
    """A row that sees nothing has lse -inf; +inf in its place makes its weights exp(-inf) = 0 instead of NaN."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)
