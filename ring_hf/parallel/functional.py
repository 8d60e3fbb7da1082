"""Context-parallel attention without Transformers: one function for a hand-written model or training loop.

```python
mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("cp",))
q, k, v = (ring_hf.shard(x, "zigzag", 4, mesh.get_local_rank(), dim=2) for x in (q, k, v))  # or made sharded
out = ring_hf.context_attention(q, k, v, group=mesh["cp"], layout="zigzag")
```

Letters: B batch, H query heads, K key/value heads, C tokens of this rank, D head dim.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ..geometry import WholeSequence
from .groups import group_of, register_group
from .op import ring_attention


def context_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    group: ProcessGroup | DeviceMesh | None = None,
    layout: str = "zigzag",
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None,
    input_layout: Literal["BHSD", "BSHD"] = "BHSD",
    kernel: str = "auto",
    overlap: bool = True,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact attention over a sequence whose tokens are dealt to the ranks of `group`. Every rank of it calls this.

    Args:
        q: this rank's queries, `[B, H, C, D]` or, with `input_layout="BSHD"`, `[B, C, H, D]`.
        k, v: this rank's keys and values with K heads; K divides H.
        group: a process group or a one-axis device mesh; by default all processes, or none if there is only this one.
        layout: how the global sequence was dealt: "contiguous", "zigzag" or "striped" (see `ring_hf.shard`).
        causal: key position <= query position; False for full attention.
        window: visible keys per query including its own (Transformers' `sliding_window`); looks back only.
        scale: factor on the scores, `D ** -0.5` by default.
        cu_seqlens: *global* cumulative document boundaries `(0, ..., s)` for all rows, or one such list per row.
        kernel: "auto" or a name in `ring_hf.kernels.KERNELS`.
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
    name = register_group(group) if group is not None else _everybody()
    num_ranks = dist.get_world_size(group_of(name)) if name else 1
    sequence = WholeSequence(layout, k.shape[2] * num_ranks, num_ranks, _documents(cu_seqlens, k.shape[0]))
    out, lse = ring_attention(
        q,
        k,
        v,
        sequence=sequence,
        group=name,
        causal=causal,
        window=window,
        scale=scale,
        kernel=kernel,
        overlap=overlap,
    )
    out = out.transpose(1, 2) if input_layout == "BSHD" else out
    return (out, lse) if return_lse else out


def _everybody() -> str:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return ""
    assert dist.group.WORLD is not None
    return register_group(dist.group.WORLD)


def _documents(
    cu_seqlens: torch.Tensor | Sequence[int] | Sequence[Sequence[int]] | None, num_rows: int
) -> tuple[tuple[int, ...], ...] | None:
    if cu_seqlens is None:
        return None
    bounds: list[Any] = cu_seqlens.tolist() if isinstance(cu_seqlens, torch.Tensor) else list(cu_seqlens)
    rows = bounds if bounds and isinstance(bounds[0], Sequence) else [bounds] * num_rows
    return tuple(tuple(int(bound) for bound in row) for row in rows)
