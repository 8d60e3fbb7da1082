"""The eager reference: softmax attention on tiles for any dtype, device, head dims and softcap, fp64 included.

Every other kernel is compared with it, and it computes calls that no faster kernel supports. It builds the scores of
`_MAX_QUERY_ROWS` queries at a time. Backward is that of FlashAttention-2 (Dao 2023, arXiv 2307.08691, algorithm 2)
without blocks of keys: with the *global* lse, P = exp(S - lse) are the final probabilities of any part of the keys.

Soft-capping (Gemma 2, arXiv 2408.00118) replaces scores by `softcap * tanh(scores / softcap)` before the softmax.

Letters: B batch, K key/value heads, G query heads per key/value head (H = K * G), C queries of the shard and Q of a
block, S keys, D and E head dims.
"""

from collections.abc import Iterable, Iterator

import torch

from ..geometry import CausalBlock, Tile, trim
from .indexing import StridedWindows
from .merge import accumulate_dtype

NAME = "reference"
_MAX_QUERY_ROWS = 1024


def why_unsupported(q: torch.Tensor, v: torch.Tensor, softcap: float | None) -> str | None:
    """Return why this kernel does not support a call, or None; see `Kernel`."""
    return None if q.dtype.is_floating_point else f"dtype {q.dtype} is not a floating point type"


def forward(
    q_BHCD: torch.Tensor,
    k_BKSD: torch.Tensor,
    v_BKSE: torch.Tensor,
    tiles: Iterable[Tile],
    scale: float,
    softcap: float | None = None,
) -> Iterator[tuple[StridedWindows, torch.Tensor, torch.Tensor]]:
    """Yield `(queries, out [B, H, Q, E], lse [B, H, Q])` block by block, in at least fp32."""
    for tile, block, queries, keys in _blocks(tiles):
        q, k, v = queries.gather(q_BHCD), keys.gather(k_BKSD), keys.gather(v_BKSE)
        scores_BKGQS, _ = _masked_scores(q, k, tile, block, scale, softcap)
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
    """Yield `(queries, keys, dq, dk, dv)` block by block in at least fp32, from the global `out` and `lse`.

    `dq` is `[B, H, Q, D]`, `dk` `[B, K, S, D]` and `dv` `[B, K, S, E]` of the block's queries and keys.
    """
    for tile, block, queries, keys in _blocks(tiles):
        dout, q, out, lse = (queries.gather(x) for x in (dout_BHCE, q_BHCD, out_BHCE, lse_BHC))
        k, v = keys.gather(k_BKSD), keys.gather(v_BKSE)
        scores_BKGQS, slope = _masked_scores(q, k, tile, block, scale, softcap)
        dtype, num_kv_heads = scores_BKGQS.dtype, k.shape[1]
        dout, q, out, lse = (x.to(dtype).unflatten(1, (num_kv_heads, -1)) for x in (dout, q, out, lse))
        weights = torch.exp(scores_BKGQS - _finite(lse).unsqueeze(-1))
        dv = torch.einsum("bkgqs,bkgqe->bkse", weights, dout)
        dweights = torch.einsum("bkgqe,bkse->bkgqs", dout, v.to(dtype))
        delta = (dout * out).sum(-1, keepdim=True)
        dscores = weights * (dweights - delta) * slope * scale
        dq = torch.einsum("bkgqs,bksd->bkgqd", dscores, k.to(dtype)).flatten(1, 2)
        dk = torch.einsum("bkgqs,bkgqd->bksd", dscores, q)
        yield queries, keys, dq, dk, dv


def _blocks(tiles: Iterable[Tile]) -> Iterator[tuple[Tile, CausalBlock, StridedWindows, StridedWindows]]:
    """Split tiles into blocks of at most `_MAX_QUERY_ROWS` queries and the keys visible to any of them."""
    for tile in tiles:
        for start in range(0, tile.num_q, _MAX_QUERY_ROWS):
            num_rows = min(_MAX_QUERY_ROWS, tile.num_q - start)
            lo, hi = (None if bound is None else bound + start for bound in (tile.lo, tile.hi))
            trimmed = trim(num_rows, tile.num_k, lo, hi)
            if trimmed is not None:
                q, num_q, k, num_k, _, _ = trimmed
                block = CausalBlock(start + q, num_q, k, num_k, "full")
                yield tile, block, StridedWindows.queries(tile, block), StridedWindows.keys(tile, block)


def _masked_scores(
    q_BHQD: torch.Tensor, k_BKSD: torch.Tensor, tile: Tile, block: CausalBlock, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Return scores `[B, K, G, Q, S]`, -inf where masked, and their derivative by those before soft-capping."""
    dtype = accumulate_dtype(q_BHQD.dtype)
    q = q_BHQD.to(dtype).unflatten(1, (k_BKSD.shape[1], -1))
    scores = torch.einsum("bkgqd,bksd->bkgqs", q, k_BKSD.to(dtype)) * scale
    slope: torch.Tensor | float = 1.0
    if softcap is not None:
        tanh = torch.tanh(scores / softcap)
        scores, slope = tanh * softcap, 1 - tanh * tanh
    return scores.masked_fill_(~_visible_pairs(tile, block, q.device), -torch.inf), slope


def _visible_pairs(tile: Tile, block: CausalBlock, device: torch.device) -> torch.Tensor:
    """Return the band of a tile within one of its blocks, as a boolean `[num_q, num_k]`."""
    q = torch.arange(block.q, block.q + block.num_q, device=device)
    k = torch.arange(block.k, block.k + block.num_k, device=device)
    distance = k - q.unsqueeze(1)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if tile.lo is not None:
        visible &= distance >= tile.lo
    if tile.hi is not None:
        visible &= distance <= tile.hi
    return visible


def _finite(lse: torch.Tensor) -> torch.Tensor:
    """Replace -inf, the lse of a row without visible keys, by +inf: its weights become exp(-inf) = 0 and not NaN."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)
