"""One rank's share of a long sequence, on one device: its own tokens attend to the keys of all ranks.

Every rank is given the keys of this one, which costs no memory and does not change the amount of work: the plan, the
tiles, the kernels and the merges are those of the rank in a real ring. The exchange and its buffers are missing.

    attention   one layer, forward and backward
    a step      the whole model on the tokens of the rank, through the Trainer (with the attention `ATTENTION`)

Letters: B batch, H query heads, K key/value heads, C tokens of the rank, D head dim.
"""

import functools
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from ..costmodel.devices import BACKWARD_FLOPS_RATIO
from ..geometry import AttentionSpec, RingOptions, ShardedSequence
from ..kernels import accumulate_dtype, choose
from ..planner.model import Model
from .attention_timing import Clock
from .ring_emulation import Emulation
from .single_device import Residents

ATTENTION = "ring_share"
LAYOUT, TRANSPORT = "zigzag", "ring"


class Repeated(Residents):
    """Keys and values `[B, K, C, D]` of one rank, used for all ranks, and one sum of their gradients."""

    def __init__(self, k_BKCD: torch.Tensor, v_BKCD: torch.Tensor, num_ranks: int) -> None:
        super().__init__([k_BKCD] * num_ranks, [v_BKCD] * num_ranks)

    @functools.cached_property
    def sums(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """dK and dV `[B, K, C, D]` in at least fp32, the same tensors for every rank."""
        dtype = accumulate_dtype(self.k[0].dtype)
        dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (self.k[0], self.v[0]))
        return [dk] * len(self.k), [dv] * len(self.v)


def emulation_of(num_tokens: int, num_ranks: int, scale: float) -> Emulation:
    """Return the ring that all shares belong to."""
    sequence = ShardedSequence(LAYOUT, num_tokens, num_ranks)
    return Emulation(sequence, AttentionSpec(scale=scale), RingOptions(TRANSPORT))


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, emulation: Emulation, rank: int
    ) -> torch.Tensor:
        out, lse = emulation.forward(rank, q, Repeated(k, v, emulation.sequence.ring_size))
        ctx.emulation, ctx.rank = emulation, rank
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        residents = Repeated(k, v, ctx.emulation.sequence.ring_size)
        dq = ctx.emulation.backward(ctx.rank, gradients[0].contiguous(), q, out, lse, residents)
        (dk, *_), (dv, *_) = residents.sums
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None


def register(num_tokens: int, num_ranks: int, rank: int) -> None:
    """Register `ATTENTION`, the attention of this rank, with Transformers."""

    def attention(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, norms and RoPE give fp32
        emulation = emulation_of(num_tokens, num_ranks, scaling)
        if query.shape[2] == emulation.sequence.shard_length:
            out = _Share.apply(query, key, value, emulation, rank)
        else:  # `memory.apply` tries a model on a few tokens
            out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)


def positions(num_tokens: int, num_ranks: int, rank: int) -> tuple[int, ...]:
    """Return the indices of the rank's tokens in the sequence."""
    segments = ShardedSequence(LAYOUT, num_tokens, num_ranks).segments(rank)
    return tuple(position for segment in segments for position in segment.range)


def kernel_name(model: Model, device: torch.device) -> str:
    """Return the name of the kernel that computes a rank's attention."""
    q, _, v, _ = _tensors(model, 1, device)
    return choose("auto", q, v).NAME


def _tensors(model: Model, num_tokens: int, device: torch.device) -> list[torch.Tensor]:
    """Return q `[1, H, C, D]`, k and v `[1, K, C, D]` and the gradient of out in the shape of q, bf16."""
    heads = (model.heads, model.kv_heads, model.kv_heads, model.heads)
    return [torch.randn(1, n, num_tokens, model.head_dim, device=device, dtype=torch.bfloat16) for n in heads]


@torch.no_grad()
def time_attention(
    model: Model, num_tokens: int, num_ranks: int, rank: int, device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Return seconds of one layer, "forward" and "backward", without the first run, and the "flops" of both."""
    q, k, v, dout = _tensors(model, num_tokens // num_ranks, device)
    emulation, clock = emulation_of(num_tokens, num_ranks, model.head_dim**-0.5), Clock(device)
    seconds: dict[str, list[float]] = {"forward": [], "backward": []}
    for repeat in range(repeats + 1):
        residents = Repeated(k, v, num_ranks)
        residents.prepare([emulation.plan(rank, 1)])
        start = clock.record()
        out, lse = emulation.forward(rank, q, residents)
        middle = clock.record()
        emulation.backward(rank, dout, q, out, lse, residents)
        end = clock.record()
        if repeat:
            seconds["forward"].append(clock.seconds_between(start, middle))
            seconds["backward"].append(clock.seconds_between(middle, end))
    forward = num_tokens * (num_tokens + 1) / 2 * model.flops_per_pair / num_ranks
    return {**seconds, "flops": [forward, BACKWARD_FLOPS_RATIO * forward]}
