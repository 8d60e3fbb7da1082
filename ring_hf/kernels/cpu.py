"""Attention on tiles with PyTorch's CPU flash attention operator and its backward.

`aten._scaled_dot_product_flash_attention_for_cpu` returns lse, takes fewer key/value than query heads, and runs fp64,
fp32, bf16 (AMX where there is one) and fp16 without an S x S matrix. Its `is_causal` is aligned at the top left. It
knows no window, so a tile's band is split into mask-free pieces (`geometry.split`); anticausal pieces run flipped end
to end. It wants one head dim: if that of the values differs (multi-head latent attention), the smaller is padded with
zeros, which change neither scores nor sums.

Letters: B batch, H query heads, K key/value heads, C queries of the shard, S keys of the block, D and E head dims.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import pad

from ..geometry import Piece, Tile, split
from .places import Windows

NAME = "cpu"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_ROWS = 4096
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def unfit(q: torch.Tensor, v: torch.Tensor, softcap: float | None) -> str | None:
    """Why this kernel cannot serve such tensors, or None."""
    if q.device.type != "cpu":
        return f"the tensors are on {q.device.type}"
    if q.dtype not in _DTYPES:
        return f"dtype {q.dtype} is not one of {', '.join(str(dtype) for dtype in _DTYPES)}"
    if softcap is not None:
        return f"it has no soft-capping (softcap={softcap})"
    return None


def forward(
    q_BHCD: torch.Tensor,
    k_BKSD: torch.Tensor,
    v_BKSE: torch.Tensor,
    tiles: Iterable[Tile],
    scale: float,
    softcap: float | None = None,
) -> Iterator[tuple[Windows, torch.Tensor, torch.Tensor]]:
    """Yields `(queries, out, lse)` piece by piece."""
    assert softcap is None
    value_dim = v_BKSE.shape[-1]
    q_BHCD, k_BKSD, v_BKSE = _one_head_dim(q_BHCD, k_BKSD, v_BKSE)
    for piece, queries, keys in _pieces(tiles):
        q, k, v = _take(q_BHCD, piece, queries), _take(k_BKSD, piece, keys), _take(v_BKSE, piece, keys)
        # No name here keeps a result: it is gone before the next piece is computed.
        yield (
            queries,
            *_turned_back(piece, _narrowed((value_dim,), *_forward(q, k, v, 0.0, piece.kind != "full", scale=scale))),
        )


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
) -> Iterator[tuple[Windows, Windows, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yields `(queries, keys, dq, dk, dv)` piece by piece, from the global `out` and `lse`."""
    assert softcap is None
    dims = q_BHCD.shape[-1], k_BKSD.shape[-1], v_BKSE.shape[-1]
    dout_BHCE, q_BHCD, k_BKSD, v_BKSE, out_BHCE = _one_head_dim(dout_BHCE, q_BHCD, k_BKSD, v_BKSE, out_BHCE)
    for piece, queries, keys in _pieces(tiles):
        dout, q, out, lse = (_take(x, piece, queries) for x in (dout_BHCE, q_BHCD, out_BHCE, lse_BHC))
        k, v = (_take(x, piece, keys) for x in (k_BKSD, v_BKSE))
        tensors = dout, q, k, v, out, lse
        yield (
            queries,
            keys,
            *_turned_back(piece, _narrowed(dims, *_backward(*tensors, 0.0, piece.kind != "full", scale=scale))),
        )


def _pieces(tiles: Iterable[Tile]) -> Iterator[tuple[Piece, Windows, Windows]]:
    """The pieces of all tiles, with the places of their queries and keys.

    Full rectangles are cut to at most `_ROWS` queries: results, and their copies in fp32, stay a part of the shard.
    """
    for tile in tiles:
        for piece in split(tile.num_q, tile.num_k, tile.lo, tile.hi):
            rows = _ROWS if piece.kind == "full" else piece.num_q
            for first in range(0, piece.num_q, rows):
                bounded = replace(piece, q=piece.q + first, num_q=min(rows, piece.num_q - first))
                yield bounded, Windows.queries(tile, bounded), Windows.keys(tile, bounded)


def _narrowed(dims: tuple[int, ...], *results: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The first results without their padding."""
    return *(x[..., :dim] for x, dim in zip(results, dims, strict=False)), *results[len(dims) :]


def _one_head_dim(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    width = max(x.shape[-1] for x in tensors)
    return tuple(x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1])) for x in tensors)


def _take(x: torch.Tensor, piece: Piece, place: Windows) -> torch.Tensor:
    """The tokens of `x [B, H, S, ...]` at a place, windows folded into the batch, flipped if anticausal."""
    cut = place.of(x)
    if piece.count > 1:
        cut = cut.movedim(2, 1).flatten(0, 1)
    return cut.flip(2) if piece.kind == "anticausal" else cut


def _turned_back(piece: Piece, results: tuple[torch.Tensor, ...]) -> Any:
    """Results in the shape of their place: the inverse of `_take`."""
    if piece.kind == "anticausal":
        results = tuple(x.flip(2) for x in results)
    if piece.count > 1:
        results = tuple(x.unflatten(0, (-1, piece.count)).movedim(1, 2) for x in results)
    return results
