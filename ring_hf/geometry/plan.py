"""Plans: which blocks of keys a ring rank holds in each step, which tiles it computes, and how blocks get there.

A *transport* is also data: the blocks of a rank's steps and, for those that pass blocks from rank to rank, the moves.

* `ring` and `double_ring`: whole shards, passed on. A ring is a double ring without an outer ring. The inner ring
  turns inside a node; for the next turn the block that a turn began with goes to the next node, and has that whole
  turn to get there (the double ring of LoongTrain, Gu et al. 2024, arXiv 2406.18485).
* `allgather`: one step with everything, in global order, so that a rank runs few large tiles (as Llama 3 does,
  Grattafiori et al. 2024, arXiv 2407.21783, section 3.3.2).
* `direct`: per step the keys of one other shard that the rank sees, from that shard's owner; nothing if it sees none.
"""

import functools
from dataclasses import dataclass

from .dependencies import max_hops, needed_kv_ranges
from .layout import Segment, join_segments, slice_segments
from .sequence import Mask, ShardedSequence
from .spec import check_inner_ring, check_transport
from .tiles import Tile, make_tiles


@dataclass(frozen=True, slots=True)
class Slice:
    """Local tokens `start..stop - 1` of the shard of ring rank `rank`."""

    rank: int
    start: int
    stop: int


Block = tuple[Slice, ...]


@dataclass(frozen=True)
class Step:
    """The tiles that a rank computes with one block of keys and values; they index the concatenated slices."""

    block: Block
    tiles: tuple[Tile, ...]

    @property
    def num_keys(self) -> int:
        """Tokens of the block."""
        return sum(part.stop - part.start for part in self.block)

    @property
    def work(self) -> int:
        """Visible pairs, summed over batch rows."""
        return sum(tile.area * tile.num_rows for tile in self.tiles)


@dataclass(frozen=True, slots=True)
class Move:
    """A block or sum sent from each rank to the rank `outer` nodes and `inner` ranks ahead of it.

    Attributes:
        send_step: step during which it is sent.
        recv_step: step before which the receiver waits for it.
    """

    send_step: int
    recv_step: int
    outer: int
    inner: int


@dataclass(frozen=True)
class Plan:
    """The steps of one ring rank; step 0 holds the rank's own keys.

    Attributes:
        rank, num_ranks: ring rank and size of the ring.
        inner_ring_size: ranks of an inner ring; `num_ranks` unless the transport is a double ring.
        sends: with `direct`, per step the slices of its own shard that this rank sends to the rank that many ranks
            ahead.
    """

    rank: int
    num_ranks: int
    transport: str
    inner_ring_size: int
    steps: tuple[Step, ...]
    sends: tuple[Block, ...] = ()

    @property
    def work(self) -> int:
        """Visible pairs of all steps, summed over batch rows."""
        return sum(step.work for step in self.steps)

    def peer(self, outer: int, inner: int) -> int:
        """Return the ring rank that is `outer` nodes ahead on the outer ring and `inner` ranks on the inner ring."""
        node, inner_rank = divmod(self.rank, self.inner_ring_size)
        num_nodes = self.num_ranks // self.inner_ring_size
        return (node + outer) % num_nodes * self.inner_ring_size + (inner_rank + inner) % self.inner_ring_size

    @property
    def moves(self) -> tuple[Move, ...]:
        """Moves of keys and values: the receiver holds in `recv_step` the block that the sender has in `send_step`."""
        inner, num_steps = self.inner_ring_size, len(self.steps)
        moves = []
        for step in range(num_steps - 1):
            if step % inner == 0 and step + inner < num_steps:
                moves.append(Move(step, step + inner, 1, 0))
            if (step + 1) % inner:
                moves.append(Move(step, step + 1, 0, 1))
        return tuple(moves)

    @property
    def gradient_moves(self) -> tuple[Move, ...]:
        """Moves of dK and dV sums, one after each step but the first, whose sum already belongs to this rank.

        Within a turn a sum follows its block. At the end of a turn it is sent to the next node, which needs it when
        its own sum is complete; after the last turn it is sent to the owner, with the number of steps as `recv_step`.
        """
        inner, last = self.inner_ring_size, len(self.steps) - 1
        moves = []
        for step in range(1, last + 1):
            if step == last:
                moves.append(Move(step, step + 1, -(last // inner), -(last % inner)))
            elif (step + 1) % inner == 0:
                moves.append(Move(step, step + inner, 1, 0))
            else:
                moves.append(Move(step, step + 1, 0, 1))
        return tuple(moves)


def _ring_blocks(sequence: ShardedSequence, mask: Mask, rank: int, inner_ring_size: int) -> list[Block]:
    size, inner = sequence.ring_size, inner_ring_size
    outer_hops, inner_hops = max_hops(sequence, mask, inner)
    hops = [(outer, hop) for outer in range(outer_hops + 1) for hop in range(inner)]
    if not outer_hops:
        hops = hops[: inner_hops + 1]
    node, inner_rank = divmod(rank, inner)
    sources = ((node - outer) % (size // inner) * inner + (inner_rank - hop) % inner for outer, hop in hops)
    return [(Slice(source, 0, sequence.length // size),) for source in sources]


def _gathered_block(sequence: ShardedSequence) -> Block:
    slices = []
    for rank in range(sequence.ring_size):
        offset = 0
        for segment in sequence.ring_segments(rank):
            slices.append((segment.start, Slice(rank, offset, offset + segment.length)))
            offset += segment.length
    # Interleaved shards stay whole, in the order of their ranks: in global order they would be no band any more.
    return tuple(part for _, part in sorted(slices, key=lambda item: item[0]))


def _direct_block(sequence: ShardedSequence, mask: Mask, rank: int, source: int) -> Block:
    return tuple(Slice(source, start, stop) for start, stop in needed_kv_ranges(sequence, mask, rank, source))


def blocks(sequence: ShardedSequence, mask: Mask, rank: int, transport: str, inner_ring_size: int) -> list[Block]:
    """Return the blocks of keys that a ring rank holds, step by step; the same number of steps on every rank.

    Raises:
        ValueError: if the transport is unknown or does not fit the ring.
    """
    size = sequence.ring_size
    check_transport(transport)
    assert transport != "auto", "the caller resolves it"
    if size % inner_ring_size or (transport == "double_ring" and inner_ring_size in (1, size) and size > 1):
        check_inner_ring(inner_ring_size, size, f"inner_ring_size={inner_ring_size}")
    if size == 1:
        return [(Slice(0, 0, sequence.length),)]
    if transport == "allgather":
        return [_gathered_block(sequence)]
    if transport == "direct":
        own = (Slice(rank, 0, sequence.length // size),)
        _, num_hops = max_hops(sequence, mask, size)
        sources = [(rank - hop) % size for hop in range(1, num_hops + 1)]
        return [own, *(_direct_block(sequence, mask, rank, source) for source in sources)]
    return _ring_blocks(sequence, mask, rank, inner_ring_size if transport == "double_ring" else size)


def _key_segments(sequence: ShardedSequence, block: Block) -> list[Segment]:
    """Return the global tokens of a block, in its order."""
    shards = {part.rank: sequence.ring_segments(part.rank) for part in block}
    return join_segments(
        segment for part in block for segment in slice_segments(shards[part.rank], part.start, part.stop)
    )


# A step uses one plan per kind of layer; a plan of 10,000 documents holds megabytes.
@functools.lru_cache(maxsize=16)
def make_plan(
    sequence: ShardedSequence,
    mask: Mask,
    rank: int,
    num_rows: int = 1,
    num_queries: int | None = None,
    transport: str = "ring",
    inner_ring_size: int = 1,
) -> Plan:
    """Return the plan of one ring rank, cached.

    Args:
        rank: ring rank.
        num_rows: batch rows B.
        num_queries: with one rank, the queries are the last `num_queries` tokens (decoding with a cache); default all.
        transport: one of `TRANSPORTS`.
        inner_ring_size: ranks of an inner ring; for `double_ring` only.

    Raises:
        ValueError: if the batch has another number of rows than the sequence describes, or the transport is unknown
            or does not fit the ring.
    """
    if sequence.num_rows not in (None, num_rows):
        raise ValueError(
            f"The batch has {num_rows} rows, but its ShardedSequence describes {sequence.num_rows}. Build both from "
            "the same batch."
        )
    queries = sequence.ring_segments(rank)
    size = sequence.ring_size
    if num_queries is not None and num_queries != sequence.length // size:
        assert size == 1
        queries = (Segment(sequence.length - num_queries, num_queries),)
    groups = list(sequence.row_groups(mask, num_rows))
    steps = []
    for block in blocks(sequence, mask, rank, transport, inner_ring_size):
        keys = _key_segments(sequence, block)
        tiles = [tile for row, rows, regions in groups for tile in make_tiles(queries, keys, regions, mask, row, rows)]
        steps.append(Step(block, tuple(tiles)))
    sends: list[Block] = []
    if transport == "direct":
        targets = [(rank + step) % size for step in range(1, len(steps))]
        sends = [(), *(_direct_block(sequence, mask, target, rank) for target in targets)]
    inner_ring_size = inner_ring_size if transport == "double_ring" else size
    return Plan(rank, size, transport, inner_ring_size, tuple(steps), tuple(sends))


def sent_tokens(sequence: ShardedSequence, mask: Mask, transport: str, inner_ring_size: int = 1) -> list[list[int]]:
    """Return `[ring rank][step]`: tokens (keys with their values, of one batch row) sent in the forward pass.

    In an all-gather each rank passes on its own shard and those of the others, as a ring of R - 1 hops in one step.
    """
    size, shard_length = sequence.ring_size, sequence.length // sequence.ring_size
    if size == 1:
        return [[0]]
    if transport == "allgather":
        return [[(size - 1) * shard_length] for _ in range(size)]
    if transport == "direct":
        _, num_hops = max_hops(sequence, mask, size)
        sent = [[0] * (num_hops + 1) for _ in range(size)]
        for rank in range(size):
            for hop in range(1, num_hops + 1):
                source = (rank - hop) % size
                ranges = needed_kv_ranges(sequence, mask, rank, source)
                # The block of step `hop` travels during the step before.
                sent[source][hop - 1] = sum(stop - start for start, stop in ranges)
        return sent
    inner_ring_size = inner_ring_size if transport == "double_ring" else size
    num_steps = len(_ring_blocks(sequence, mask, 0, inner_ring_size))
    plan = Plan(0, size, transport, inner_ring_size, (Step((), ()),) * num_steps)
    sent_by_step = [
        shard_length * sum(1 for move in plan.moves if move.send_step == step) for step in range(num_steps)
    ]
    return [sent_by_step] * size
