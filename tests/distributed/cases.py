"""One attention problem, run by a ring and judged against dense attention in fp64. Runs inside worker processes."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from ring_hf.geometry import Mask, WholeSequence, multiple
from ring_hf.parallel import register_group, ring_attention, shard
from tests.dense import dense_attention, dense_mask, with_gradients
from tests.harness import rms_ratio

TENSORS = ("out", "lse", "dq", "dk", "dv")


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

    @property
    def length(self) -> int:
        # About the same number of tokens for every layout, and per chunk an odd one.
        return self.units * multiple(self.layout, self.num_ranks) * (1 if self.layout == "zigzag" else 3)

    @property
    def sequence(self) -> WholeSequence:
        s = self.length
        # Boundaries at odd places, one-token documents, one longer than a shard; another cut in each row.
        bounds = ((0, 1, 6, s // 2 + 3, s - 1, s), (0, s // 3, s // 3 + 1, s))
        return WholeSequence(self.layout, s, self.num_ranks, bounds[: self.rows] if self.packed else None)

    @property
    def mask(self) -> Mask:
        return Mask(self.causal, self.window)


def problem(case: Case, head_dim: int = 8) -> list[torch.Tensor]:
    """Global `q, k, v, dout` in the case's dtype, BHSD views of BSHD memory; the same on every rank."""
    generator = torch.Generator().manual_seed(17)
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    shapes = ((case.rows, case.length, number, head_dim) for number in heads)
    dtype = getattr(torch, case.dtype)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2) for shape in shapes]


def ring_result(rank: int, case: Case) -> tuple[torch.Tensor, ...]:
    """This rank's `(out, lse, dq, dk, dv)`."""
    name = register_group(dist.group.WORLD)
    mine = [shard(x, case.layout, case.num_ranks, rank, dim=2) for x in problem(case)]

    def attend(q, k, v):
        return ring_attention(
            q,
            k,
            v,
            sequence=case.sequence,
            group=name,
            causal=case.causal,
            window=case.window,
            kernel=case.kernel,
            overlap=case.overlap,
        )

    return with_gradients(attend, *mine)


def errors(rank: int, world_size: int, cases: list[Case]) -> list[dict[str, tuple[float, float, float]]]:
    """Per case and tensor of this rank: `(largest difference, rms ratio, rms ratio of one process in that dtype)`."""
    found = []
    for case in cases:
        assert case.num_ranks == world_size
        q, k, v, dout = problem(case)
        seen = dense_mask(case.sequence, case.mask, case.rows)
        exact = with_gradients(
            lambda *x, m=seen: dense_attention(*x, m, x[0].shape[-1] ** -0.5), *_double(q, k, v, dout)
        )
        alone = with_gradients(lambda *x, m=seen: _one_process(*x, m), q, k, v, dout)
        row = {}
        for name, got, want, single in zip(TENSORS, ring_result(rank, case), exact, alone, strict=True):
            want, single = (shard(x, case.layout, world_size, rank, dim=2) for x in (want, single))
            apart = (got.double() - want.double()).abs().max().item()
            row[name] = (apart, rms_ratio(got, want), rms_ratio(single, want))
        found.append(row)
    return found


def _double(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.double() for x in tensors]


def _one_process(q, k, v, seen):
    """One process in this dtype: the operator behind PyTorch's attention on CPU, under the dense mask."""
    hidden = torch.zeros_like(seen, dtype=q.dtype).masked_fill_(~seen, -torch.inf)
    scale = q.shape[-1] ** -0.5
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=hidden[:, None], scale=scale)
