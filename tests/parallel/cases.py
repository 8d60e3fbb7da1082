"""One attention problem, run by a ring and judged against dense attention in fp64. Runs inside worker processes."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ring_hf.geometry import AttentionSpec, Mask, RingOptions, ShardedSequence, length_multiple
from ring_hf.parallel import cut, register_group, ring_attention
from ring_hf.testing import dense_attention, dense_mask, forward_backward, rms_ratio

TENSORS = ("out", "lse", "dq", "dk", "dv")  # and dsinks, where there are sinks


@dataclass(frozen=True)
class Case:
    layout: str
    num_ranks: int
    dtype: str = "float64"
    causal: bool = True
    packed: bool = False
    window: int | None = None
    heads: int = 4
    kv_heads: int = 2
    units: int = 7  # an odd number of tokens per chunk
    rows: int = 2
    kernel: str = "auto"
    overlap: bool = True
    transport: str = "ring"
    inner: int = 1
    ulysses: int = 1
    head_chunks: int = 1
    chunk: int | None = None
    prefix: bool = False
    softcap: float | None = None
    with_sinks: bool = False
    v_dim: int = 8

    @property
    def length(self) -> int:
        # About the same number of tokens for every layout, and per chunk an odd one.
        unit = length_multiple(self.layout, self.num_ranks, self.ulysses)
        return self.units * unit * (1 if self.layout in ("zigzag", "balanced") and unit > 2 else 3)

    @property
    def sequence(self) -> ShardedSequence:
        s = self.length
        # Boundaries at odd places, one-token documents, one longer than a shard; another cut in each row.
        bounds = ((0, 1, 6, s // 2 + 3, s - 1, s), (0, s // 3, s // 3 + 1, s))
        documents = bounds[: self.rows] if self.packed else None
        # The whole of a document, nothing of one, more than a shard.
        of_documents = ((1, 2, s // 2 - 5, 0, 0), (5, 1, s // 3))
        prefixes = of_documents if self.packed else ((s // 2 + 1,), (3,))
        described = documents, None, prefixes[: self.rows] if self.prefix else None
        return ShardedSequence(self.layout, s, self.num_ranks, *described, self.ulysses)

    @property
    def mask(self) -> Mask:
        return Mask(self.causal, self.window, self.chunk)

    @property
    def sinks(self) -> torch.Tensor | None:
        return torch.linspace(-1, 2, self.heads, dtype=torch.float64) if self.with_sinks else None


def problem(case: Case, head_dim: int = 8) -> list[torch.Tensor]:
    """Global `q, k, v, dout` in the case's dtype, BHSD views of BSHD memory; the same on every rank."""
    generator = torch.Generator().manual_seed(17)
    sizes = (
        (case.heads, head_dim),
        (case.kv_heads, head_dim),
        (case.kv_heads, case.v_dim),
        (case.heads, case.v_dim),
    )
    shapes = ((case.rows, case.length, *size) for size in sizes)
    dtype = getattr(torch, case.dtype)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2) for shape in shapes]


def shards(case: Case, rank: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """This rank's part of global tensors `[B, H, s, ...]`."""
    return [cut(x, case.sequence.segments(rank), dim=2) for x in tensors]


def ring_result(rank: int, case: Case) -> tuple[torch.Tensor, ...]:
    """This rank's `(out, lse, dq, dk, dv)`, and `dsinks` if the case has sinks."""
    name = register_group(dist.group.WORLD)

    def attend(q, k, v, *sinks):
        return ring_attention(
            q,
            k,
            v,
            sequence=case.sequence,
            group=name,
            spec=AttentionSpec(case.causal, case.window, case.chunk, softcap=case.softcap),
            options=RingOptions(case.transport, case.inner, None, case.head_chunks, case.kernel, case.overlap),
            sinks=sinks[0] if sinks else None,
        )

    q, k, v, dout = shards(case, rank, *problem(case))
    sinks = () if case.sinks is None else (case.sinks.to(q.dtype),)
    return forward_backward(attend, q, k, v, *sinks, dout=dout)


def errors(rank: int, world_size: int, cases: list[Case]) -> list[dict[str, tuple[float, float, float]]]:
    """Per case and tensor of this rank: `(largest difference, rms ratio, rms ratio of one process in that dtype)`."""
    # The ranks share the work of dense attention, which takes as long as the rings.
    shared: list[Any] = [None] * world_size
    dist.all_gather_object(shared, [dense_results(case) for case in cases[rank::world_size]])
    rows = []
    for number, case in enumerate(cases):
        assert case.num_ranks == world_size
        exact, alone = shared[number % world_size][number // world_size]
        got = ring_result(rank, case)
        row = {}
        for name, mine, want, single in zip(TENSORS, got, exact, alone, strict=False):
            (want,), (single,) = shards(case, rank, want), shards(case, rank, single)
            apart = (mine.double() - want.double()).abs().max().item() if mine.numel() else 0.0
            row[name] = (apart, rms_ratio(mine, want), rms_ratio(single, want))
        if case.with_sinks:
            # A parameter: its gradients of all ranks add up to that of the whole sequence.
            total = got[-1].double()
            dist.all_reduce(total)
            row["dsinks"] = ((total - exact[-1]).abs().max().item(), rms_ratio(total, exact[-1]), 0.0)
        rows.append(row)
    return rows


def dense_results(case: Case) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Outputs and gradients of dense attention in fp64, and those of one process in the case's dtype."""
    q, k, v, dout = problem(case)
    visible = dense_mask(case.sequence, case.mask, case.rows)
    sinks = () if case.sinks is None else (case.sinks.to(q.dtype),)
    maths = {"visible_BSS": visible, "scale": q.shape[-1] ** -0.5, "softcap": case.softcap}
    exact = forward_backward(partial(dense_attention, **maths), *_double(q, k, v, *sinks), dout=dout.double())
    if case.dtype != "bfloat16":
        return exact, exact
    return exact, forward_backward(partial(_one_process, visible=visible), q, k, v, dout=dout)


def _double(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.double() for x in tensors]


def _one_process(q, k, v, visible):
    """One process in this dtype: the operator behind PyTorch's attention on CPU, under the dense mask."""
    hidden = torch.zeros_like(visible, dtype=q.dtype).masked_fill_(~visible, -torch.inf)
    scale = q.shape[-1] ** -0.5
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=hidden[:, None], scale=scale)
