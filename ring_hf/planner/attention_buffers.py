"""What the ring holds besides q, k, v and its results: buffers of `ring_hf.parallel`, counted as they are allocated.

Forward, a rank keeps its output in fp32 while partial results come in and blocks of keys and values travel. Backward
it keeps dq in fp32, its own dk and dv, and the fp32 sums for visiting blocks: one being computed, and those under way.
`tests/planner/test_attention_buffers.py` runs the schedule and fails as soon as it holds more than is said here.

Letters: c tokens of a rank, e bytes of an element, H query heads; widths are elements of a token.
"""

from dataclasses import dataclass

from ..geometry import chunk_heads, head_split
from .model import Model


@dataclass(frozen=True)
class Held:
    """Buffers of a transport, in units of a rank's own keys and values (`blocks`) or of their gradients in fp32.

    Attributes:
        blocks: blocks of keys and values in buffers of their own.
        under_way: sums of gradients that travel while the next ones are computed, both ends counted.
        own: whether the sums for a rank's own keys are kept in fp32 from the start.
    """

    blocks: int
    under_way: int
    own: bool = False


IDLE_BYTES = 512 * 2**20  # as in `parallel.buffers`
# A ring hands on one block and receives the next. A double ring keeps, besides, the block that a turn began with and
# receives the next turn's; so do its gradients. `direct` packs what it lends: one more, and adds what comes home.
HELD = {"ring": Held(2, 2), "double_ring": Held(4, 4), "direct": Held(4, 2, own=True)}


@dataclass(frozen=True)
class Widths:
    """Elements of a token that a rank attends with, Ulysses' uneven and copied heads included.

    Attributes:
        grouped: whether several of the rank's query heads share a key/value head.
    """

    query: float
    keys: float
    out: float
    heads: float
    grouped: bool

    @classmethod
    def of(cls, model: Model, ulysses: int, head_chunks: int = 1) -> "Widths":
        """Of a rank's tokens: heads of all of its place's tokens count as all heads of its own.

        Of the largest of so many chunks of heads.
        """
        shares = [
            chunk.share
            for share in head_split(model.heads, model.kv_heads, ulysses)
            for chunk in chunk_heads(share, head_chunks)
        ]
        heads = max(share.num_q for share in shares) * ulysses
        kv_heads = max(len(share.kv) for share in shares) * ulysses
        both = model.head_dim + model.v_head_dim
        return cls(heads * model.head_dim, kv_heads * both, heads * model.v_head_dim, heads, heads > kv_heads)


def forward_bytes(widths: Widths, element: int, ring: int, transport: str) -> float:
    """Bytes of a token while the forward pass runs, besides q, k and v: output in fp32, a tile's result, blocks."""
    fp32 = max(4, element)
    statistics = 5 * fp32 * widths.heads  # lse, a tile's, and the weights of a merge
    results = (fp32 + element) * widths.out + statistics
    block = element * widths.keys
    if ring == 1:  # a single result, kept as it is if it needs no rounding
        return results if element < fp32 else fp32 * widths.out + statistics
    if transport == "allgather":
        # Both are gathered by rank, then copied into global order, one after the other; and a rank's own parts.
        return max(results + ring * block, 1.5 * ring * block) + block
    return results + HELD[transport].blocks * block


def backward_bytes(widths: Widths, element: int, ring: int, transport: str) -> float:
    """Bytes of a token while the backward pass runs, besides q, k, v, out, lse and the gradient of out."""
    fp32 = max(4, element)
    block, sums = element * widths.keys, fp32 * widths.keys
    query, total = element * widths.query, fp32 * widths.query
    if ring == 1:  # one call: its results are the gradients
        return query + block
    if transport == "allgather":
        # All keys' gradients in fp32; at the end one of the two once more, by owner, and its own part of the sum.
        computing = total + query + ring * (2 * block + sums)
        return max(computing, query + ring * (block + 1.5 * sums) + sums)
    held = HELD[transport]
    base = total + held.blocks * block + (sums if held.own else block)
    tile = query + block  # dq, dk and dv of one kernel call
    if ring == 2:  # two results for a query need no fp32, and nothing is under way while the second is computed
        return base - total + query + max(tile, block + sums, 2 * sums)
    # A tile's results, or the sums they go into.
    return base + max(tile, block + sums) + held.under_way * sums


def idle_bytes(widths: Widths, element: int, ring: int, transport: str, tokens: int) -> float:
    """Bytes of buffers that wait between passes to be used again: at most what a pass lends at once."""
    if ring == 1:
        return 0.0
    block, sums = element * widths.keys, max(4, element) * widths.keys
    if transport == "allgather":
        lent = ring * max(1.5 * block, sums)
    else:
        lent = HELD[transport].blocks * block + (2 + HELD[transport].under_way) * sums
    return min(IDLE_BYTES, lent * tokens)


def exchange_bytes(widths: Widths, element: int) -> float:
    """Bytes of a token while Ulysses trades tokens for heads, or gradients back, before or after the ring runs.

    What arrived, and the tensors it came from or goes to: `parallel.ulysses` copies once on either side.
    """
    return 2 * element * (widths.query + widths.keys)


def chunked_forward_bytes(local: Widths, one: Widths, element: int, ring: int, transport: str) -> float:
    """Bytes of a token while `parallel.chunked_ulysses` runs forward, besides q, k and v: results, and one chunk.

    Keys and values arrive, then queries, each twice while they are unpacked; then they are attended with, and the
    result is packed and goes back.
    """
    held = element * local.out + max(4, element) * local.heads  # out and lse, from the first chunk on
    arriving = element * max(2 * one.keys, one.keys + 2 * one.query)
    attended = element * (one.keys + one.query) + forward_bytes(one, element, ring, transport)
    back = element * (one.keys + 3 * one.out) + max(4, element) * one.heads
    return held + max(arriving, attended, back)


def chunked_backward_bytes(
    local: Widths, one: Widths, element: int, ring: int, transport: str, workspace: float = 0.0
) -> float:
    """Bytes of a token in its backward pass, besides q, k, v, out, lse and the gradient of out.

    Where chunks cut groups, and so share keys and values, the sums of their gradients are in fp32. Room for those of
    the rank's tokens is made when the first are complete: after all computing, if all chunks share them.
    """
    fp32, shared = max(4, element), one.keys >= local.keys
    is_cut = one.keys * local.heads > local.keys * one.heads
    sums, home = fp32 * one.keys * is_cut, element * local.keys
    given = element * (one.keys + one.query + 2 * one.out)
    arriving = given + element * max(one.query, one.out)  # the last of them twice
    attended = given + fp32 * one.heads + backward_bytes(one, element, ring, transport) + workspace
    back = max(element * (3 * one.query + one.keys), element * one.query + max(fp32 + element, 3 * element) * one.keys)
    dq = element * local.query
    return dq + max(sums + max(arriving, attended) + home * (not shared), back + home)


def workspace_bytes(widths: Widths, element: int, kernel: str) -> float:
    """Bytes of a token that a GPU kernel itself allocates backward.

    flash-attn 2 sums dq in fp32 and, with fewer key/value than query heads, expands dk and dv to all of them
    (csrc/flash_attn/flash_api.cpp); flash-attn 3 sums dq, and with grouped heads dk and dv, in fp32
    (hopper/flash_api.cpp). cuDNN's workspace is taken as flash-attn 3's.
    """
    expanded = 2 * element * widths.query if kernel == "flash_attn_2" else 4 * widths.keys
    return 4 * widths.query + (expanded if widths.grouped else 0)
