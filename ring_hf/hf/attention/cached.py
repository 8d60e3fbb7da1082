"""Attention of a layer whose earlier keys are in a sharded cache.

Shapes: B batch, H query heads, K key/value heads, N new tokens of this rank, L keys, D head dim, E value head dim.
"""

from dataclasses import replace

import torch

from ring_hf.geometry import AttentionSpec
from ring_hf.parallel import CachedKeys, decode_attention, history_attention, ring_attention

from ..cache_step import CacheStep


def cached_attention(
    module: torch.nn.Module,
    q_BHND: torch.Tensor,
    k_BKLD: torch.Tensor,
    v_BKLE: torch.Tensor,
    spec: AttentionSpec,
    sinks_H: torch.Tensor | None,
    step: CacheStep,
) -> torch.Tensor:
    """Return attention `[B, N, H, E]` to the cached and the new tokens of all ranks.

    Args:
        module: the attention layer, whose `layer_idx` names its cache.
        k_BKLD, v_BKLE: as the layer of the cache returned them: all that this rank keeps, or what it kept before
            and the new ones of this rank, if the new tokens are sharded.

    Raises:
        ValueError: if the layer is not causal, or its window is not that of its cache.
    """
    layer = step.layers[int(module.layer_idx)]  # type: ignore[arg-type]
    if not spec.causal or spec.chunk is not None:
        raise ValueError(
            f"{type(module).__name__} is not causal, or attends inside chunks, which ContextParallelCache does not "
            "support. Generate in one process."
        )
    if layer.window not in (None, spec.window):
        raise ValueError(
            f"{type(module).__name__} attends with sliding_window={spec.window}, but its cache keeps the last "
            f"{layer.window} tokens. Generate in one process."
        )
    kernel = step.options.kernel
    if step.sequence is None:
        keys = CachedKeys(layer.segments, step.row_starts)
        queries = step.positions(step.rank)
        out = decode_attention(q_BHND, k_BKLD, v_BKLE, queries, keys, step.group, spec, sinks_H, kernel)
        return out.transpose(1, 2).contiguous()
    continues, earlier = step.start > 0, CachedKeys(layer.earlier_segments, step.row_starts)
    num_earlier = earlier.num_tokens
    out, lse = ring_attention(
        q_BHND,
        k_BKLD[:, :, num_earlier:],
        v_BKLE[:, :, num_earlier:],
        sequence=step.sequence,
        group=step.group,
        spec=spec,
        options=replace(step.options, ulysses_size=None),
        sinks=None if continues else sinks_H,
        return_lse=continues,
    )
    if continues:
        shards = [step.positions(rank) for rank in range(step.sequence.num_ranks)]
        k, v = k_BKLD[:, :, :num_earlier], v_BKLE[:, :, :num_earlier]
        merged = history_attention(q_BHND, k, v, shards, earlier, step.group, spec, kernel)
        merged.merge_all(out, lse)
        if sinks_H is not None:
            merged.add_sinks(sinks_H)
        out = merged.out.to(q_BHND.dtype)
    return out.transpose(1, 2).contiguous()
