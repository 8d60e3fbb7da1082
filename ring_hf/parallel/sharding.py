"""Cutting tensors into shards and putting them together again, by the segments of the geometry."""

import torch

from ..geometry import segments


def shard(x: torch.Tensor, layout: str, num_ranks: int, rank: int, dim: int = 1) -> torch.Tensor:
    """The part of a global tensor that `rank` holds: `[..., s, ...]` to `[..., s / num_ranks, ...]` along `dim`."""
    before = (slice(None),) * (dim % x.ndim)
    parts = [x[(*before, segment.slice)] for segment in segments(layout, x.shape[dim], num_ranks, rank)]
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0].contiguous()


def unshard(shards: list[torch.Tensor], layout: str, dim: int = 1) -> torch.Tensor:
    """The global tensor from the shards of all ranks, in rank order: the inverse of `shard`."""
    dim %= shards[0].ndim
    shape = list(shards[0].shape)
    shape[dim] *= len(shards)
    whole = shards[0].new_empty(shape)
    before = (slice(None),) * dim
    for rank, part in enumerate(shards):
        place = 0
        for segment in segments(layout, shape[dim], len(shards), rank):
            whole[(*before, segment.slice)] = part.narrow(dim, place, segment.length)
            place += segment.length
    return whole
