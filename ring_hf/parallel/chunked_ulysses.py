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
from .attention_op import prepare
from .groups import group_of
from .op_arguments import Call, decode
from .schedule import ring_backward, ring_forward, sinks_gradient
from .ulysses import exchange_heads, exchange_tokens


class _Heads:
    """Which heads this rank and the others of its place attend with, chunk by chunk, and what is held of them.

    Each exchange is of one tensor like q, or of keys and values: together they would need twice the memory at once.

    Attributes:
        share: this rank's heads, of all chunks.
        chunks: for each chunk that of every rank of the place.
        kv: keys and values of the chunk at hand, `[B, heads, S, D]` and `[B, heads, S, E]`.
    """

    def __init__(self, call: Call, q: Tensor, k: Tensor) -> None:
        # Numbers of heads are never symbolic: what each rank computes depends on them.
        shares = head_split(int(q.shape[1]), int(k.shape[1]), call.sequence.ulysses)
        self._group = call.group
        self._rank = dist.get_rank(group_of(call.group)) % len(shares)
        self.share = shares[self._rank]
        self.chunks = list(zip(*(chunk_heads(share, call.head_chunks) for share in shares), strict=True))
        self.kv: list[Tensor] = []
        self._grads: list[Tensor] = []  # of `kv`, summed over the chunks that share it

    def of(self, chunks: tuple[HeadChunk, ...]) -> HeadShare:
        """This rank's heads of a chunk."""
        return chunks[self._rank].share

    def fetch_keys(self, chunks: tuple[HeadChunk, ...], k: Tensor, v: Tensor) -> None:
        """Make `kv` that of the chunk, if the chunk before had another."""
        fetched = [chunk.fetched for chunk in chunks]
        if not any(fetched):
            return
        if fetched[self._rank]:
            self.kv = []  # before the exchange makes others
        arrived = exchange_tokens([(k, fetched), (v, fetched)], self._group)
        if fetched[self._rank]:
            self.kv = arrived

    def fetch(self, chunks: tuple[HeadChunk, ...], x: Tensor) -> Tensor:
        """This rank's heads of a chunk of a tensor like q, over all tokens of the place."""
        (one_x,) = exchange_tokens([(x, _queries(chunks))], self._group)
        return one_x

    def give_back(self, chunks: tuple[HeadChunk, ...], one_x: Tensor, x: Tensor) -> None:
        """Put a chunk of this rank's heads, of all tokens of the place, where they belong in `x [B, H, C, ...]`."""
        (parts,) = exchange_heads([(one_x, _queries(chunks))], self._group)
        for chunk, part in zip(chunks, parts, strict=True):
            _heads_of(x, chunk.share).copy_(part)

    def add_gradients(self, chunks: tuple[HeadChunk, ...], *grads: Tensor) -> None:
        """Add a chunk's dk and dv to those of the chunks before that share them."""
        if chunks[self._rank].fetched:
            self._grads = list(grads)
            return
        for number, grad in enumerate(grads):
            self._grads[number] = self._grads[number].to(accumulate_dtype(grad.dtype)).add_(grad)

    def release_keys(self, chunks: tuple[HeadChunk, ...]) -> None:
        """Drop `kv` if no later chunk shares it."""
        if chunks[self._rank].finished:
            self.kv = []

    def give_back_gradients(self, chunks: tuple[HeadChunk, ...], like: Tensor, home: list[Tensor]) -> None:
        """Add dk and dv that are complete to `home`, those of this rank's tokens and all heads.

        `like` is the chunk's dq. Several ranks, or distant chunks, may have had a copy of the same head.
        """
        finished = [chunk.finished for chunk in chunks]
        if not any(finished):
            return
        if finished[self._rank]:
            grads = [grad.to(like.dtype) for grad in self._grads]
            self._grads = []
        else:
            grads = [like.new_empty(like.shape[0], 0, like.shape[2], x.shape[-1]) for x in home]
        arrived = exchange_heads([(grad, finished) for grad in grads], self._group)
        del grads
        for total, parts in zip(home, arrived, strict=True):
            for heads, part in zip(finished, parts, strict=True):
                for number, head in enumerate(heads):
                    total[:, head].add_(part[:, number])


def _queries(chunks: tuple[HeadChunk, ...]) -> list[tuple[int, ...]]:
    return [chunk.share.queries for chunk in chunks]


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
        heads.fetch_keys(chunks, k, v)
        one_q, mine = heads.fetch(chunks, q), heads.of(chunks)
        if mine.num_q:
            kernel = choose(call.kernel, one_q, heads.kv[1], call.softcap)
            own_sinks = None if sinks is None else _heads_of(sinks, mine, dim=0)
            maths = call.scale, call.softcap, own_sinks
            one_out, one_lse = ring_forward(one_q, heads.kv[0], heads.kv[1], plan, ring, kernel, *maths, call.overlap)
            _heads_of(lse, mine, heads.share.q_start).copy_(one_lse)
            del one_lse
            one_out = one_out.to(q.dtype)
        else:  # fewer heads than chunks: all ranks of this ring sit out, but stay in the exchange
            one_out = one_q.new_empty(*one_q.shape[:3], v.shape[-1])
        del one_q
        heads.release_keys(chunks)
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
    dq = torch.empty_like(q)
    home: list[Tensor] = []
    dsinks = q.new_empty(0) if sinks is None else torch.zeros_like(sinks)
    for chunks in heads.chunks:
        heads.fetch_keys(chunks, k, v)
        one_dq, one_out, one_dout = (heads.fetch(chunks, x) for x in (q, out, dout))
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
        heads.release_keys(chunks)
        heads.give_back(chunks, one_dq, dq)
        if not home and any(chunk.finished for chunk in chunks):  # no earlier: the sums may have been all of them
            home = [torch.zeros_like(k), torch.zeros_like(v)]
        heads.give_back_gradients(chunks, one_dq, home)
        del one_dq
    return dq, home[0], home[1], dsinks


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
