"""Plans: which blocks of keys a rank holds one after the other, what it computes with each, and how blocks get there.

A *transport* is data too: the blocks of a rank's steps, and for those that hand blocks from rank to rank the moves.

* `ring` and `double_ring`: whole shards, handed on. A ring is a double ring without an outer ring. The inner ring
  turns inside a node; for the next turn the block that a turn began with goes to the next node, and has that whole
  turn to get there (the double ring of LoongTrain, Gu et al. 2024, arXiv 2406.18485).
* `allgather`: one step with everything, in global order, so that a rank runs few large tiles (as Llama 3 does,
  Grattafiori et al. 2024, arXiv 2407.21783, section 3.3.2).
* `direct`: per step what the rank sees of one other shard, from that shard's owner; nothing if it sees nothing.
"""

import functools
from dataclasses import dataclass

from .dependencies import farthest, needed
from .layout import Segment, slice_segments
from .sequence import Mask, ShardedSequence
from .spec import check_transport
from .tiles import Tile, tiles


@dataclass(frozen=True, slots=True)
class Slice:
    """Local tokens `start..stop - 1` of the shard of ring rank `rank`."""

    rank: int
    start: int
    stop: int


@dataclass(frozen=True)
class Step:
    """What a rank computes with one block of keys and values: the concatenation of slices, which the tiles index."""

    block: tuple[Slice, ...]
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
    """Something that leaves during one step for the rank `outer` nodes and `inner` places ahead; `due` needs it."""

    posted: int
    due: int
    outer: int
    inner: int


@dataclass(frozen=True)
class Plan:
    """One rank's steps. `rank` and `num_ranks` count places of the ring; step 0 holds the rank's own keys.

    Attributes:
        inner: ranks of an inner ring; `num_ranks` unless the transport is a double ring.
        lent: with `direct`, per step what this rank sends of its own shard to the rank so many places ahead.
    """

    rank: int
    num_ranks: int
    transport: str
    inner: int
    steps: tuple[Step, ...]
    lent: tuple[tuple[Slice, ...], ...] = ()

    @property
    def work(self) -> int:
        """Visible pairs of all steps, summed over batch rows."""
        return sum(step.work for step in self.steps)

    def ahead(self, outer: int, inner: int) -> int:
        """The rank that lies so many places ahead on the outer and on the inner ring."""
        node, place = divmod(self.rank, self.inner)
        nodes = self.num_ranks // self.inner
        return (node + outer) % nodes * self.inner + (place + inner) % self.inner

    @property
    def moves(self) -> tuple[Move, ...]:
        """How keys and values travel: what a rank has in step `posted`, its successor has in step `due`."""
        return tuple(
            move
            for step in range(len(self.steps) - 1)
            for move in (
                Move(step, step + self.inner, 1, 0) if step % self.inner == 0 else None,
                Move(step, step + 1, 0, 1) if (step + 1) % self.inner else None,
            )
            if move is not None and move.due < len(self.steps)
        )

    @property
    def gradient_moves(self) -> tuple[Move, ...]:
        """How sums of dK and dV travel, one leaving after each step but the first, whose sum is at home already.

        Within a turn a sum follows its block. At the end of a turn it is handed to the next node, where it is due
        when that node's own sum is complete; after the last turn it goes home, where `due` is the number of steps.
        """
        last = len(self.steps) - 1
        moves = []
        for step in range(1, last + 1):
            if step == last:
                moves.append(Move(step, step + 1, -(last // self.inner), -(last % self.inner)))
            elif (step + 1) % self.inner == 0:
                moves.append(Move(step, step + self.inner, 1, 0))
            else:
                moves.append(Move(step, step + 1, 0, 1))
        return tuple(moves)


def _relay_blocks(sequence: ShardedSequence, mask: Mask, rank: int, inner: int) -> list[tuple[Slice, ...]]:
    size = sequence.ring_size
    outer_far, inner_far = farthest(sequence, mask, inner)
    steps = [(outer, place) for outer in range(outer_far + 1) for place in range(inner)]
    if not outer_far:
        steps = steps[: inner_far + 1]
    node, place = divmod(rank, inner)
    sources = ((node - outer) % (size // inner) * inner + (place - n) % inner for outer, n in steps)
    return [(Slice(source, 0, sequence.length // size),) for source in sources]


def _gathered_block(sequence: ShardedSequence) -> tuple[Slice, ...]:
    found = []
    for rank in range(sequence.ring_size):
        place = 0
        for segment in sequence.ring_segments(rank):
            found.append((segment.start, Slice(rank, place, place + segment.length)))
            place += segment.length
    # Interleaved shards stay whole, in the order of their ranks: in global order they would be no band any more.
    return tuple(part for _, part in sorted(found, key=lambda item: item[0]))


def blocks(sequence: ShardedSequence, mask: Mask, rank: int, transport: str, inner: int) -> list[tuple[Slice, ...]]:
    """The blocks of keys that `rank` holds, step by step; the same number of steps on every rank."""
    size = sequence.ring_size
    check_transport(transport)
    assert transport != "auto", "the caller resolves it"
    if size % inner or (transport == "double_ring" and inner in (1, size) and size > 1):
        raise ValueError(
            f"inner_ring_size={inner} does not cut a ring of {size} into several equal rings of several ranks. Choose "
            'a divisor in between, or transport="ring".'
        )
    if size == 1:
        return [(Slice(0, 0, sequence.length),)]
    if transport == "allgather":
        return [_gathered_block(sequence)]
    if transport == "direct":
        own = (Slice(rank, 0, sequence.length // size),)
        _, hops = farthest(sequence, mask, size)
        sources = [(rank - hop) % size for hop in range(1, hops + 1)]
        return [own] + [tuple(Slice(s, a, b) for a, b in needed(sequence, mask, rank, s)) for s in sources]
    return _relay_blocks(sequence, mask, rank, inner if transport == "double_ring" else size)


def _keys(sequence: ShardedSequence, block: tuple[Slice, ...]) -> list[Segment]:
    """The global tokens of a block, in its order, neighbours joined."""
    found: list[Segment] = []
    shards = {part.rank: sequence.ring_segments(part.rank) for part in block}
    for part in block:
        for segment in slice_segments(shards[part.rank], part.start, part.stop):
            before = found[-1] if found else None
            if (
                before is not None
                and before.step == segment.step == 1
                and before.start + before.length == segment.start
            ):
                found[-1] = Segment(before.start, before.length + segment.length)
            else:
                found.append(segment)
    return found


# A step uses one plan per kind of layer; a plan of 10,000 documents holds megabytes.
@functools.lru_cache(maxsize=16)
def make_plan(
    sequence: ShardedSequence,
    mask: Mask,
    rank: int,
    num_rows: int = 1,
    num_queries: int | None = None,
    transport: str = "ring",
    inner: int = 1,
) -> Plan:
    """The plan of one ring rank, cached.

    Args:
        rank: place on the ring.
        num_rows: batch rows B.
        num_queries: with one rank, the queries are the last `num_queries` tokens (decoding with a cache); default all.
        transport: one of `TRANSPORTS`.
        inner: ranks of an inner ring; for `double_ring` only.

    Raises:
        ValueError: if the batch has another number of rows than the sequence describes, or the transport is unknown
            or does not fit the ring.
    """
    if sequence.num_rows not in (None, num_rows):
        raise ValueError(
            f"The batch has {num_rows} rows, its description {sequence.num_rows}. Build both from the same batch."
        )
    queries = sequence.ring_segments(rank)
    size = sequence.ring_size
    if num_queries is not None and num_queries != sequence.length // size:
        assert size == 1
        queries = (Segment(sequence.length - num_queries, num_queries),)
    groups = list(sequence.row_groups(mask, num_rows))
    steps = []
    for block in blocks(sequence, mask, rank, transport, inner):
        keys = _keys(sequence, block)
        found = [tile for row, rows, regions in groups for tile in tiles(queries, keys, regions, mask, row, rows)]
        steps.append(Step(block, tuple(found)))
    lent = []
    if transport == "direct":
        others = [(rank + step) % size for step in range(1, len(steps))]
        lent = [(), *(tuple(Slice(rank, a, b) for a, b in needed(sequence, mask, other, rank)) for other in others)]
    inner = inner if transport == "double_ring" else size
    return Plan(rank, size, transport, inner, tuple(steps), tuple(lent))


def sent_tokens(sequence: ShardedSequence, mask: Mask, transport: str, inner: int = 1) -> list[list[int]]:
    """Tokens (keys with their values, of one batch row) that each ring rank sends, by step of the forward pass.

    An all-gather hands on its own shard and those of the others, as a ring of R - 1 hops in one step.
    """
    size, shard = sequence.ring_size, sequence.length // sequence.ring_size
    if size == 1:
        return [[0]]
    if transport == "allgather":
        return [[(size - 1) * shard] for _ in range(size)]
    if transport == "direct":
        _, hops = farthest(sequence, mask, size)
        sent = [[0] * (hops + 1) for _ in range(size)]
        for rank in range(size):
            for hop in range(1, hops + 1):
                source = (rank - hop) % size
                # The block of step `hop` travels during the step before.
                sent[source][hop - 1] = sum(stop - start for start, stop in needed(sequence, mask, rank, source))
        return sent
    inner = inner if transport == "double_ring" else size
    steps = len(_relay_blocks(sequence, mask, 0, inner))
    plan = Plan(0, size, transport, inner, (Step((), ()),) * steps)
    per_step = [shard * sum(1 for move in plan.moves if move.posted == step) for step in range(steps)]
    return [per_step] * size
