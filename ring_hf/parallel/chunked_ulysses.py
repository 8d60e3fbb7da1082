"""Ulysses a few heads at a time: headwise chunking as in Untied Ulysses (UPipe; Ghadia et al. 2026, arXiv 2602.21196).

Ulysses holds queries, keys, values and results twice: a rank's tokens of all heads, and its heads of all tokens. Here
the second copy is of one chunk of heads at a time: queries, keys and values of a chunk are exchanged, attention runs,
and the result goes back before the next chunk is exchanged. Key/value heads that several chunks share are sent once
and kept for them. For backward a rank keeps only its own tokens and the lse of its heads; each chunk is exchanged
again, together with its result and the gradient of that. The paper also chunks the projections; here the layer makes
q, k, v.

All of it is one operator, whose result activation checkpointing can save (`ring_hf.memory`): then neither attention
nor an exchange of the forward pass runs again.

Letters: B batch, H query heads, K key/value heads, C tokens of this rank, u ranks of a Ulysses group, h query heads of
this rank (`chunk_*`: of one chunk), S = u * C tokens of the Ulysses group, D and E head dims.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..geometry import HeadChunk, HeadShare, chunk_heads, head_split
from ..kernels import accumulate_dtype, choose
from .attention_op import prepare
from .groups import group_of
from .op_arguments import AttentionOpArgs, from_json
from .schedule import ring_backward, ring_forward, sinks_gradient
from .ulysses import exchange_heads, exchange_tokens


class _Heads:
    """The heads of each rank of the Ulysses group, chunk by chunk, and the keys and values held for them.

    An exchange carries one tensor like q, or keys and values: together they would need twice the memory at once.

    Attributes:
        share: this rank's heads of all chunks.
        chunks: for each chunk, that of every rank of the Ulysses group.
        kv: keys and values of the current chunk, `[B, heads, S, D]` and `[B, heads, S, E]`.
    """

    def __init__(self, args: AttentionOpArgs, q: Tensor, k: Tensor) -> None:
        # Numbers of heads are never symbolic: the work of each rank depends on them.
        shares = head_split(int(q.shape[1]), int(k.shape[1]), args.sequence.ulysses)
        self._group = args.group
        self._rank = dist.get_rank(group_of(args.group)) % len(shares)
        self.share = shares[self._rank]
        num_chunks = args.options.head_chunks
        self.chunks = list(zip(*(chunk_heads(share, num_chunks) for share in shares), strict=True))
        self.kv: list[Tensor] = []
        self._grads: list[Tensor] = []  # of `kv`, summed over the chunks that share it

    def own(self, chunks: tuple[HeadChunk, ...]) -> HeadShare:
        """Return this rank's heads of a chunk."""
        return chunks[self._rank].share

    def fetch_keys(self, chunks: tuple[HeadChunk, ...], k: Tensor, v: Tensor) -> None:
        """Exchange the keys and values of a chunk into `kv`, unless the previous chunk had the same."""
        fetched = [chunk.fetched for chunk in chunks]
        if not any(fetched):
            return
        if fetched[self._rank]:
            self.kv = []  # freed before the exchange allocates
        arrived = exchange_tokens([(k, fetched), (v, fetched)], self._group)
        if fetched[self._rank]:
            self.kv = arrived

    def fetch(self, chunks: tuple[HeadChunk, ...], x: Tensor) -> Tensor:
        """Return this rank's heads of a chunk of a tensor like q: `[B, heads, S, D]`."""
        (chunk_x,) = exchange_tokens([(x, _queries(chunks))], self._group)
        return chunk_x

    def give_back(self, chunks: tuple[HeadChunk, ...], chunk_x: Tensor, x: Tensor) -> None:
        """Exchange a chunk `[B, heads, S, ...]` of every rank, and copy this rank's tokens into `x [B, H, C, ...]`."""
        (parts,) = exchange_heads([(chunk_x, _queries(chunks))], self._group)
        for chunk, part in zip(chunks, parts, strict=True):
            _heads_of(x, chunk.share).copy_(part)

    def add_gradients(self, chunks: tuple[HeadChunk, ...], *grads: Tensor) -> None:
        """Add a chunk's dk and dv to the sums of the previous chunks that share its keys and values."""
        if chunks[self._rank].fetched:
            self._grads = list(grads)
            return
        for number, grad in enumerate(grads):
            self._grads[number] = self._grads[number].to(accumulate_dtype(grad.dtype)).add_(grad)

    def release_keys(self, chunks: tuple[HeadChunk, ...]) -> None:
        """Drop `kv` if no later chunk shares it."""
        if chunks[self._rank].finished:
            self.kv = []

    def give_back_gradients(self, chunks: tuple[HeadChunk, ...], like: Tensor, dkv: list[Tensor]) -> None:
        """Exchange the dk and dv that are complete, and add them to `dkv`: this rank's tokens of all heads.

        `like` is the chunk's dq. Several ranks, or distant chunks, may have used a copy of the same head.
        """
        finished = [chunk.finished for chunk in chunks]
        if not any(finished):
            return
        if finished[self._rank]:
            grads = [grad.to(like.dtype) for grad in self._grads]
            self._grads = []
        else:
            grads = [like.new_empty(like.shape[0], 0, like.shape[2], x.shape[-1]) for x in dkv]
        arrived = exchange_heads([(grad, finished) for grad in grads], self._group)
        del grads
        for total, parts in zip(dkv, arrived, strict=True):
            for heads, part in zip(finished, parts, strict=True):
                for number, head in enumerate(heads):
                    total[:, head].add_(part[:, number])


def _queries(chunks: tuple[HeadChunk, ...]) -> list[tuple[int, ...]]:
    return [chunk.share.queries for chunk in chunks]


def _heads_of(x: Tensor, share: HeadShare, first: int = 0, dim: int = 1) -> Tensor:
    """Return a view of the share's query heads in a tensor whose first head is `first`."""
    return x.narrow(dim, share.q_start - first, share.num_q)


def chunked_forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, text: str) -> tuple[Tensor, Tensor]:
    """`(out [B, H, C, E], lse [B, h, S])` for `q [B, H, C, D]`, `k [B, K, C, D]`, `v [B, K, C, E]`, `sinks [H]`.

    `text` is the text form of `AttentionOpArgs`.
    """
    args = from_json(text)
    heads = _Heads(args, q, k)
    out, lse = _empty_results(q, k, v, args)
    plan, transport = prepare(args, q.shape[0], lse.shape[2], q.device)
    for chunks in heads.chunks:
        heads.fetch_keys(chunks, k, v)
        chunk_q, mine = heads.fetch(chunks, q), heads.own(chunks)
        if mine.num_q:
            kernel = choose(args.options.kernel, chunk_q, heads.kv[1], args.spec.softcap)
            own_sinks = None if sinks is None else _heads_of(sinks, mine, dim=0)
            chunk_out, chunk_lse = ring_forward(
                chunk_q, heads.kv[0], heads.kv[1], plan, transport, kernel, args.spec, own_sinks
            )
            _heads_of(lse, mine, heads.share.q_start).copy_(chunk_lse)
            del chunk_lse
            chunk_out = chunk_out.to(q.dtype)
        else:  # fewer heads than chunks: all ranks of this ring have no work, but take part in the exchange
            chunk_out = chunk_q.new_empty(*chunk_q.shape[:3], v.shape[-1])
        del chunk_q
        heads.release_keys(chunks)
        heads.give_back(chunks, chunk_out, out)
        del chunk_out
    return out, lse


def chunked_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor, text: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `(dq, dk, dv, dsinks)` from the inputs and results of `chunked_forward` and the gradient of its `out`.

    Each has the shape and dtype of its input. Without sinks, `dsinks` is empty.
    """
    args = from_json(text)
    heads = _Heads(args, q, k)
    plan, transport = prepare(args, q.shape[0], lse.shape[2], q.device)
    dq = torch.empty_like(q)
    dkv: list[Tensor] = []
    dsinks = q.new_empty(0) if sinks is None else torch.zeros_like(sinks)
    for chunks in heads.chunks:
        heads.fetch_keys(chunks, k, v)
        chunk_dq, chunk_out, chunk_dout = (heads.fetch(chunks, x) for x in (q, out, dout))
        mine = heads.own(chunks)
        if mine.num_q:
            chunk_q, chunk_lse = chunk_dq, _heads_of(lse, mine, heads.share.q_start)
            # A query that sees no key has lse -inf; with +inf its weights exp(score - lse) are 0 instead of NaN.
            chunk_lse = chunk_lse.masked_fill(chunk_lse == -torch.inf, torch.inf)
            if sinks is not None:
                own = sinks_gradient(chunk_dout, chunk_out, chunk_lse, _heads_of(sinks, mine, dim=0))
                _heads_of(dsinks, mine, dim=0).copy_(own)
            kernel = choose(args.options.kernel, chunk_q, heads.kv[1], args.spec.softcap)
            chunk_dq, chunk_dk, chunk_dv = ring_backward(
                chunk_dout, chunk_q, heads.kv[0], heads.kv[1], chunk_out, chunk_lse, plan, transport, kernel, args.spec
            )
            del chunk_q, chunk_lse
            heads.add_gradients(chunks, chunk_dk, chunk_dv)
            del chunk_dk, chunk_dv
        del chunk_dout, chunk_out
        heads.release_keys(chunks)
        heads.give_back(chunks, chunk_dq, dq)
        if not dkv and any(chunk.finished for chunk in chunks):  # not earlier: until now the sums may be all there is
            dkv = [torch.zeros_like(k), torch.zeros_like(v)]
        heads.give_back_gradients(chunks, chunk_dq, dkv)
        del chunk_dq
    return dq, dkv[0], dkv[1], dsinks


@torch.library.custom_op("ring_hf::chunked_ulysses", mutates_args=())
def chunked_ulysses_op(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: str) -> tuple[Tensor, Tensor]:
    """`chunked_forward` as an operator: the same arguments and results."""
    return chunked_forward(q, k, v, sinks, call)


@chunked_ulysses_op.register_fake
def _(q, k, v, sinks, call):
    return _empty_results(q, k, v, from_json(call))


def _empty_results(q: Tensor, k: Tensor, v: Tensor, args: AttentionOpArgs) -> tuple[Tensor, Tensor]:
    batch, num_heads, tokens, _ = q.shape
    # BSHD in memory: the order in which models read the output.
    out = q.new_empty(batch, tokens, num_heads, v.shape[-1]).transpose(1, 2)
    shape = batch, _Heads(args, q, k).share.num_q, tokens * args.sequence.ulysses
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
