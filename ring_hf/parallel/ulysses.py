"""Ulysses: u neighbouring ranks trade tokens for heads, attend, and trade back (Jacobs et al. 2023, arXiv 2309.14509).

Each rank sends every rank of its Ulysses group that rank's heads of queries, keys and values, and receives its own
heads of all tokens of the group: one all-to-all before attention, one after it. Key/value heads that several ranks
need are sent to each; backward adds their gradients, because they were indexed. Head counts need not divide evenly
(`geometry.head_split`).

Letters: B batch, H query heads, K key/value heads, C tokens of this rank, u ranks of a Ulysses group, h heads of this
rank, D and E head dims.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..geometry import HeadShare
from .groups import dedicated_group, group_of

Heads = Sequence[Sequence[int]]  # of each rank of a Ulysses group


def ulysses_group(group: ProcessGroup, ulysses: int, device: torch.device) -> ProcessGroup:
    """Return the dedicated group of the ranks that exchange heads with this one. A collective call the first time."""
    first = dist.get_rank(group) // ulysses * ulysses
    return dedicated_group(group, range(first, first + ulysses), "ulysses", device)


# The schema is explicit because torch 2.6 cannot infer it from list[int].
_SCHEMA = "(Tensor x, SymInt[] sent, SymInt[] received, str group) -> Tensor"


@torch.library.custom_op("ring_hf::all_to_all", mutates_args=(), schema=_SCHEMA)
def all_to_all(x: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
    out = x.new_empty(sum(received))
    dist.all_to_all_single(out, x, received, sent, group=ulysses_group(group_of(group), len(sent), x.device))
    return out


@all_to_all.register_fake
def _(x, sent, received, group):
    return x.new_empty(sum(received))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, ctx.sent, ctx.received, ctx.group = inputs


def _backward(ctx, grad):
    return all_to_all(grad.contiguous(), ctx.received, ctx.sent, ctx.group), None, None, None


all_to_all.register_autograd(_backward, setup_context=_setup_context)


def seq_to_heads(
    q_BHCD: Tensor, k_BKCD: Tensor, v_BKCE: Tensor, shares: tuple[HeadShare, ...], group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(q, k, v)` of this rank's heads over all tokens of its Ulysses group: `[B, h, u * C, D]` and so on."""
    queries, kv = [share.queries for share in shares], [share.kv for share in shares]
    q, k, v = exchange_tokens([(q_BHCD, queries), (k_BKCD, kv), (v_BKCE, kv)], group)
    return q, k, v


def heads_to_seq(out_BhSE: Tensor, shares: tuple[HeadShare, ...], group: str) -> Tensor:
    """Return this rank's tokens of all heads, `[B, H, C, ...]`, from its heads of all tokens, `[B, h, u * C, ...]`."""
    (parts,) = exchange_heads([(out_BhSE, [share.queries for share in shares])], group)
    return torch.cat(parts, dim=1)


def exchange_tokens(tensors: list[tuple[Tensor, Heads]], group: str) -> list[Tensor]:
    """Trade tokens for heads in one all-to-all.

    Args:
        tensors: each `[B, H, C, ...]`, this rank's tokens, and the heads that each rank of the group attends
            with. All of one dtype.
        group: name of the registered group.

    Returns:
        For each tensor this rank's heads, `[B, h, u * C, ...]`, over the tokens of all ranks in their order.
    """
    ranks = range(len(tensors[0][1]))
    mine = dist.get_rank(group_of(group)) % len(ranks)
    sent = [_select_heads(x, heads[rank]) for rank in ranks for x, heads in tensors]
    sizes = [sum(x.numel() for x in sent[n : n + len(tensors)]) for n in range(0, len(sent), len(tensors))]
    shapes = [(x.shape[0], len(heads[mine]), *x.shape[2:]) for x, heads in tensors]
    numels = [torch.Size(shape).numel() for shape in shapes]
    received = all_to_all(torch.cat([x.reshape(-1) for x in sent]), sizes, [sum(numels)] * len(ranks), group)
    parts = received.split(numels * len(ranks))
    return [torch.cat([x.view(shape) for x in parts[n :: len(tensors)]], dim=2) for n, shape in enumerate(shapes)]


def exchange_heads(tensors: list[tuple[Tensor, Heads]], group: str) -> list[list[Tensor]]:
    """Trade heads for tokens in one all-to-all: the inverse of `exchange_tokens`.

    Args:
        tensors: each `[B, h, u * C, ...]`, this rank's heads, and the heads that each rank of the group has. All of
            one dtype.
        group: name of the registered group.

    Returns:
        For each tensor, and for each rank of the group, this rank's tokens of that rank's heads: `[B, h, C, ...]`.
    """
    ranks = range(len(tensors[0][1]))
    tokens = [x.shape[2] // len(ranks) for x, _ in tensors]
    split = [x.split(length, dim=2) for (x, _), length in zip(tensors, tokens, strict=True)]
    sent = torch.cat([parts[rank].reshape(-1) for rank in ranks for parts in split])
    shapes = [
        (x.shape[0], len(heads[rank]), length, *x.shape[3:])
        for rank in ranks
        for (x, heads), length in zip(tensors, tokens, strict=True)
    ]
    numels = [torch.Size(shape).numel() for shape in shapes]
    sizes = [sum(numels[n : n + len(tensors)]) for n in range(0, len(numels), len(tensors))]
    received = all_to_all(sent, [sent.numel() // len(ranks)] * len(ranks), sizes, group)
    parts = [x.view(shape) for x, shape in zip(received.split(numels), shapes, strict=True)]
    return [parts[n :: len(tensors)] for n in range(len(tensors))]


def _select_heads(x: Tensor, heads: Sequence[int]) -> Tensor:
    """Return heads of `x [B, H, ...]`: a view if they are consecutive."""
    if not heads or list(heads) == list(range(heads[0], heads[-1] + 1)):
        return x[:, heads[0] : heads[-1] + 1] if heads else x[:, :0]
    return x[:, list(heads)]
