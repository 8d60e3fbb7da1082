"""Attention on one tile with PyTorch's CPU flash attention operator and its backward.

`aten._scaled_dot_product_flash_attention_for_cpu` returns lse, takes fewer key/value than query heads, and runs fp64,
fp32, bf16 (AMX where there is one) and fp16 without an S x S matrix. Its `is_causal` is aligned at the top left. It
knows no window, so a tile's band is split into mask-free pieces (`geometry.split`); anticausal pieces run flipped end
to end. It wants one head dim: if that of the values differs (multi-head latent attention), the smaller is padded with
zeros, which change neither scores nor sums.

Letters: B batch, H query heads, K key/value heads, Q queries, S keys, D head dim.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.nn.functional import pad

from ..geometry import Piece, Tile, split
from .merge import windows

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
    q_BHQD: torch.Tensor,
    k_BKSD: torch.Tensor,
    v_BKSE: torch.Tensor,
    tile: Tile,
    scale: float,
    softcap: float | None = None,
) -> Iterator[tuple[Piece, torch.Tensor, torch.Tensor]]:
    """Yields `(piece, out, lse)` with the shapes of `merge.windows` for the piece's queries."""
    assert softcap is None
    value_dim = v_BKSE.shape[-1]
    q_BHQD, k_BKSD, v_BKSE = _one_head_dim(q_BHQD, k_BKSD, v_BKSE)
    for piece in _bounded(split(tile.num_q, tile.num_k, tile.lo, tile.hi)):
        q, k, v = (_take(x, piece, keys) for x, keys in ((q_BHQD, False), (k_BKSD, True), (v_BKSE, True)))
        # No name here keeps a result: it is gone before the next piece is computed.
        yield _with(piece, *_narrowed((value_dim,), *_forward(q, k, v, 0.0, piece.kind != "full", scale=scale)))


def backward(
    dout_BHQE: torch.Tensor,
    q_BHQD: torch.Tensor,
    k_BKSD: torch.Tensor,
    v_BKSE: torch.Tensor,
    out_BHQE: torch.Tensor,
    lse_BHQ: torch.Tensor,
    tile: Tile,
    scale: float,
    softcap: float | None = None,
) -> Iterator[tuple[Piece, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yields `(piece, dq, dk, dv)` with the shapes of `merge.windows`, from the global `out` and `lse`."""
    assert softcap is None
    dims = q_BHQD.shape[-1], k_BKSD.shape[-1], v_BKSE.shape[-1]
    tensors = _one_head_dim(dout_BHQE, q_BHQD, k_BKSD, v_BKSE, out_BHQE)
    dout_BHQE, q_BHQD, k_BKSD, v_BKSE, out_BHQE = tensors
    for piece in _bounded(split(tile.num_q, tile.num_k, tile.lo, tile.hi)):
        dout, q, out, lse = (_take(x, piece, keys=False) for x in (dout_BHQE, q_BHQD, out_BHQE, lse_BHQ))
        k, v = (_take(x, piece, keys=True) for x in (k_BKSD, v_BKSE))
        tensors = dout, q, k, v, out, lse
        yield _with(piece, *_narrowed(dims, *_backward(*tensors, 0.0, piece.kind != "full", scale=scale)))


def _narrowed(dims: tuple[int, ...], *results: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The first results without their padding."""
    return *(x[..., :dim] for x, dim in zip(results, dims, strict=False)), *results[len(dims) :]


def _one_head_dim(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    width = max(x.shape[-1] for x in tensors)
    return tuple(x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1])) for x in tensors)


def _bounded(pieces: list[Piece]) -> Iterator[Piece]:
    """Full rectangles cut to at most `_ROWS` queries: results, and their copies in fp32, stay a part of the shard."""
    for piece in pieces:
        rows = _ROWS if piece.kind == "full" else piece.num_q
        for first in range(0, piece.num_q, rows):
            yield replace(piece, q=piece.q + first, num_q=min(rows, piece.num_q - first))


def _take(x: torch.Tensor, piece: Piece, keys: bool) -> torch.Tensor:
    """The piece's queries or keys of `x [B, H, S, ...]` with windows folded into the batch, flipped if anticausal."""
    start, size = (piece.k, piece.num_k) if keys else (piece.q, piece.num_q)
    cut = windows(x, start, size, piece.count, piece.stride)
    if piece.count > 1:
        cut = cut.movedim(2, 1).flatten(0, 1)
    return cut.flip(2) if piece.kind == "anticausal" else cut


def _with(piece: Piece, *results: torch.Tensor) -> tuple:
    """`(piece, *results)`, the results turned back by the inverse of `_take`."""
    if piece.kind == "anticausal":
        results = tuple(x.flip(2) for x in results)
    if piece.count > 1:
        results = tuple(x.unflatten(0, (-1, piece.count)).movedim(1, 2) for x in results)
    return piece, *results
