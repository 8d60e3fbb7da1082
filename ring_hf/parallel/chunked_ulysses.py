"""Ulysses a few heads at a time: headwise chunking as in Untied Ulysses (UPipe; Ghadia et al. 2026, arXiv 2602.21196).

Ulysses holds queries, keys, values and results twice: a rank's tokens of all heads, and its heads of all tokens. Here
the second is of one chunk of heads at a time: queries, keys and values of a chunk are exchanged, attended with, and
the result goes back before the next chunk comes. Key/value heads that several chunks share are sent once and kept for
them. For backward a rank keeps its tokens alone, and the lse of its heads; each chunk is exchanged again, together
with its result and the gradient of that. The paper's projections in chunks are not here: the layer makes q, k and v.

All of it is one operator, whose result activation checkpointing can save (`ring_hf.memory`): then neither attention
nor an exchange of the forward pass runs again.

Letters: B batch, H query heads, K key/value heads, C tokens of this rank, u ranks of a place, h query heads of this
rank (`one_*`: of one chunk), S = u * C tokens of the place, D and E head dims.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..geometry import HeadChunk, HeadShare, chunk_heads, head_split
from ..kernels import accumulate_dtype, choose
from .call import Call, decode
from .groups import group_of
from .op import prepare
from .schedule import ring_backward, ring_forward, sinks_gradient
from .ulysses import Heads, exchange_heads, exchange_tokens


class _Heads:
    """Which heads this rank and the others of its place attend with, chunk by chunk, and what is held of them.

    Attributes:
        share: this rank's heads, of all chunks.
        chunks: for each chunk that of every rank of the place.
        kv: keys and values of the chunk at hand, `[B, heads, S, D]` and `[B, heads, S, E]`.
        grads: sums of their gradients over the chunks that share them.
    """

    def __init__(self, call: Call, q: Tensor, k: Tensor) -> None:
        # Numbers of heads are never symbolic: what each rank computes depends on them.
        shares = head_split(int(q.shape[1]), int(k.shape[1]), call.sequence.ulysses)
        self._group = call.group
        self._rank = dist.get_rank(group_of(call.group)) % len(shares)
        self.share = shares[self._rank]
        self.chunks = list(zip(*(chunk_heads(share, call.head_chunks) for share in shares), strict=True))
        self.kv: list[Tensor] = []
        self.grads: list[Tensor] = []

    def of(self, chunks: tuple[HeadChunk, ...]) -> HeadShare:
        """This rank's heads of a chunk."""
        return chunks[self._rank].share

    def fetch(self, chunks: tuple[HeadChunk, ...], k: Tensor, v: Tensor, *tensors: Tensor) -> list[Tensor]:
        """This rank's heads of tensors like q, over all tokens of the place; `kv` becomes the chunk's."""
        is_new = bool(chunks[self._rank].fetched)
        if is_new:
            self.kv = []  # before the exchange makes others
        queries, fetched = [chunk.share.queries for chunk in chunks], [chunk.fetched for chunk in chunks]
        sent: list[tuple[Tensor, Heads]] = [*((x, queries) for x in tensors), (k, fetched), (v, fetched)]
        *arrived, one_k, one_v = exchange_tokens(sent, self._group)
        if is_new:
            self.kv = [one_k, one_v]
        return arrived

    def add_gradients(self, chunks: tuple[HeadChunk, ...], one_dk: Tensor, one_dv: Tensor) -> None:
        """Add a chunk's gradients of keys and values to those of the chunks before that share them."""
        if chunks[self._rank].fetched:
            self.grads = [one_dk, one_dv]
            return
        for number, grad in enumerate((one_dk, one_dv)):
            self.grads[number] = self.grads[number].to(accumulate_dtype(grad.dtype)).add_(grad)

    def _release(self, chunks: tuple[HeadChunk, ...]) -> None:
        if chunks[self._rank].finished:
            self.kv = []

    def give_back(self, chunks: tuple[HeadChunk, ...], one_x: Tensor, x: Tensor) -> None:
        """Put a chunk of this rank's heads, of all tokens of the place, where they belong in `x [B, H, C, ...]`."""
        self._release(chunks)
        (parts,) = exchange_heads([(one_x, [chunk.share.queries for chunk in chunks])], self._group)
        for chunk, part in zip(chunks, parts, strict=True):
            _heads_of(x, chunk.share).copy_(part)

    def give_back_gradients(
        self, chunks: tuple[HeadChunk, ...], one_dq: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
    ) -> None:
        """The same of gradients; those of keys and values with the last chunk that shares them."""
        queries, finished = [chunk.share.queries for chunk in chunks], [chunk.finished for chunk in chunks]
        grads = [one_dq.new_empty(one_dq.shape[0], 0, one_dq.shape[2], x.shape[-1]) for x in (dk, dv)]
        self._release(chunks)
        if chunks[self._rank].finished:
            grads = [grad.to(dk.dtype) for grad in self.grads]
            self.grads = []
        parts = exchange_heads([(one_dq, queries), (grads[0], finished), (grads[1], finished)], self._group)
        del grads
        for chunk, part in zip(chunks, parts[0], strict=True):
            _heads_of(dq, chunk.share).copy_(part)
        # Several ranks, or distant chunks, may have had a copy of the same head.
        for total, of_ranks in zip((dk, dv), parts[1:], strict=True):
            for chunk, part in zip(chunks, of_ranks, strict=True):
                for number, head in enumerate(chunk.finished):
                    total[:, head].add_(part[:, number])


def _heads_of(x: Tensor, share: HeadShare, first: int = 0, dim: int = 1) -> Tensor:
    """A view of the share's query heads in a tensor whose first head is `first`."""
    return x.narrow(dim, share.q_start - first, share.num_q)


def chunked_forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, text: str) -> tuple[Tensor, Tensor]:
    """`(out [B, H, C, E], lse [B, h, S])` for `q [B, H, C, D]`, `k [B, K, C, D]`, `v [B, K, C, E]`, `sinks [H]`.

    `text` is the text form of a `Call`.
    """
    call = decode(text)
    heads = _Heads(call, q, k)
    out, lse = _empty_results(q, k, v, call)
    plan, ring = prepare(call, q.shape[0], lse.shape[2], q.device)
    for chunks in heads.chunks:
        (one_q,) = heads.fetch(chunks, k, v, q)
        mine = heads.of(chunks)
        if mine.num_q:
            kernel = choose(call.kernel, one_q, heads.kv[1], call.softcap)
            own_sinks = None if sinks is None else _heads_of(sinks, mine, dim=0)
            maths = call.scale, call.softcap, own_sinks
            one_out, one_lse = ring_forward(one_q, heads.kv[0], heads.kv[1], plan, ring, kernel, *maths, call.overlap)
            _heads_of(lse, mine, heads.share.q_start).copy_(one_lse)
            del one_q, one_lse
            one_out = one_out.to(q.dtype)
        else:  # fewer heads than chunks: all ranks of this ring sit out, but stay in the exchange
            one_out = one_q.new_empty(*one_q.shape[:3], v.shape[-1])
        heads.give_back(chunks, one_out, out)
        del one_out
    return out, lse


def chunked_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor, text: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(dq, dk, dv, dsinks)` from what `chunked_forward` was given and returned, and the gradient of its `out`.

    Without sinks, `dsinks` is empty.
    """
    call = decode(text)
    heads = _Heads(call, q, k)
    plan, ring = prepare(call, q.shape[0], lse.shape[2], q.device)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dsinks = q.new_empty(0) if sinks is None else torch.zeros_like(sinks)
    for chunks in heads.chunks:
        one_dq, one_out, one_dout = heads.fetch(chunks, k, v, q, out, dout)
        mine = heads.of(chunks)
        if mine.num_q:
            one_q, one_lse = one_dq, _heads_of(lse, mine, heads.share.q_start)
            # A query that saw nothing has lse -inf; with +inf its weights exp(score - lse) are 0 instead of NaN.
            one_lse = one_lse.masked_fill(one_lse == -torch.inf, torch.inf)
            if sinks is not None:
                own = sinks_gradient(one_dout, one_out, one_lse, _heads_of(sinks, mine, dim=0))
                _heads_of(dsinks, mine, dim=0).copy_(own)
            kernel = choose(call.kernel, one_q, heads.kv[1], call.softcap)
            one_dq, one_dk, one_dv = ring_backward(
                one_dout,
                one_q,
                heads.kv[0],
                heads.kv[1],
                one_out,
                one_lse,
                plan,
                ring,
                kernel,
                call.scale,
                call.softcap,
                call.overlap,
            )
            del one_q, one_lse
            heads.add_gradients(chunks, one_dk, one_dv)
            del one_dk, one_dv
        del one_dout, one_out
        heads.give_back_gradients(chunks, one_dq, dq, dk, dv)
        del one_dq
    return dq, dk, dv, dsinks


@torch.library.custom_op("ring_hf::chunked_ulysses", mutates_args=())
def chunked_ulysses_op(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: str) -> tuple[Tensor, Tensor]:
    """`chunked_forward` as an operator."""
    return chunked_forward(q, k, v, sinks, call)


@chunked_ulysses_op.register_fake
def _(q, k, v, sinks, call):
    return _empty_results(q, k, v, decode(call))


def _empty_results(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    batch, num_heads, tokens, _ = q.shape
    # BSHD in memory: the order in which models go on reading the output.
    out = q.new_empty(batch, tokens, num_heads, v.shape[-1]).transpose(1, 2)
    shape = batch, _Heads(call, q, k).share.num_q, tokens * call.sequence.ulysses
    return out, q.new_empty(shape, dtype=accumulate_dtype(q.dtype))


@torch.library.custom_op("ring_hf::chunked_ulysses_backward", mutates_args=())
def _chunked_ulysses_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor, call: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return chunked_backward(dout, q, k, v, sinks, out, lse, call)


@_chunked_ulysses_backward.register_fake
def _(dout, q, k, v, sinks, out, lse, call):
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dsinks


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, ctx.call = inputs
    ctx.save_for_backward(q, k, v, sinks, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dout, _dlse):
    q, k, v, sinks, out, lse = ctx.saved_tensors
    *grads, dsinks = _chunked_ulysses_backward(dout, q, k, v, sinks, out, lse, ctx.call)
    return *grads, None if sinks is None else dsinks, None


chunked_ulysses_op.register_autograd(_backward, setup_context=_setup_context)
