"""One rank's share of a long sequence, on one device: its own tokens attend to the keys of all ranks.

All ranks are given this rank's keys, which costs no memory and changes no amount of work: the plan, the tiles, the
kernels and the merges are those of the rank in a real ring. What is missing is the exchange and its buffers.

    attention   one layer, forward and backward
    a step      the whole model on the tokens of the rank, through the Trainer (`ATTENTION` is its attention)

Letters: B batch, H query heads, K key/value heads, C tokens of the rank, D head dim.
"""

import functools
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from ring_hf.costmodel.devices import BACKWARD_FLOPS_RATIO
from ring_hf.geometry import AttentionSpec, RingOptions, ShardedSequence
from ring_hf.kernels import accumulate_dtype, choose
from ring_hf.parallel.emulation import Emulation
from ring_hf.parallel.single_device import Residents
from ring_hf.planner.model import Model

from .timing import Clock

ATTENTION = "ring_share"
LAYOUT, TRANSPORT = "zigzag", "ring"


class Repeated(Residents):
    """The keys and values of one rank in the place of those of all, and one sum of their gradients."""

    def __init__(self, k_BKCD: torch.Tensor, v_BKCD: torch.Tensor, num_ranks: int) -> None:
        super().__init__([k_BKCD] * num_ranks, [v_BKCD] * num_ranks)

    @functools.cached_property
    def sums(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:  # type: ignore[override]
        """dK and dV, the same tensors for every rank."""
        dtype = accumulate_dtype(self.k[0].dtype)
        dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (self.k[0], self.v[0]))
        return [dk] * len(self.k), [dv] * len(self.v)


def emulation_of(num_tokens: int, num_ranks: int, scale: float) -> Emulation:
    """The ring that all shares are taken from."""
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
    """Make `ATTENTION` an attention implementation of Transformers: that of this rank."""

    def attention(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, norms and RoPE give fp32
        emulation = emulation_of(num_tokens, num_ranks, scaling)
        if query.shape[2] == emulation.sequence.shard_length:
            out = _Share.apply(query, key, value, emulation, rank)
        else:  # the few tokens on which `memory.apply` tries a model
            out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)


def positions(num_tokens: int, num_ranks: int, rank: int) -> tuple[int, ...]:
    """Where the tokens of the rank are in the sequence."""
    segments = ShardedSequence(LAYOUT, num_tokens, num_ranks).segments(rank)
    return tuple(position for segment in segments for position in segment.range)


def kernel_name(model: Model, device: torch.device) -> str:
    """The kernel that serves a rank."""
    q, _, v, _ = _tensors(model, 1, device)
    return choose("auto", q, v).NAME


def _tensors(model: Model, num_tokens: int, device: torch.device) -> list[torch.Tensor]:
    """q, k, v and the gradient of out."""
    heads = (model.heads, model.kv_heads, model.kv_heads, model.heads)
    return [torch.randn(1, n, num_tokens, model.head_dim, device=device, dtype=torch.bfloat16) for n in heads]


@torch.no_grad()
def time_attention(
    model: Model, num_tokens: int, num_ranks: int, rank: int, device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Seconds of one layer, forward and backward, after a first run that is not timed; and the FLOPs of both."""
    q, k, v, dout = _tensors(model, num_tokens // num_ranks, device)
    emulation, clock = emulation_of(num_tokens, num_ranks, model.head_dim**-0.5), Clock(device)
    seconds: dict[str, list[float]] = {"forward": [], "backward": []}
    for repeat in range(repeats + 1):
        residents = Repeated(k, v, num_ranks)
        residents.prepare([emulation.plan(rank, 1)])
        begin = clock.mark()
        out, lse = emulation.forward(rank, q, residents)
        middle = clock.mark()
        emulation.backward(rank, dout, q, out, lse, residents)
        end = clock.mark()
        if repeat:
            seconds["forward"].append(clock.between(begin, middle))
            seconds["backward"].append(clock.between(middle, end))
    forward = num_tokens * (num_tokens + 1) / 2 * model.flops_per_pair / num_ranks
    return {**seconds, "flops": [forward, BACKWARD_FLOPS_RATIO * forward]}
