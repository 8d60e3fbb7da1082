"""Memory that ring attention needs besides q, k, v and its results: the buffers of `ring_hf.parallel`, byte by byte.

In the forward, a rank accumulates its output in fp32 while blocks of keys and values circulate. In the backward it
accumulates dq in fp32, its own dk and dv, and fp32 sums for visiting blocks: one being computed, and those in flight.
`tests/planner/test_attention_buffers.py` runs the schedule and fails if it allocates more than is counted here.

Letters: c tokens of a rank, e bytes of an element, H query heads. Widths are elements per token; the functions return
bytes per token unless they take the number of tokens.
"""

from dataclasses import dataclass

from ..geometry import chunk_heads, head_split
from .model import Model


@dataclass(frozen=True)
class TransportBuffers:
    """Buffers of a transport, in units of a rank's own keys and values (`blocks`) or of their gradients in fp32.

    Attributes:
        blocks: blocks of keys and values in buffers of their own.
        grads_in_flight: gradient sums that travel while the next ones are computed, counting both ends.
        has_fp32_own_grads: whether the sums for a rank's own keys are in fp32 from the start.
    """

    blocks: int
    grads_in_flight: int
    has_fp32_own_grads: bool = False


MAX_IDLE_BYTES = 512 * 2**20  # as in `parallel.buffers`
# A ring sends one block and receives the next. A double ring also keeps the block that an inner turn began with and
# receives the next turn's; the same holds for its gradients. `direct` packs the blocks it sends, which takes one more,
# and adds the gradients that it receives.
TRANSPORT_BUFFERS = {
    "ring": TransportBuffers(2, 2),
    "double_ring": TransportBuffers(4, 4),
    "direct": TransportBuffers(4, 2, has_fp32_own_grads=True),
}


@dataclass(frozen=True)
class AttentionWidths:
    """Elements per token that a rank attends with, including uneven and copied heads of Ulysses.

    Attributes:
        query, out: elements of queries and of outputs.
        kv: elements of keys and values together.
        heads: query heads.
        is_grouped: whether several of the rank's query heads share a key/value head.
    """

    query: float
    kv: float
    out: float
    heads: float
    is_grouped: bool

    @classmethod
    def from_model(cls, model: Model, ulysses: int, head_chunks: int = 1) -> "AttentionWidths":
        """Return the widths of the busiest rank, and of its largest chunk of heads.

        A rank attends with some heads of the tokens of all `ulysses` ranks. That is as many elements as `ulysses`
        times as many heads of its own tokens.
        """
        head_shares = [
            chunk.share
            for rank_share in head_split(model.heads, model.kv_heads, ulysses)
            for chunk in chunk_heads(rank_share, head_chunks)
        ]
        heads = max(share.num_q for share in head_shares) * ulysses
        kv_heads = max(len(share.kv) for share in head_shares) * ulysses
        kv_dim = model.head_dim + model.v_head_dim
        return cls(
            query=heads * model.head_dim,
            kv=kv_heads * kv_dim,
            out=heads * model.v_head_dim,
            heads=heads,
            is_grouped=heads > kv_heads,
        )


def forward_bytes(widths: AttentionWidths, element: int, ring: int, transport: str) -> float:
    """Return the bytes per token of a forward, besides q, k and v: output in fp32, the result of a tile, and blocks.

    Args:
        element: bytes of an element.
        ring: ranks of the ring.
    """
    fp32 = max(4, element)
    statistics = 5 * fp32 * widths.heads  # lse, that of a tile, and the weights of a merge
    results = (fp32 + element) * widths.out + statistics
    block = element * widths.kv
    if ring == 1:  # a single result, which is returned as it is if it needs no rounding
        return results if element < fp32 else fp32 * widths.out + statistics
    if transport == "allgather":
        # Keys and values are gathered by rank, then copied into global order, one after the other; plus its own parts.
        return max(results + ring * block, 1.5 * ring * block) + block
    return results + TRANSPORT_BUFFERS[transport].blocks * block


def backward_bytes(widths: AttentionWidths, element: int, ring: int, transport: str) -> float:
    """Return the bytes per token of a backward, besides q, k, v, out, lse and the gradient of out."""
    fp32 = max(4, element)
    block, grad_sums = element * widths.kv, fp32 * widths.kv
    query, fp32_query = element * widths.query, fp32 * widths.query
    if ring == 1:  # the results of the one kernel call are the gradients
        return query + block
    if transport == "allgather":
        # Gradients of all keys in fp32; at the end one of the two again, ordered by owner, and its part of the sum.
        computing = fp32_query + query + ring * (2 * block + grad_sums)
        return max(computing, query + ring * (block + 1.5 * grad_sums) + grad_sums)
    buffers = TRANSPORT_BUFFERS[transport]
    base = fp32_query + buffers.blocks * block + (grad_sums if buffers.has_fp32_own_grads else block)
    tile = query + block  # dq, dk and dv of one kernel call
    if ring == 2:  # two results for a query need no fp32, and nothing is in flight while the second is computed
        return base - fp32_query + query + max(tile, block + grad_sums, 2 * grad_sums)
    # The results of a tile, or the sums that they are added to.
    return base + max(tile, block + grad_sums) + buffers.grads_in_flight * grad_sums


def idle_bytes(widths: AttentionWidths, element: int, ring: int, transport: str, tokens: int) -> float:
    """Return the bytes of idle buffers kept for the next pass: at most those that one pass uses at once."""
    if ring == 1:
        return 0.0
    block, grad_sums = element * widths.kv, max(4, element) * widths.kv
    if transport == "allgather":
        in_use = ring * max(1.5 * block, grad_sums)
    else:
        buffers = TRANSPORT_BUFFERS[transport]
        in_use = buffers.blocks * block + (2 + buffers.grads_in_flight) * grad_sums
    return min(MAX_IDLE_BYTES, in_use * tokens)


def exchange_bytes(widths: AttentionWidths, element: int) -> float:
    """Return the bytes per token while Ulysses exchanges tokens for heads, or gradients back.

    Counts the received tensors and those they are copied from or to: `parallel.ulysses` copies once on each side.
    """
    return 2 * element * (widths.query + widths.kv)


def chunked_forward_bytes(
    local: AttentionWidths, chunk: AttentionWidths, element: int, ring: int, transport: str
) -> float:
    """Return the bytes per token of the forward of `parallel.chunked_ulysses`, besides q, k and v.

    Keys and values are received, then queries, each twice while they are unpacked. Then the chunk is attended with,
    and its result is packed and sent back.

    Args:
        local: widths of all heads of the rank's own tokens.
        chunk: widths of the largest chunk.
    """
    results = element * local.out + max(4, element) * local.heads  # out and lse, from the first chunk on
    receiving = element * max(2 * chunk.kv, chunk.kv + 2 * chunk.query)
    attending = element * (chunk.kv + chunk.query) + forward_bytes(chunk, element, ring, transport)
    returning = element * (chunk.kv + 3 * chunk.out) + max(4, element) * chunk.heads
    return results + max(receiving, attending, returning)


def chunked_backward_bytes(
    local: AttentionWidths,
    chunk: AttentionWidths,
    element: int,
    ring: int,
    transport: str,
    workspace: float = 0.0,
) -> float:
    """Return the bytes per token of its backward, besides q, k, v, out, lse and the gradient of out.

    Where chunks cut groups, they share keys and values, whose gradients are then summed in fp32. The gradients of the
    rank's own tokens are allocated when the first sums are complete: after all chunks, if all of them share the keys.

    Args:
        workspace: bytes per token that the kernel allocates.
    """
    fp32 = max(4, element)
    cuts_groups = chunk.kv * local.heads > local.kv * chunk.heads
    all_share_keys = chunk.kv >= local.kv
    grad_sums = fp32 * chunk.kv if cuts_groups else 0
    own_grads = element * local.kv
    inputs = element * (chunk.kv + chunk.query + 2 * chunk.out)
    receiving = inputs + element * max(chunk.query, chunk.out)  # the last of them twice
    attending = inputs + fp32 * chunk.heads + backward_bytes(chunk, element, ring, transport) + workspace
    returning = max(
        element * (3 * chunk.query + chunk.kv),
        element * chunk.query + max(fp32 + element, 3 * element) * chunk.kv,
    )
    computing = grad_sums + max(receiving, attending) + (0 if all_share_keys else own_grads)
    return element * local.query + max(computing, returning + own_grads)


def workspace_bytes(widths: AttentionWidths, element: int, kernel: str) -> float:
    """Return the bytes per token that a GPU kernel itself allocates in the backward.

    flash-attn 2 sums dq in fp32 and, with fewer key/value than query heads, expands dk and dv to all of them
    (csrc/flash_attn/flash_api.cpp); flash-attn 3 sums dq, and with grouped heads dk and dv, in fp32
    (hopper/flash_api.cpp). cuDNN is assumed to need as much as flash-attn 3.
    """
    kv_grads = 2 * element * widths.query if kernel == "flash_attn_2" else 4 * widths.kv
    return 4 * widths.query + (kv_grads if widths.is_grouped else 0)
