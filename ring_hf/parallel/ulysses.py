"""Ulysses: u neighbouring ranks trade tokens for heads, attend, and trade back (Jacobs et al. 2023, arXiv 2309.14509).

Every rank sends each of the u its heads' part of queries, keys and values, and gets its own heads of all tokens of
their place of the ring: one all-to-all there, one back. Key/value heads that several ranks need are sent to each;
their gradients add up in backward, because indexing does so. Head counts need not divide (`geometry.head_split`).

Letters: B batch, H query heads, K key/value heads, C tokens of this rank, u ranks of a place, D and E head dims.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..geometry import HeadShare
from .groups import group_of, own_group


def place_of(group: ProcessGroup, ulysses: int, device: torch.device) -> ProcessGroup:
    """The ranks of a group that exchange heads with this one, on a group of their own."""
    first = dist.get_rank(group) // ulysses * ulysses
    return own_group(group, range(first, first + ulysses), "ulysses", device)


@torch.library.custom_op("ring_hf::all_to_all", mutates_args=())
def _all_to_all(x: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
    out = x.new_empty(sum(received))
    dist.all_to_all_single(out, x, received, sent, group=place_of(group_of(group), len(sent), x.device))
    return out


@_all_to_all.register_fake
def _(x, sent, received, group):
    return x.new_empty(sum(received))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, ctx.sent, ctx.received, ctx.group = inputs


def _backward(ctx, grad):
    return _all_to_all(grad.contiguous(), ctx.received, ctx.sent, ctx.group), None, None, None


_all_to_all.register_autograd(_backward, setup_context=_setup_context)


def to_heads(
    q_BHCD: Tensor, k_BKCD: Tensor, v_BKCE: Tensor, shares: tuple[HeadShare, ...], group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`(q, k, v)` of this rank's share of the heads, over the tokens of all ranks of its place, in their order."""
    batch, _, tokens, _ = q_BHCD.shape
    mine = shares[dist.get_rank(group_of(group)) % len(shares)]
    sent = [_pick(x, heads) for share in shares for x, heads in _heads(share, q_BHCD, k_BKCD, v_BKCE)]
    sizes = [sum(x.numel() for x in sent[n : n + 3]) for n in range(0, len(sent), 3)]
    shapes = [(batch, len(heads), tokens, x.shape[-1]) for x, heads in _heads(mine, q_BHCD, k_BKCD, v_BKCE)]
    each = sum(torch.Size(shape).numel() for shape in shapes)
    arrived = _all_to_all(torch.cat([x.reshape(-1) for x in sent]), sizes, [each] * len(shares), group)
    parts = arrived.split([torch.Size(shape).numel() for shape in shapes] * len(shares))
    q, k, v = (torch.cat([x.view(shapes[n]) for x in parts[n::3]], dim=2) for n in range(3))
    return q, k, v


def to_tokens(out_BhSE: Tensor, shares: tuple[HeadShare, ...], group: str) -> Tensor:
    """`[B, H, C, ...]`: this rank's tokens of all heads, from its heads `[B, h, u * C, ...]` of all tokens."""
    batch, _, length, *dims = out_BhSE.shape
    tokens = length // len(shares)
    shapes = [(batch, share.num_q, tokens, *dims) for share in shares]
    sent = torch.cat([part.reshape(-1) for part in out_BhSE.split(tokens, dim=2)])
    sizes = [torch.Size(shape).numel() for shape in shapes]
    arrived = _all_to_all(sent, [sent.numel() // len(shares)] * len(shares), sizes, group)
    return torch.cat([x.view(shape) for x, shape in zip(arrived.split(sizes), shapes, strict=True)], dim=1)


def _heads(share: HeadShare, q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Tensor, list[int]]]:
    queries = list(range(share.q_start, share.q_start + share.num_q))
    return [(q, queries), (k, list(share.kv)), (v, list(share.kv))]


def _pick(x: Tensor, heads: list[int]) -> Tensor:
    """Heads of `x [B, H, ...]`: a view if they are neighbours."""
    if not heads or heads == list(range(heads[0], heads[-1] + 1)):
        return x[:, heads[0] : heads[-1] + 1] if heads else x[:, :0]
    return x[:, heads]
