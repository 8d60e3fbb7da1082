"""From tiles to blocks, for operators whose only mask is causal, aligned at the top left.

`geometry.split` splits the band of a tile into full, causal and anticausal rectangles. An anticausal block is a causal
one with its queries and keys reversed. Equal blocks of a run are the batch rows of one call. Every query of a block
attends to at least one of its keys, so the results of an operator for rows without visible keys do not matter.

Letters: B batch, H query heads, K key/value heads, C queries of the shard, S keys of the block, D and E head dims.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import pad

from ..geometry import CausalBlock, Tile, split
from .indexing import StridedWindows
from .kernel import SupportCheck


@dataclass(frozen=True, slots=True)
class CausalBlockKernel:
    """A kernel made of an operator on blocks and its backward, without soft-capping.

    Shapes and dtypes are those of `Kernel`.

    Args:
        NAME: the name of the kernel.
        why_unsupported: see `Kernel`.
        forward_block: `(q, k, v, causal, scale) -> (out, lse)`; BHSD, lse BHS. With `causal`, query i attends to
            the keys up to i.
        backward_block: `(dout, q, k, v, out, lse, causal, scale) -> (dq, dk, dv)`.
        prepare: pads the head dims of tensors, once for all blocks. Results come back with the padding.
        max_query_rows: longer full rectangles are computed in parts of so many queries; None without a limit.
    """

    NAME: str
    why_unsupported: SupportCheck
    forward_block: Callable[..., tuple[torch.Tensor, ...]]
    backward_block: Callable[..., tuple[torch.Tensor, ...]]
    prepare: Callable[..., tuple[torch.Tensor, ...]]
    max_query_rows: int | None = None

    def forward(
        self,
        q_BHCD: torch.Tensor,
        k_BKSD: torch.Tensor,
        v_BKSE: torch.Tensor,
        tiles: Iterable[Tile],
        scale: float,
        softcap: float | None = None,
    ) -> Iterator[tuple[StridedWindows, torch.Tensor, torch.Tensor]]:
        """Yield `(queries, out, lse)` block by block."""
        assert softcap is None
        value_dim = v_BKSE.shape[-1]
        q_BHCD, k_BKSD, v_BKSE = self.prepare(q_BHCD, k_BKSD, v_BKSE)

        def compute(block: CausalBlock, queries: StridedWindows, keys: StridedWindows) -> Any:
            q, k, v = (
                gather_block(x, block, tokens) for x, tokens in ((q_BHCD, queries), (k_BKSD, keys), (v_BKSE, keys))
            )
            out, lse = self.forward_block(q, k, v, block.kind != "full", scale)
            return _restore_layout(block, out.narrow(-1, 0, value_dim), lse)

        for block, queries, keys in _blocks(tiles, self.max_query_rows):
            # No local of this generator holds a result: the caller can free it before the next block is computed.
            yield queries, *compute(block, queries, keys)

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
        """Yield `(queries, keys, dq, dk, dv)` block by block, from the global `out` and `lse`."""
        assert softcap is None
        head_dims = q_BHCD.shape[-1], k_BKSD.shape[-1], v_BKSE.shape[-1]
        dout_BHCE, out_BHCE = dout_BHCE.to(q_BHCD.dtype), out_BHCE.to(q_BHCD.dtype)
        q_BHCD, k_BKSD, v_BKSE, dout_BHCE, out_BHCE = self.prepare(q_BHCD, k_BKSD, v_BKSE, dout_BHCE, out_BHCE)

        def compute(block: CausalBlock, queries: StridedWindows, keys: StridedWindows) -> Any:
            dout, q, out, lse = (gather_block(x, block, queries) for x in (dout_BHCE, q_BHCD, out_BHCE, lse_BHC))
            k, v = (gather_block(x, block, keys) for x in (k_BKSD, v_BKSE))
            grads = self.backward_block(dout, q, k, v, out, lse, block.kind != "full", scale)
            return _restore_layout(block, *(x.narrow(-1, 0, dim) for x, dim in zip(grads, head_dims, strict=True)))

        for block, queries, keys in _blocks(tiles, self.max_query_rows):
            yield queries, keys, *compute(block, queries, keys)


def pad_to_multiple(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """Return `x [..., D]` with D padded with zeros to a multiple: they change neither scores nor sums."""
    return x if x.shape[-1] % multiple == 0 else pad(x, (0, -x.shape[-1] % multiple))


def gather_block(x: torch.Tensor, block: CausalBlock, tokens: StridedWindows) -> torch.Tensor:
    """Return these tokens of `x [B, H, S, ...]` as `[rows, H, size, ...]`, a view if the block is not anticausal.

    The windows of a run become batch rows, and the tokens of an anticausal block are reversed.
    """
    windows = tokens.gather(x)
    if block.count > 1:
        windows = windows.movedim(2, 1).flatten(0, 1)
    return windows.flip(2) if block.kind == "anticausal" else windows


def _restore_layout(block: CausalBlock, *results: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return results in the shape of their index: the inverse of `gather_block`."""
    if block.kind == "anticausal":
        results = tuple(x.flip(2) for x in results)
    if block.count > 1:
        results = tuple(x.unflatten(0, (-1, block.count)).movedim(1, 2) for x in results)
    return results


def _blocks(
    tiles: Iterable[Tile], max_query_rows: int | None
) -> Iterator[tuple[CausalBlock, StridedWindows, StridedWindows]]:
    """Yield the blocks of all tiles, each with its queries and keys."""
    for tile in tiles:
        for whole in split(tile.num_q, tile.num_k, tile.lo, tile.hi):
            num_rows = max_query_rows if max_query_rows and whole.kind == "full" else whole.num_q
            for start in range(0, whole.num_q, num_rows):
                block = replace(whole, q=whole.q + start, num_q=min(num_rows, whole.num_q - start))
                yield block, StridedWindows.queries(tile, block), StridedWindows.keys(tile, block)
