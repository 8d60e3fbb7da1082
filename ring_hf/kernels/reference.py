"""The eager truth: softmax attention on tiles, any dtype, device, head dims and softcap, fp64 included.

For tests, and for what no faster kernel computes. Builds the scores of `_ROWS` queries at a time. Every other kernel
is compared with it. Backward is FlashAttention-2's (Dao 2023, arXiv 2307.08691, algorithm 2) without blocks of keys:
with the *global* lse, P = exp(S - lse) are the final probabilities, whatever part of the keys is at hand.

Soft-capping (Gemma 2, arXiv 2408.00118) bends scores to `softcap * tanh(scores / softcap)` before the softmax.

Letters: B batch, K key/value heads, G query heads per key/value head (H = K * G), C queries of the shard and Q of a
block, S keys, D and E head dims.
"""

from collections.abc import Iterable, Iterator

import torch

from ..geometry import Piece, Tile, trim
from .indexing import StridedWindows
from .merge import accumulate_dtype

NAME = "reference"
_ROWS = 1024


def why_unsupported(q: torch.Tensor, v: torch.Tensor, softcap: float | None) -> str | None:
    """Why this kernel cannot serve such tensors, or None."""
    return None if q.dtype.is_floating_point else f"dtype {q.dtype} is not a floating point type"


def forward(
    q_BHCD: torch.Tensor,
    k_BKSD: torch.Tensor,
    v_BKSE: torch.Tensor,
    tiles: Iterable[Tile],
    scale: float,
    softcap: float | None = None,
) -> Iterator[tuple[StridedWindows, torch.Tensor, torch.Tensor]]:
    """Yields `(queries, out [B, H, Q, E], lse [B, H, Q])` block by block."""
    for tile, block, queries, keys in _blocks(tiles):
        q, k, v = queries.of(q_BHCD), keys.of(k_BKSD), keys.of(v_BKSE)
        scores_BKGQS, _ = _scores(q, k, tile, block, scale, softcap)
        lse_BKGQ = torch.logsumexp(scores_BKGQS, dim=-1)
        weights = torch.exp(scores_BKGQS - _finite(lse_BKGQ).unsqueeze(-1))
        out = torch.einsum("bkgqs,bkse->bkgqe", weights, v.to(weights.dtype))
        yield queries, out.flatten(1, 2), lse_BKGQ.flatten(1, 2)


def backward(
    dout_BHCE: torch.Tensor,
    q_BHCD: torch.Tensor,
    k_BKSD: torch.Tensor,
    v_BKSE: torch.Tensor,
    out_BHCE: torch.Tensor,
    lse_BHC: torch.Tensor,
    tiles: Iterable[Tile],
    scale: float,
    softcap: float | None = None,
) -> Iterator[tuple[StridedWindows, StridedWindows, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yields `(queries, keys, dq, dk, dv)` in at least fp32, from the global `out` and `lse`."""
    for tile, block, queries, keys in _blocks(tiles):
        dout, q, out, lse = (queries.of(x) for x in (dout_BHCE, q_BHCD, out_BHCE, lse_BHC))
        k, v = keys.of(k_BKSD), keys.of(v_BKSE)
        scores_BKGQS, slope = _scores(q, k, tile, block, scale, softcap)
        dtype, heads = scores_BKGQS.dtype, k.shape[1]
        dout, q, out, lse = (x.to(dtype).unflatten(1, (heads, -1)) for x in (dout, q, out, lse))
        weights = torch.exp(scores_BKGQS - _finite(lse).unsqueeze(-1))
        dv = torch.einsum("bkgqs,bkgqe->bkse", weights, dout)
        dweights = torch.einsum("bkgqe,bkse->bkgqs", dout, v.to(dtype))
        delta = (dout * out).sum(-1, keepdim=True)
        dscores = weights * (dweights - delta) * slope * scale
        dq = torch.einsum("bkgqs,bksd->bkgqd", dscores, k.to(dtype)).flatten(1, 2)
        dk = torch.einsum("bkgqs,bkgqd->bksd", dscores, q)
        yield queries, keys, dq, dk, dv


def _blocks(tiles: Iterable[Tile]) -> Iterator[tuple[Tile, Piece, StridedWindows, StridedWindows]]:
    """Tiles cut to at most `_ROWS` queries, with the keys that any of them sees."""
    for tile in tiles:
        for first in range(0, tile.num_q, _ROWS):
            rows = min(_ROWS, tile.num_q - first)
            lo, hi = (None if bound is None else bound + first for bound in (tile.lo, tile.hi))
            trimmed = trim(rows, tile.num_k, lo, hi)
            if trimmed is not None:
                q, num_q, k, num_k, _, _ = trimmed
                block = Piece(first + q, num_q, k, num_k, "full")
                yield tile, block, StridedWindows.queries(tile, block), StridedWindows.keys(tile, block)


def _scores(
    q_BHQD: torch.Tensor, k_BKSD: torch.Tensor, tile: Tile, block: Piece, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Masked scores, and their slope against those before soft-capping."""
    dtype = accumulate_dtype(q_BHQD.dtype)
    q = q_BHQD.to(dtype).unflatten(1, (k_BKSD.shape[1], -1))
    scores = torch.einsum("bkgqd,bksd->bkgqs", q, k_BKSD.to(dtype)) * scale
    slope: torch.Tensor | float = 1.0
    if softcap is not None:
        bent = torch.tanh(scores / softcap)
        scores, slope = bent * softcap, 1 - bent * bent
    seen = visible(tile, block, q.device)
    return scores.masked_fill_(~seen, -torch.inf), slope


def visible(tile: Tile, block: Piece, device: torch.device) -> torch.Tensor:
    """The tile's band in a block of it, as a boolean `[num_q, num_k]`."""
    q, k = (
        torch.arange(start, start + size, device=device)
        for start, size in ((block.q, block.num_q), (block.k, block.num_k))
    )
    apart = k - q.unsqueeze(1)
    seen = torch.ones_like(apart, dtype=torch.bool)
    if tile.lo is not None:
        seen &= apart >= tile.lo
    if tile.hi is not None:
        seen &= apart <= tile.hi
    return seen


def _finite(lse: torch.Tensor) -> torch.Tensor:
    """A row that sees nothing has lse -inf; +inf in its place makes its weights exp(-inf) = 0 instead of NaN."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)
