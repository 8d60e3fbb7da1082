"""What one attention layer costs under each transport, and which one is therefore worth taking.

A rank computes `2 H (D + Dv)` FLOPs per visible pair forward, 2.5 times that backward (five products instead of two).
Keys and values travel in their own dtype, forward and again backward, their gradients in fp32. What of that is exposed
is not a formula but the outcome of `timeline`; where all ranks do equal work it is the published condition
`c >= (e / 2 phi) (d_kv / d_q) (F / B)` of Ring Attention (Liu et al. 2023, arXiv 2310.01889, section 3) with grouped
heads and a visible share phi.

Everything here is a function of facts that all ranks share, so that all ranks choose alike.

Letters: R places of the ring, c tokens of a place, U Ulysses ranks of a place, H and K query and key/value heads,
D and Dv head dims, e bytes per element, F FLOP/s, B bytes/s.
"""

import functools
from dataclasses import dataclass, field, replace

from ..geometry.heads import chunk_heads, head_split
from ..geometry.layout import layout_rule
from ..geometry.plan import Plan, Step
from ..geometry.sequence import Mask, ShardedSequence
from ..text import format_bytes, format_duration
from .devices import HARDWARE, Hardware, Shape
from .timeline import LayerCost, fetch, relay
from .work_matrices import Matrix, need_matrix, total_work, work_matrix


@dataclass(frozen=True)
class Cost:
    """One pass (forward or backward) of one layer.

    Attributes:
        compute: seconds that the busiest rank computes.
        total: seconds until the last rank has its result.
        sent, mean_by_step: per step the most bytes that any rank sends, and the mean over ranks.
        exchanged: bytes that a rank sends in Ulysses' exchanges before the first and after the last step.
        buffers: bytes that keys, values and their gradients take besides the rank's own, at the busiest moment.
    """

    compute: float
    total: float
    sent: tuple[float, ...]
    mean_by_step: tuple[float, ...]
    exchanged: float
    buffers: float

    @property
    def mean_sent(self) -> float:
        """Bytes that a rank sends in the whole pass, on average."""
        return sum(self.mean_by_step) + self.exchanged

    @property
    def exposed(self) -> float:
        """Seconds in which the last rank to finish waits or communicates instead of computing."""
        return self.total - self.compute


@dataclass(frozen=True)
class Problem:
    """A sequence under a mask as the two matrices that every transport's cost follows from."""

    num_places: int
    ulysses: int
    tokens: int
    work: Matrix
    need: Matrix
    interleaved: bool = False
    cache: dict[tuple[int, int], list[tuple[list[int], list[float]]]] = field(default_factory=dict, compare=False)
    far: dict[int, int] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, sequence: ShardedSequence, mask: Mask, num_rows: int = 1) -> "Problem":
        """The exact matrices."""
        work, need = work_matrix(sequence, mask, num_rows), need_matrix(sequence, mask)
        return cls._of(sequence, work, need)

    @classmethod
    def estimate(cls, sequence: ShardedSequence, mask: Mask, num_rows: int = 1) -> "Problem":
        """The same, but equal work and full need for stripes: milliseconds instead of tenths for 10,000 documents."""
        if not layout_rule(sequence.layout).interleaved:
            return cls.of(sequence, mask, num_rows)
        size = sequence.ring_size
        pairs, tokens = total_work(sequence, mask, num_rows) // size**2, sequence.length // size
        need = [[tokens * (place != source) for source in range(size)] for place in range(size)]
        return cls._of(sequence, [[pairs] * size for _ in range(size)], need)

    @classmethod
    def _of(cls, sequence: ShardedSequence, work: Matrix, need: Matrix) -> "Problem":
        size = sequence.ring_size
        stripes = layout_rule(sequence.layout).interleaved
        return cls(size, sequence.ulysses, sequence.length // size, work, need, stripes)

    def num_steps(self, transport: str, inner: int) -> int:
        """Steps of the plan: one more than the hops that any rank needs, a double ring in whole turns."""
        size = self.num_places
        if transport == "allgather" or size == 1:
            return 1
        inner = inner if transport == "double_ring" else size
        if inner not in self.far:
            seen = [[source for source, tokens in enumerate(row) if tokens] for row in self.need]
            nodes = size // inner
            pairs = [(place, source) for place, row in enumerate(seen) for source in (*row, place)]
            outer = max((place // inner - source // inner) % nodes for place, source in pairs)
            places = max((place - source) % inner for place, source in pairs)
            self.far[inner] = (outer + 1) * inner if outer else places + 1
        return self.far[inner]

    def by_step(self, steps: int, inner: int) -> list[tuple[list[int], list[float]]]:
        """Per step and place: visible pairs, and queries that see any of the step's block."""
        if (steps, inner) not in self.cache:
            found = []
            for step in range(steps):
                sources = sources_in(step, self.num_places, inner)
                pairs = [row[source] for row, source in zip(self.work, sources, strict=True)]
                needs = [row[source] for row, source in zip(self.need, sources, strict=True)]
                # Of a causal rectangle, a triangle or a document's rest, the pairs over the keys.
                queries = [min(self.tokens, a / b) if b else 0.0 for a, b in zip(pairs, needs, strict=True)]
                found.append((pairs, queries))
            self.cache[steps, inner] = found
        return self.cache[steps, inner]


def pass_cost(
    problem: Problem, shape: Shape, hardware: Hardware, transport: str = "ring", inner: int = 1, backward: bool = False
) -> Cost:
    """The cost of one forward or backward pass; `transport` and `inner` as in `make_plan`."""
    layer = LayerCost(shape, hardware, problem.ulysses, backward)
    exchange = layer.all_to_all(problem.tokens)
    exchanged = layer.ulysses_bytes * problem.tokens
    size, tokens = problem.num_places, problem.tokens
    per_token = layer.kv_bytes + layer.grad_bytes * backward
    if size == 1 or transport == "allgather":
        busiest = max(layer.compute(sum(row), 0.0) for row in problem.work)
        if problem.interleaved:  # stripes side by side are no band: a tile and a merge for each
            busiest += (size - 1) * (layer.launch_overhead + layer.merge_per_token * tokens)
        if size == 1:
            return Cost(busiest, busiest + exchange, (0,), (0,), exchanged, 0)
        handed_on = (size - 1) * tokens * per_token
        moving = layer.collective((size - 1) * tokens * layer.kv_bytes, size)
        moving += layer.collective((size - 1) * tokens * layer.grad_bytes, size) * backward
        total = busiest + moving + exchange
        return Cost(busiest, total, (handed_on,), (handed_on,), exchanged, size * tokens * per_token)
    steps = problem.num_steps(transport, inner)
    inner = inner if transport == "double_ring" else size
    plan = Plan(0, size, transport, inner, (Step((), ()),) * steps)
    sources = [sources_in(step, size, inner) for step in range(steps)]
    compute = [
        [layer.compute(pairs, queries) for pairs, queries in zip(*row, strict=True)]
        for row in problem.by_step(steps, inner)
    ]
    if transport == "direct":
        total, most, mean = fetch(layer, problem.need, sources, compute, backward)
        blocks = max(sum(sorted(row)[-2:]) for row in problem.need)
    else:
        total, most, mean = relay(layer, tokens, plan, compute, backward)
        blocks = tokens * (0 if steps == 1 else 2 if steps <= inner else 4)  # leaving and arriving, of a turn too
    busiest = max(map(sum, zip(*compute, strict=True)))
    return Cost(busiest, total + exchange, most, mean, exchanged, blocks * per_token)


def chunked_cost(
    problem: Problem,
    shape: Shape,
    hardware: Hardware,
    transport: str = "ring",
    inner: int = 1,
    backward: bool = False,
    head_chunks: int = 1,
) -> Cost:
    """`pass_cost` where Ulysses exchanges the busiest rank's heads in chunks, one after the other.

    A chunk is a pass of its own over its heads, so keys and values of a group that is cut go round the ring with each
    of its chunks. Backward exchanges q, k, v and out once more: twice the bytes.
    """
    if head_chunks == 1:
        return pass_cost(problem, shape, hardware, transport, inner, backward)
    split, u, tokens = (
        head_split(shape.num_heads, shape.num_kv_heads, problem.ulysses),
        problem.ulysses,
        problem.tokens,
    )
    busiest = max(split, key=lambda share: share.num_q)
    passes, in_ring = [], 0.0
    for chunk in chunk_heads(busiest, head_chunks):
        own = replace(shape, num_heads=chunk.share.num_q * u, num_kv_heads=len(chunk.share.kv) * u)
        passes.append(pass_cost(problem, own, hardware, transport, inner, backward))
        in_ring += passes[-1].total - LayerCost(own, hardware, u, backward).all_to_all(tokens)
    whole, times = LayerCost(shape, hardware, u, backward), 1 + backward
    latency = whole.all_to_all(0)
    exchange = times * (whole.all_to_all(tokens) - latency) + head_chunks * latency
    return Cost(
        sum(cost.compute for cost in passes),
        in_ring + exchange,
        tuple(map(sum, zip(*(cost.sent for cost in passes), strict=True))),
        tuple(map(sum, zip(*(cost.mean_by_step for cost in passes), strict=True))),
        times * whole.ulysses_bytes * tokens,
        max(cost.buffers for cost in passes),
    )


def sources_in(step: int, size: int, inner: int) -> list[int]:
    """Whose block each place holds in a step: the ring turns inside a node, and by a node after each turn."""
    outer, turned = divmod(step, inner)
    starts = [(node - outer) % (size // inner) * inner for node in range(size // inner)]
    return [start + (place - turned) % inner for start in starts for place in range(inner)]


@dataclass(frozen=True)
class Choice:
    """The transport to take, and why: a sentence with numbers for the log."""

    transport: str
    reason: str


_WORTH = 0.97  # gathering everything must be predicted this much faster
_SAVES = 0.7  # fetching only what is seen must leave at most this much on the wire


@functools.lru_cache(maxsize=64)
def choose_transport(
    sequence: ShardedSequence, mask: Mask, shape: Shape, inner: int = 1, hardware: Hardware = HARDWARE["cpu"]
) -> Choice:
    """The cheapest transport for a training step (forward and backward) of one layer; cached.

    A relay is the default: `ring`, or `double_ring` where `inner` cuts the ring into several. `direct` replaces it
    where it sends less and is not slower; `allgather` where it is predicted faster and the gathered keys, values and
    gradients fit into `hardware.memory_budget`.

    Raises:
        ValueError: if `inner` does not divide the ring.
    """
    size = sequence.ring_size
    if size % inner:
        raise ValueError(
            f"inner_ring_size={inner} does not divide the ring of {size}. Choose a divisor, or 1 for a plain ring."
        )
    if size == 1:
        return Choice("ring", "one place on the ring: no keys or values travel")
    relay_name = "double_ring" if 1 < inner < size else "ring"
    problem = Problem.estimate(sequence, mask, shape.num_rows)
    costs: dict[str, tuple[float, float]] = {}
    for name in (relay_name, "direct", "allgather"):
        passes = [pass_cost(problem, shape, hardware, name, inner, backward) for backward in (False, True)]
        if name == "allgather" and passes[1].buffers > hardware.memory_budget:
            continue
        costs[name] = sum(cost.total for cost in passes), sum(cost.mean_sent for cost in passes)
    best = relay_name
    if costs["direct"][1] <= _SAVES * costs[best][1] and costs["direct"][0] <= costs[best][0]:
        best = "direct"
    if "allgather" in costs and costs["allgather"][0] <= _WORTH * costs[best][0]:
        best = "allgather"
    listed = ", ".join(
        f"{name} {format_duration(seconds)} and {format_bytes(sent)}" for name, (seconds, sent) in costs.items()
    )
    reason = f"predicted per layer and step, time and bytes a rank sends ({hardware.name}): {listed}"
    if "allgather" not in costs:
        reason += f"; allgather would hold more than {format_bytes(hardware.memory_budget)}"
    return Choice(best, reason)
