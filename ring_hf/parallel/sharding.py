"""Cut tensors into shards and put them together again, by the segments of the geometry."""

from collections.abc import Sequence
from typing import Any

import torch

from ..geometry import Segment, ShardedSequence

Shard = Sequence[Segment]
Boundaries = torch.Tensor | Sequence[int] | Sequence[Sequence[int]]


def cut(x: torch.Tensor, shard: Shard, dim: int = 1) -> torch.Tensor:
    """Return the part of a global tensor that one rank holds: `[..., s, ...]` to `[..., C, ...]` along `dim`.

    `shard` is `ShardedSequence.segments(rank)`.
    """
    before = (slice(None),) * (dim % x.ndim)
    parts = [x[(*before, segment.slice)] for segment in shard]
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0].contiguous()


def join(parts: Sequence[torch.Tensor], shards: Sequence[Shard], dim: int = 1) -> torch.Tensor:
    """Return the global tensor `[..., s, ...]` from all ranks' `[..., C, ...]`, in order: the inverse of `cut`."""
    dim %= parts[0].ndim
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    whole = parts[0].new_empty(shape)
    before = (slice(None),) * dim
    for part, shard in zip(parts, shards, strict=True):
        start = 0
        for segment in shard:
            whole[(*before, segment.slice)] = part.narrow(dim, start, segment.length)
            start += segment.length
    return whole


def shard(
    x: torch.Tensor,
    layout: str,
    num_ranks: int,
    rank: int,
    dim: int = 1,
    *,
    cu_seqlens: Boundaries | None = None,
    ulysses_size: int = 1,
) -> torch.Tensor:
    """Return the part of a global tensor that `rank` holds: `[..., s, ...]` to `[..., C, ...]`, C = s / num_ranks.

    Args:
        cu_seqlens: document boundaries, as in `context_attention`; the balanced layout deals by them.
        ulysses_size: ranks of each Ulysses group, as in `context_attention`.

    Raises:
        ValueError: if the layout cannot deal this length to so many ranks.
    """
    documents = documents_of(cu_seqlens, 1)
    return cut(
        x, ShardedSequence(layout, x.shape[dim], num_ranks, documents, ulysses=ulysses_size).segments(rank), dim
    )


def unshard(
    shards: Sequence[torch.Tensor],
    layout: str,
    dim: int = 1,
    *,
    cu_seqlens: Boundaries | None = None,
    ulysses_size: int = 1,
) -> torch.Tensor:
    """Return the global tensor `[..., s, ...]` from the shards of all ranks: the inverse of `shard`.

    Args:
        shards: `[..., C, ...]` of every rank, in rank order.
        layout, dim, cu_seqlens, ulysses_size: those that `shard` was called with.

    Raises:
        ValueError: if the layout cannot deal this length to so many ranks.
    """
    length = sum(part.shape[dim] for part in shards)
    whole = ShardedSequence(layout, length, len(shards), documents_of(cu_seqlens, 1), ulysses=ulysses_size)
    return join(shards, [whole.segments(rank) for rank in range(len(shards))], dim)


def documents_of(cu_seqlens: Boundaries | None, num_rows: int) -> tuple[tuple[int, ...], ...] | None:
    """Return the boundaries of each batch row, from one list for all rows or one list per row."""
    if cu_seqlens is None:
        return None
    bounds: list[Any] = cu_seqlens.tolist() if isinstance(cu_seqlens, torch.Tensor) else list(cu_seqlens)
    rows = bounds if bounds and isinstance(bounds[0], Sequence) else [bounds] * num_rows
    return tuple(tuple(int(bound) for bound in row) for row in rows)
