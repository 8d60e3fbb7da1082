"""Cost of one attention layer under each transport, and the choice of a transport by it.

A rank computes `2 H (D + Dv)` FLOPs per visible pair forward, 2.5 times that backward (five products instead of two).
Keys and values are sent in their own dtype, forward and again backward, their gradients in fp32. How much of that is
exposed is not a formula but the outcome of `timeline`; where all ranks do equal work it is the published condition
`c >= (e / 2 phi) (d_kv / d_q) (F / B)` of Ring Attention (Liu et al. 2023, arXiv 2310.01889, section 3) with grouped
heads and a visible share phi.

Everything here is a function of values that are equal on all ranks, so that all ranks choose alike.

Letters: R ring ranks, c tokens of a ring rank, U ranks of a Ulysses group, H and K query and key/value heads, D and Dv
head dims, e bytes per element, F FLOP/s, B bytes/s.
"""

import functools
from dataclasses import dataclass, field, replace

from ..geometry.heads import chunk_heads, head_split
from ..geometry.layout import layout_rule
from ..geometry.plan import Plan, Step
from ..geometry.sequence import Mask, ShardedSequence
from ..geometry.spec import check_inner_ring
from ..text import format_bytes, format_duration
from .devices import HARDWARE, Hardware, Shape
from .timeline import LayerCost, simulate_direct, simulate_ring
from .work_matrices import Matrix, kv_needed_matrix, total_work, work_matrix


@dataclass(frozen=True)
class PassCost:
    """One pass (forward or backward) of one layer.

    Attributes:
        compute: seconds that the busiest rank computes.
        total: seconds until the last rank has its result.
        max_sent, mean_sent_by_step: per step the most bytes that any rank sends, and the mean over ranks.
        ulysses_sent: bytes that a rank sends in Ulysses' exchanges before the first and after the last step.
        buffer_bytes: peak bytes of keys, values and their gradients besides the rank's own.
    """

    compute: float
    total: float
    max_sent: tuple[float, ...]
    mean_sent_by_step: tuple[float, ...]
    ulysses_sent: float
    buffer_bytes: float

    @property
    def mean_sent(self) -> float:
        """Bytes that a rank sends in the whole pass, on average."""
        return sum(self.mean_sent_by_step) + self.ulysses_sent

    @property
    def exposed(self) -> float:
        """Seconds in which the last rank to finish waits or communicates instead of computing."""
        return self.total - self.compute


@dataclass(frozen=True)
class WorkMatrices:
    """A sequence under a mask as the two matrices that every transport's cost follows from.

    Attributes:
        ring_size: number of ring ranks R.
        ulysses: ranks of a Ulysses group.
        ring_shard_length: tokens of one ring rank.
        work: `[ring rank][source]`, visible pairs.
        kv_needed: `[ring rank][source]`, tokens of the source that the rank sees; 0 for its own.
        interleaved: whether the layout assigns single tokens.
    """

    ring_size: int
    ulysses: int
    ring_shard_length: int
    work: Matrix
    kv_needed: Matrix
    interleaved: bool = False
    _steps: dict[tuple[int, int], list[tuple[list[int], list[float]]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _num_steps: dict[int, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def exact(cls, sequence: ShardedSequence, mask: Mask, num_rows: int = 1) -> "WorkMatrices":
        """Count every pair."""
        return cls._of(sequence, work_matrix(sequence, mask, num_rows), kv_needed_matrix(sequence, mask))

    @classmethod
    def estimate(cls, sequence: ShardedSequence, mask: Mask, num_rows: int = 1) -> "WorkMatrices":
        """As `exact`, but with equal work and full need for stripes: milliseconds instead of tenths of a second for
        10,000 documents."""
        if not layout_rule(sequence.layout).interleaved:
            return cls.exact(sequence, mask, num_rows)
        size = sequence.ring_size
        pairs, tokens = total_work(sequence, mask, num_rows) // size**2, sequence.length // size
        kv_needed = [[tokens * (rank != source) for source in range(size)] for rank in range(size)]
        return cls._of(sequence, [[pairs] * size for _ in range(size)], kv_needed)

    @classmethod
    def _of(cls, sequence: ShardedSequence, work: Matrix, kv_needed: Matrix) -> "WorkMatrices":
        size = sequence.ring_size
        interleaved = layout_rule(sequence.layout).interleaved
        return cls(size, sequence.ulysses, sequence.length // size, work, kv_needed, interleaved)

    def num_steps(self, transport: str, inner_ring_size: int) -> int:
        """Steps of the plan: one more than the hops that any rank needs, whole turns for a double ring."""
        size = self.ring_size
        if transport == "allgather" or size == 1:
            return 1
        inner = inner_ring_size if transport == "double_ring" else size
        if inner not in self._num_steps:
            needed_pairs = [(rank, rank) for rank in range(size)]
            for rank, row in enumerate(self.kv_needed):
                needed_pairs += [(rank, source) for source, tokens in enumerate(row) if tokens]
            num_nodes = size // inner
            outer_hops = max((rank // inner - source // inner) % num_nodes for rank, source in needed_pairs)
            inner_hops = max((rank - source) % inner for rank, source in needed_pairs)
            self._num_steps[inner] = (outer_hops + 1) * inner if outer_hops else inner_hops + 1
        return self._num_steps[inner]

    def by_step(self, num_steps: int, inner_ring_size: int) -> list[tuple[list[int], list[float]]]:
        """Per step, lists over ring ranks: visible pairs, and queries that see any key of the step's block."""
        key = num_steps, inner_ring_size
        if key not in self._steps:
            steps = []
            for step in range(num_steps):
                sources = sources_in_step(step, self.ring_size, inner_ring_size)
                pairs = [row[source] for row, source in zip(self.work, sources, strict=True)]
                keys = [row[source] for row, source in zip(self.kv_needed, sources, strict=True)]
                # For causal rectangles, triangles and parts of documents this is the number of pairs over keys.
                queries = [min(self.ring_shard_length, a / b) if b else 0.0 for a, b in zip(pairs, keys, strict=True)]
                steps.append((pairs, queries))
            self._steps[key] = steps
        return self._steps[key]


def estimate_pass(
    matrices: WorkMatrices,
    shape: Shape,
    hardware: Hardware,
    transport: str = "ring",
    inner_ring_size: int = 1,
    backward: bool = False,
) -> PassCost:
    """Return the cost of one forward or backward pass; `transport` and `inner_ring_size` as in `make_plan`."""
    layer = LayerCost(shape, hardware, matrices.ulysses, backward)
    size, tokens = matrices.ring_size, matrices.ring_shard_length
    exchange_seconds = layer.all_to_all_seconds(tokens)
    ulysses_sent = layer.ulysses_bytes * tokens
    bytes_per_token = layer.kv_bytes + layer.grad_bytes * backward
    if size == 1 or transport == "allgather":
        busiest = max(layer.compute_seconds(sum(row), 0.0) for row in matrices.work)
        if matrices.interleaved:  # stripes side by side are no band: each of them is a tile and a merge
            busiest += (size - 1) * (layer.launch_overhead + layer.merge_seconds_per_token * tokens)
        if size == 1:
            return PassCost(busiest, busiest + exchange_seconds, (0,), (0,), ulysses_sent, 0)
        sent = (size - 1) * tokens * bytes_per_token
        gather_seconds = layer.collective_seconds((size - 1) * tokens * layer.kv_bytes, size)
        if backward:
            gather_seconds += layer.collective_seconds((size - 1) * tokens * layer.grad_bytes, size)
        total = busiest + gather_seconds + exchange_seconds
        return PassCost(busiest, total, (sent,), (sent,), ulysses_sent, size * tokens * bytes_per_token)
    num_steps = matrices.num_steps(transport, inner_ring_size)
    inner = inner_ring_size if transport == "double_ring" else size
    compute = [
        [layer.compute_seconds(pairs, queries) for pairs, queries in zip(*step, strict=True)]
        for step in matrices.by_step(num_steps, inner)
    ]
    if transport == "direct":
        sources = [sources_in_step(step, size, inner) for step in range(num_steps)]
        times = simulate_direct(layer, matrices.kv_needed, sources, compute, backward)
        buffer_tokens = max(sum(sorted(row)[-2:]) for row in matrices.kv_needed)
    else:
        plan = Plan(0, size, transport, inner, (Step((), ()),) * num_steps)
        times = simulate_ring(layer, tokens, plan, compute, backward)
        # One block leaves and one arrives; a double ring does the same for the turn.
        buffer_tokens = tokens * (0 if num_steps == 1 else 2 if num_steps <= inner else 4)
    busiest = max(map(sum, zip(*compute, strict=True)))
    total = times.seconds + exchange_seconds
    buffer_bytes = buffer_tokens * bytes_per_token
    return PassCost(busiest, total, times.max_sent, times.mean_sent, ulysses_sent, buffer_bytes)


def estimate_chunked_pass(
    matrices: WorkMatrices,
    shape: Shape,
    hardware: Hardware,
    transport: str = "ring",
    inner_ring_size: int = 1,
    backward: bool = False,
    head_chunks: int = 1,
) -> PassCost:
    """Return the cost of a pass in which Ulysses exchanges the busiest rank's heads in chunks, one after the other.

    A chunk is a pass of its own over its heads, so keys and values of a group that is cut go round the ring with each
    of its chunks. Backward exchanges q, k, v and out once more: twice the bytes.
    """
    if head_chunks == 1:
        return estimate_pass(matrices, shape, hardware, transport, inner_ring_size, backward)
    ulysses, tokens = matrices.ulysses, matrices.ring_shard_length
    shares = head_split(shape.num_heads, shape.num_kv_heads, ulysses)
    busiest = max(shares, key=lambda share: share.num_q)
    passes, ring_seconds = [], 0.0
    for chunk in chunk_heads(busiest, head_chunks):
        chunk_shape = replace(shape, num_heads=chunk.share.num_q * ulysses, num_kv_heads=len(chunk.share.kv) * ulysses)
        passes.append(estimate_pass(matrices, chunk_shape, hardware, transport, inner_ring_size, backward))
        chunk_layer = LayerCost(chunk_shape, hardware, ulysses, backward)
        ring_seconds += passes[-1].total - chunk_layer.all_to_all_seconds(tokens)
    layer = LayerCost(shape, hardware, ulysses, backward)
    num_exchanges = 2 if backward else 1
    latency = layer.all_to_all_seconds(0)
    exchange_seconds = num_exchanges * (layer.all_to_all_seconds(tokens) - latency) + head_chunks * latency
    return PassCost(
        compute=sum(cost.compute for cost in passes),
        total=ring_seconds + exchange_seconds,
        max_sent=tuple(map(sum, zip(*(cost.max_sent for cost in passes), strict=True))),
        mean_sent_by_step=tuple(map(sum, zip(*(cost.mean_sent_by_step for cost in passes), strict=True))),
        ulysses_sent=num_exchanges * layer.ulysses_bytes * tokens,
        buffer_bytes=max(cost.buffer_bytes for cost in passes),
    )


def sources_in_step(step: int, size: int, inner_ring_size: int) -> list[int]:
    """Return for each ring rank the rank whose block it holds: blocks move inside a node, and by a node per turn."""
    inner = inner_ring_size
    turn, hop = divmod(step, inner)
    num_nodes = size // inner
    node_starts = [(node - turn) % num_nodes * inner for node in range(num_nodes)]
    return [start + (inner_rank - hop) % inner for start in node_starts for inner_rank in range(inner)]


@dataclass(frozen=True)
class TransportChoice:
    """The transport to take, and the reason: a sentence with numbers for the log."""

    transport: str
    reason: str


_MAX_GATHER_TIME = 0.97  # predicted time of all-gather over that of the best other transport, at most
_MAX_DIRECT_BYTES = 0.7  # bytes that direct sends over those of a ring, at most


@functools.lru_cache(maxsize=64)
def choose_transport(
    sequence: ShardedSequence,
    mask: Mask,
    shape: Shape,
    inner_ring_size: int = 1,
    hardware: Hardware = HARDWARE["cpu"],
) -> TransportChoice:
    """Return the cheapest transport for a training step (forward and backward) of one layer; cached.

    A ring is the default: `ring`, or `double_ring` where `inner_ring_size` cuts the ring into several. `direct`
    replaces it where it sends less and is not slower; `allgather` where it is predicted to be faster and the gathered
    keys, values and gradients fit into `hardware.memory_budget`.

    Raises:
        ValueError: if `inner_ring_size` does not divide the ring.
    """
    size = sequence.ring_size
    if size % inner_ring_size:
        check_inner_ring(inner_ring_size, size, f"inner_ring_size={inner_ring_size}")
    if size == 1:
        return TransportChoice("ring", "the ring has one rank: no keys or values are sent")
    ring = "double_ring" if 1 < inner_ring_size < size else "ring"
    matrices = WorkMatrices.estimate(sequence, mask, shape.num_rows)
    seconds: dict[str, float] = {}
    sent: dict[str, float] = {}
    for name in (ring, "direct", "allgather"):
        forward = estimate_pass(matrices, shape, hardware, name, inner_ring_size)
        backward = estimate_pass(matrices, shape, hardware, name, inner_ring_size, backward=True)
        if name == "allgather" and backward.buffer_bytes > hardware.memory_budget:
            continue
        seconds[name] = forward.total + backward.total
        sent[name] = forward.mean_sent + backward.mean_sent
    best = ring
    if sent["direct"] <= _MAX_DIRECT_BYTES * sent[best] and seconds["direct"] <= seconds[best]:
        best = "direct"
    if "allgather" in seconds and seconds["allgather"] <= _MAX_GATHER_TIME * seconds[best]:
        best = "allgather"
    listed = ", ".join(f"{name} {format_duration(seconds[name])} and {format_bytes(sent[name])}" for name in seconds)
    reason = f"predicted per layer and step, time and bytes a rank sends ({hardware.name}): {listed}"
    if "allgather" not in seconds:
        reason += f"; allgather would hold more than {format_bytes(hardware.memory_budget)}"
    return TransportChoice(best, reason)
