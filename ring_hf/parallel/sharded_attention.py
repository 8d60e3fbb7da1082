"""Attention over a sequence that several ranks share, as Python functions: checks, choices, Ulysses, the operator.

Letters: B batch, H query heads, K key/value heads, C tokens of this rank, D and E head dims.
"""

import logging
import os
from dataclasses import replace

import torch
from torch import Tensor

from ..costmodel.devices import Shape, hardware_of
from ..costmodel.pass_cost import choose_transport
from ..geometry import AttentionSpec, HeadShare, Mask, RingOptions, ShardedSequence, check_head_chunks, head_split
from ..kernels import accumulate_dtype, choose
from .attention_op import ring_attention_op
from .chunked_ulysses import chunked_ulysses_op
from .groups import group_of
from .op_arguments import AttentionOpArgs, to_json
from .ulysses import heads_to_seq, seq_to_heads

logger = logging.getLogger("ring_hf")

DEFAULT_SPEC, DEFAULT_OPTIONS = AttentionSpec(), RingOptions()


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sequence: ShardedSequence,
    group: str = "",
    spec: AttentionSpec = DEFAULT_SPEC,
    options: RingOptions = DEFAULT_OPTIONS,
    sinks: Tensor | None = None,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """Exact attention over a sequence whose tokens are dealt to the ranks of `group`. Every rank calls it.

    Args:
        q: this rank's queries `[B, H, C, D]`, C = sequence.shard_length; any strides.
        k, v: this rank's keys `[B, K, C, D]` and values `[B, K, C, E]`; H a multiple of K, never repeated.
        sequence: the whole batch as all ranks see it: layout, padded length, documents, right padding, prefixes, and
            how many ranks exchange heads (`ulysses`).
        group: name from `register_group`; unused with one rank.
        spec: mask, scale and softcap.
        options: transport, kernel and so on; `ulysses_size` is that of the sequence, or None.
        sinks: `[H]`, per head the score of one more key without a value; gets a gradient from this rank's queries.
        return_lse: False saves an exchange with Ulysses; the lse is then an empty tensor.

    Returns:
        `out [B, H, C, E]` in q's dtype and `lse [B, H, C]` (natural log, at least fp32, no gradient).

    Raises:
        ValueError: for shapes, dtypes, kernels, transports or numbers of chunks that do not fit. With one rank, q may
            be shorter than k: the queries are then the last ones.
    """
    check_tensors(q, k, v, sequence)
    choose(options.kernel, q, v, spec.softcap)
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(
            f"sinks has shape {tuple(sinks.shape)}, but there are {q.shape[1]} query heads: one per head."
        )
    if options.ulysses_size not in (None, sequence.ulysses):
        raise ValueError(
            f"options.ulysses_size={options.ulysses_size!r}, but the sequence was dealt with ulysses="
            f"{sequence.ulysses}. Describe the sequence with the same number, or leave ulysses_size out."
        )
    check_head_chunks(options.head_chunks, q.shape[1], k.shape[1], sequence.ulysses)
    if sequence.num_ranks > 1 and (size := group_of(group).size()) != sequence.num_ranks:
        raise ValueError(
            f"The sequence is dealt to {sequence.num_ranks} ranks, but the group has {size}. Describe the sequence "
            f"with num_ranks={size}, or pass the group of the ranks that hold it."
        )
    transport = resolve_transport(options, sequence, spec.mask, q, k, v)
    # "auto" may choose a transport that has no inner ring.
    inner_ring_size = options.inner_ring_size if transport == "double_ring" else 1
    options = replace(options, transport=transport, inner_ring_size=inner_ring_size)
    spec = replace(spec, scale=spec.scale_for(q.shape[-1]))
    args = to_json(AttentionOpArgs(sequence, spec, options, group))
    if sequence.ulysses == 1:
        out, lse = ring_attention_op(q, k, v, sinks, args)
        return out, lse if return_lse else lse.new_empty(0)
    shares = head_split(q.shape[1], k.shape[1], sequence.ulysses)
    if options.head_chunks > 1:
        out, lse = chunked_ulysses_op(q, k, v, sinks, args)
    else:
        out, lse = _attend_with_share(q, k, v, sinks, args, shares, group)
        out = heads_to_seq(out, shares, group)
    with torch.no_grad():
        lse = heads_to_seq(lse, shares, group) if return_lse else lse.new_empty(0)
    return out, lse


def _attend_with_share(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, args: str, shares: tuple[HeadShare, ...], group: str
) -> tuple[Tensor, Tensor]:
    """Return `(out, lse)` of this rank's heads over all tokens of its Ulysses group."""
    mine = shares[torch.distributed.get_rank(group_of(group)) % len(shares)]
    q, k, v = seq_to_heads(q, k, v, shares, group)
    if mine.num_q:
        sinks = None if sinks is None else sinks[mine.q_start : mine.q_start + mine.num_q]
        out, lse = ring_attention_op(q, k, v, sinks, args)
        return out, lse
    # Fewer units of heads than ranks: all ranks of this ring sit out, but stay in the graph and the exchange.
    out = q.new_zeros(*q.shape[:3], v.shape[-1]) + q[..., :1] + k[:, :0].sum() + v[:, :0].sum()
    out = out if sinks is None else out + sinks[:0].sum()
    return out, q.new_zeros(q.shape[:3], dtype=accumulate_dtype(q.dtype))


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: tuple[tuple[int, ...], ...] | None = None,
    prefixes: tuple[tuple[int, ...], ...] | None = None,
    causal: bool = True,
    window: int | None = None,
    chunk: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The same attention in one process, without any exchange: `(out, lse)`.

    Args:
        q, k, v: `[B, H, Q, D]`, `[B, K, S, D]`, `[B, K, S, E]`; the queries are the last Q of the S tokens.
        documents: per batch row the cumulative boundaries `(0, ..., S)`, None for one document per row.
        prefixes: per batch row and document the tokens at its start that all see each other.
    """
    sequence = ShardedSequence("contiguous", k.shape[2], 1, documents, None, prefixes)
    spec = AttentionSpec(causal, window, chunk, scale, softcap)
    return ring_attention(q, k, v, sequence=sequence, spec=spec, options=RingOptions(kernel=kernel), sinks=sinks)


_logged: set[tuple[str, str, bool, Mask]] = set()


@torch.compiler.disable
def resolve_transport(
    options: RingOptions, sequence: ShardedSequence, mask: Mask, q: Tensor, k: Tensor, v: Tensor
) -> str:
    """Return the transport to use, the same on every rank. The log says why, once for each kind of mask.

    Of `q [B, H, C, D]`, `k [B, K, C, D]` and `v [B, K, C, E]` only the shapes, the dtype and the device are read.
    """
    if sequence.ring_size == 1:
        return "ring"
    if options.transport != "auto":
        return options.transport
    shape = Shape(q.shape[1], k.shape[1], q.shape[-1], v.shape[-1], q.element_size(), q.shape[0])
    ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", torch.distributed.get_world_size()))
    choice = choose_transport(
        sequence, mask, shape, options.inner_ring_size, hardware_of(q.device.type, ranks_per_node)
    )
    # The numbers of the reason change with every batch of documents; what it is about does not.
    subject = choice.transport, sequence.layout, sequence.documents is not None, mask
    if subject not in _logged:
        _logged.add(subject)
        logger.info("transport %s: %s", choice.transport, choice.reason)
    return choice.transport


def check_tensors(q: Tensor, k: Tensor, v: Tensor, sequence: ShardedSequence) -> None:
    """Raises `ValueError` unless the shapes, dtypes and devices of one rank's shard fit together and the sequence."""
    if {x.ndim for x in (q, k, v)} != {4}:
        raise ValueError(f"q, k and v must be [batch, heads, tokens, head_dim], got {_shapes(q, k, v)}.")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v do not belong together: {_shapes(q, k, v)} as [batch, heads, tokens, head_dim].")
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{q.shape[1]} query heads cannot share {k.shape[1]} key/value heads: the first must be a multiple of the "
            "second."
        )
    if len({x.dtype for x in (q, k, v)}) > 1 or len({x.device for x in (q, k, v)}) > 1:
        devices = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise ValueError(f"q, k and v must agree in dtype and device, got {devices}. Cast them to one.")
    tokens = sequence.shard_length
    if k.shape[2] != tokens or (q.shape[2] != tokens if sequence.num_ranks > 1 else q.shape[2] > tokens):
        raise ValueError(
            f"This rank holds {q.shape[2]} queries and {k.shape[2]} keys, but its shard of {sequence.length} tokens "
            f"over {sequence.num_ranks} ranks is {tokens}. Pass the shard of every tensor, cut with the same layout."
        )
    if sequence.num_rows not in (None, q.shape[0]):
        raise ValueError(
            f"The batch has {q.shape[0]} rows, its description {sequence.num_rows}. Build both from the same batch."
        )


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(tuple(x.shape)) for x in tensors)
