"""From tiles to pieces, for operators that know no mask but causal, aligned at the top left.

A tile's band is split into full rectangles, causal ones and anticausal ones (`geometry.split`); an anticausal piece is
a causal one with queries and keys turned end to end. Equal pieces of a run are the batch rows of one call. Every query
of a piece sees a key of it, so what an operator says about rows that see nothing never matters.

Letters: B batch, H query heads, K key/value heads, C queries of the shard, S keys of the block, D and E head dims.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import pad

from ..geometry import Piece, Tile, split
from .indexing import StridedWindows

Unfit = Callable[[torch.Tensor, torch.Tensor, float | None], str | None]


@dataclass(frozen=True, slots=True)
class CausalBlockKernel:
    """A kernel made of an operator for pieces and its backward, without soft-capping.

    `attend(q, k, v, causal, scale)` returns `(out, lse)`, `differentiate(dout, q, k, v, out, lse, causal, scale)`
    returns `(dq, dk, dv)`, all BHSD and BHS. `prepare(*tensors)` pads head dims once for all pieces; results come back
    with the padding. Full rectangles are cut to at most `most_rows` queries.
    """

    NAME: str
    why_unsupported: Unfit
    attend: Callable[..., tuple[torch.Tensor, ...]]
    differentiate: Callable[..., tuple[torch.Tensor, ...]]
    prepare: Callable[..., tuple[torch.Tensor, ...]]
    most_rows: int | None = None

    def forward(
        self,
        q_BHCD: torch.Tensor,
        k_BKSD: torch.Tensor,
        v_BKSE: torch.Tensor,
        tiles: Iterable[Tile],
        scale: float,
        softcap: float | None = None,
    ) -> Iterator[tuple[StridedWindows, torch.Tensor, torch.Tensor]]:
        """Yields `(queries, out, lse)` piece by piece."""
        assert softcap is None
        value_dim = v_BKSE.shape[-1]
        q_BHCD, k_BKSD, v_BKSE = self.prepare(q_BHCD, k_BKSD, v_BKSE)
        for piece, queries, keys in _pieces(tiles, self.most_rows):
            q, k, v = take(q_BHCD, piece, queries), take(k_BKSD, piece, keys), take(v_BKSE, piece, keys)
            # No name here keeps a result: it is gone before the next piece is computed.
            yield (
                queries,
                *_turned_back(piece, _narrowed((value_dim,), *self.attend(q, k, v, piece.kind != "full", scale))),
            )

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
    ) -> Iterator[tuple[StridedWindows, StridedWindows, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yields `(queries, keys, dq, dk, dv)` piece by piece, from the global `out` and `lse`."""
        assert softcap is None
        dims = q_BHCD.shape[-1], k_BKSD.shape[-1], v_BKSE.shape[-1]
        same = (x.to(q_BHCD.dtype) for x in (dout_BHCE, out_BHCE))
        q_BHCD, k_BKSD, v_BKSE, dout_BHCE, out_BHCE = self.prepare(q_BHCD, k_BKSD, v_BKSE, *same)
        for piece, queries, keys in _pieces(tiles, self.most_rows):
            dout, q, out, lse = (take(x, piece, queries) for x in (dout_BHCE, q_BHCD, out_BHCE, lse_BHC))
            k, v = (take(x, piece, keys) for x in (k_BKSD, v_BKSE))
            tensors = dout, q, k, v, out, lse
            yield (
                queries,
                keys,
                *_turned_back(piece, _narrowed(dims, *self.differentiate(*tensors, piece.kind != "full", scale))),
            )


def padded(x: torch.Tensor, unit: int) -> torch.Tensor:
    """`x` with zeros up to a head dim that is a multiple of `unit`: they change neither scores nor sums."""
    return x if x.shape[-1] % unit == 0 else pad(x, (0, -x.shape[-1] % unit))


def _pieces(tiles: Iterable[Tile], most_rows: int | None) -> Iterator[tuple[Piece, StridedWindows, StridedWindows]]:
    """The pieces of all tiles, with the places of their queries and keys."""
    for tile in tiles:
        for piece in split(tile.num_q, tile.num_k, tile.lo, tile.hi):
            rows = most_rows if most_rows and piece.kind == "full" else piece.num_q
            for first in range(0, piece.num_q, rows):
                bounded = replace(piece, q=piece.q + first, num_q=min(rows, piece.num_q - first))
                yield bounded, StridedWindows.queries(tile, bounded), StridedWindows.keys(tile, bounded)


def take(x: torch.Tensor, piece: Piece, place: StridedWindows) -> torch.Tensor:
    """The tokens of `x [B, H, S, ...]` at a place, windows folded into the batch, flipped if anticausal."""
    cut = place.of(x)
    if piece.count > 1:
        cut = cut.movedim(2, 1).flatten(0, 1)
    return cut.flip(2) if piece.kind == "anticausal" else cut


def _narrowed(dims: tuple[int, ...], *results: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The first results without their padding."""
    return *(x.narrow(-1, 0, dim) for x, dim in zip(results, dims, strict=False)), *results[len(dims) :]


def _turned_back(piece: Piece, results: tuple[torch.Tensor, ...]) -> Any:
    """Results in the shape of their place: the inverse of `take`."""
    if piece.kind == "anticausal":
        results = tuple(x.flip(2) for x in results)
    if piece.count > 1:
        results = tuple(x.unflatten(0, (-1, piece.count)).movedim(1, 2) for x in results)
    return results
