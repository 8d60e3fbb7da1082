"""Attention over keys that were cached before: every rank holds a part of them, in global order.

A few new queries are computed by all ranks: each attends to its own keys, and the partial results are merged by their
log-sum-exp (flash decoding, Dao et al. 2023, across ranks; tree attention, Shyam et al. 2024, arXiv 2408.04093). Many
new queries are sharded: they travel to the keys instead of the keys to them (pass-Q, Yang et al. 2024, arXiv
2411.01783), since a cache is longer than what is appended to it.

Letters: B batch, H query heads, K key/value heads, N new queries, L cached keys of this rank, D and E head dims.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..geometry import AttentionSpec, Mask, RowRegions, Segment, Tile, make_tiles
from ..kernels import OutLseAccumulator, choose
from .groups import all_gather
from .ulysses import all_to_all


@dataclass(frozen=True)
class CachedKeys:
    """Where the cached keys of this rank are in the sequence.

    Attributes:
        segments: their global positions in the order of the cache, consecutive within a segment.
        row_starts: per batch row the number of padded tokens on its left, which no query sees; None without padding.
    """

    segments: tuple[Segment, ...]
    row_starts: tuple[int, ...] | None = None

    @property
    def num_tokens(self) -> int:
        return sum(segment.length for segment in self.segments)


def attend_to_cache(
    q_BHND: Tensor,
    k_BKLD: Tensor,
    v_BKLE: Tensor,
    queries: Sequence[Segment],
    keys: CachedKeys,
    spec: AttentionSpec,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return `(out [B, H, N, E], lse [B, H, N])` of the cached keys of this rank, at least fp32, without exchange.

    Args:
        q_BHND: queries at the global positions `queries`.
        k_BKLD, v_BKLE: keys and values at the positions `keys`.
        spec: the mask and the transformation of scores.
        kernel: as in `RingOptions`.
    """
    result = OutLseAccumulator(q_BHND, v_BKLE.shape[-1])
    tiles = cache_tiles(tuple(queries), keys, spec.mask, q_BHND.shape[0])
    if tiles:
        attention = choose(kernel, q_BHND, v_BKLE, spec.softcap)
        scale = spec.scale_for(q_BHND.shape[-1])
        for rows, out, lse in attention.forward(q_BHND, k_BKLD, v_BKLE, tiles, scale, spec.softcap):
            result.merge(rows, out, lse)
    return result.out, result.lse


@lru_cache(maxsize=64)
def cache_tiles(queries: tuple[Segment, ...], keys: CachedKeys, mask: Mask, num_rows: int) -> tuple[Tile, ...]:
    """Return the tiles of new queries against the cached keys of one rank."""
    first, last = queries[0].start, queries[-1].start + queries[-1].length - 1
    num_keys = keys.num_tokens
    if not num_keys:
        return ()
    end = keys.segments[-1].start + keys.segments[-1].length
    oldest_visible = 0 if mask.window is None else last - mask.window + 1
    if keys.row_starts is None and end <= first + 1 and keys.segments[0].start >= oldest_visible:
        num_queries = sum(segment.length for segment in queries)  # decoding: every query sees every key
        return (Tile(0, num_rows, 0, num_queries, 0, num_keys, None, None),)
    length = max(last + 1, end)
    tiles: list[Tile] = []
    for row, start in enumerate(keys.row_starts or (0,)):
        bounds = (0, start, length) if start else (0, length)
        regions = RowRegions(bounds, bounds[:-1], bounds[1:], (0,) * (len(bounds) - 1))
        rows = 1 if keys.row_starts is not None else num_rows
        tiles += make_tiles(queries, keys.segments, regions, mask, row, rows)
    return tuple(tiles)


def decode_attention(
    q_BHND: Tensor,
    k_BKLD: Tensor,
    v_BKLE: Tensor,
    queries: Sequence[Segment],
    keys: CachedKeys,
    group: str,
    spec: AttentionSpec,
    sinks_H: Tensor | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Return the attention `[B, H, N, E]` of queries that all ranks have, to the keys of all ranks; one `all_gather`.

    The arguments are those of `attend_to_cache`; the new keys are among the cached ones of the rank that keeps them.
    The ranks merge in the same order, so that all get the same bits.

    Args:
        group: the registered name of the ranks that share the cache.
        sinks_H: per head the score of one more key without a value.
    """
    out, lse = attend_to_cache(q_BHND, k_BKLD, v_BKLE, queries, keys, spec, kernel)
    partial = torch.cat([out, lse.unsqueeze(-1)], dim=-1)
    merged = OutLseAccumulator(q_BHND, v_BKLE.shape[-1])
    for of_rank in all_gather(partial, group):
        merged.merge_all(of_rank[..., :-1], of_rank[..., -1])
    if sinks_H is not None:
        merged.add_sinks(sinks_H)
    return merged.out.to(q_BHND.dtype)


def history_attention(
    q_BHCD: Tensor,
    k_BKLD: Tensor,
    v_BKLE: Tensor,
    shards: Sequence[Sequence[Segment]],
    keys: CachedKeys,
    group: str,
    spec: AttentionSpec,
    kernel: str = "auto",
) -> OutLseAccumulator:
    """Return the result of this rank's new queries over the cached keys of all ranks, to be merged with others.

    The queries of every rank travel to all ranks (one `all_gather`), and the partial results back (one all-to-all).

    Args:
        q_BHCD: the new queries of this rank.
        shards: the global positions of the new queries of every rank, C each.
        k_BKLD, v_BKLE, keys: the cached keys and values of this rank, without those of the new tokens.
        group: the registered name of the ranks that share the cache.
    """
    head_dim = v_BKLE.shape[-1]
    partials = []
    for q_of_rank, shard in zip(all_gather(q_BHCD, group), shards, strict=True):
        out, lse = attend_to_cache(q_of_rank, k_BKLD, v_BKLE, shard, keys, spec, kernel)
        partials.append(torch.cat([out, lse.unsqueeze(-1)], dim=-1).reshape(-1))
    sizes = [partial.numel() for partial in partials]
    received = all_to_all(torch.cat(partials), sizes, sizes, group)
    merged = OutLseAccumulator(q_BHCD, head_dim)
    for partial in received.split(sizes):
        of_rank = partial.view(*q_BHCD.shape[:3], head_dim + 1)
        merged.merge_all(of_rank[..., :-1], of_rank[..., -1])
    return merged
