"""Context-parallel attention without Transformers: one function for a hand-written model or training loop.

```python
mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("cp",))
q, k, v = (ring_hf.shard(x, "zigzag", 4, mesh.get_local_rank(), dim=2) for x in (q, k, v))  # or made sharded
out = ring_hf.context_attention(q, k, v, group=mesh["cp"], layout="zigzag")
```

Letters: B batch, H query heads, K key/value heads, C tokens of this rank, D head dim.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ..geometry import AttentionSpec, RingOptions, ShardedSequence
from .groups import group_of, register_group
from .sharded_attention import ring_attention
from .sharding import Boundaries, documents_of


def context_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    group: ProcessGroup | DeviceMesh | None = None,
    layout: str = "zigzag",
    causal: bool = True,
    window: int | None = None,
    chunk: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    cu_seqlens: Boundaries | None = None,
    prefixes: Sequence[Sequence[int]] | None = None,
    input_layout: Literal["BHSD", "BSHD"] = "BHSD",
    ulysses_size: int = 1,
    inner_ring_size: int = 1,
    head_chunks: int = 1,
    transport: str = "auto",
    kernel: str = "auto",
    overlap: bool = True,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact attention over a sequence whose tokens are dealt to the ranks of `group`. Every rank of it calls this.

    Args:
        q: this rank's queries, `[B, H, C, D]` or, with `input_layout="BSHD"`, `[B, C, H, D]`.
        k, v: this rank's keys and values with K heads; K divides H.
        group: a process group or a one-axis device mesh; by default all processes, or none if there is only this one.
        layout: how the global sequence was dealt: "contiguous", "zigzag", "striped" or "balanced" (see
            `ring_hf.shard`; a balanced one depends on `cu_seqlens`).
        causal: key position <= query position; False for full attention.
        window: visible keys per query including its own (Transformers' `sliding_window`); looks back only.
        chunk: keys must lie in the same run of this many tokens of the row (Llama 4's chunked attention).
        scale: factor on the scores, `D ** -0.5` by default.
        softcap: bends the scores to `softcap * tanh(scores / softcap)`.
        sinks: `[H]`, per head the score of one more key without a value (gpt-oss); differentiable.
        cu_seqlens: *global* cumulative document boundaries `(0, ..., s)` for all rows, or one such list per row.
        prefixes: per batch row and document, how many tokens at its start all see each other (prefix language model).
        ulysses_size: neighbouring ranks that exchange heads instead of keys and values; a divisor of the group's size.
        inner_ring_size: ranks of the inner ring of a double ring.
        head_chunks: with `ulysses_size`, in how many chunks a rank's heads are exchanged and attended with, one after
            the other (Untied Ulysses, arXiv 2602.21196); at most its number of query heads.
        transport: "auto" or how keys and values travel: "ring", "double_ring", "allgather" or "direct".
        kernel: "auto", or a name in `ring_hf.kernels.KERNELS` or `FAMILIES`.
        overlap: compute while the next block travels; False only to measure what that is worth.
        return_lse: also return the log-sum-exp of the scores, `[B, H, C]`, natural log, without gradient.

    Returns:
        The attention output in the layout and dtype of q; with `return_lse` a pair.

    Raises:
        ValueError: if shapes, boundaries, dtypes, layout or kernel do not fit; before anything is exchanged.
    """
    if input_layout not in ("BHSD", "BSHD"):
        raise ValueError(f'input_layout={input_layout!r} is not known. Choose "BHSD" or "BSHD".')
    if input_layout == "BSHD":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    name = register_group(group) if group is not None else _world_group()
    num_ranks = dist.get_world_size(group_of(name)) if name else 1
    documents = documents_of(cu_seqlens, k.shape[0])
    rows = None if prefixes is None else tuple(tuple(row) for row in prefixes)
    length = k.shape[2] * num_ranks
    sequence = ShardedSequence(layout, length, num_ranks, documents, None, rows, ulysses_size)
    spec = AttentionSpec(causal, window, chunk, scale, softcap)
    options = RingOptions(transport, inner_ring_size, ulysses_size, head_chunks, kernel, overlap)
    out, lse = ring_attention(
        q, k, v, sequence=sequence, group=name, spec=spec, options=options, sinks=sinks, return_lse=return_lse
    )
    out = out.transpose(1, 2) if input_layout == "BSHD" else out
    return (out, lse) if return_lse else out


def _world_group() -> str:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return ""
    assert dist.group.WORLD is not None
    return register_group(dist.group.WORLD)
