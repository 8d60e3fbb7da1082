"""When messages and compute of one attention pass end: a clock per rank, a queue per link.

A step begins when the step before is done and its block has arrived; a message begins when both sides have posted it
and the sender's link is free, and takes latency + bytes / bandwidth. Links inside a node and between nodes are apart.
"""

import operator
from collections.abc import Sequence
from dataclasses import replace

from ..geometry.heads import head_split
from ..geometry.plan import Move, Plan
from .devices import BACKWARD_FLOPS_RATIO, Hardware, Shape
from .work_matrices import Matrix


class LayerCost:
    """Seconds and bytes of the parts of a pass, for one rank's share of the heads."""

    def __init__(self, shape: Shape, hardware: Hardware, ulysses: int, backward: bool) -> None:
        shares = head_split(shape.num_heads, shape.num_kv_heads, ulysses)
        heads, kv_heads = max(share.num_q for share in shares), max(len(share.kv) for share in shares)
        both = shape.head_dim + shape.v_head_dim
        slow = hardware.full_precision if shape.bytes_per_element >= 4 else 1.0
        self.hardware, self.ulysses = hardware, ulysses
        rate = hardware.backward_flops if backward else hardware.flops
        self.seconds_per_pair = 2 * heads * both * (BACKWARD_FLOPS_RATIO if backward else 1.0) * slow / rate
        self.launch_overhead = hardware.launch_overhead
        self.merge_per_token = 3 * 4 * shape.num_rows * heads * shape.v_head_dim / hardware.memory_bandwidth
        self.kv_bytes = shape.num_rows * kv_heads * both * shape.bytes_per_element
        self.grad_bytes = shape.num_rows * kv_heads * both * max(4, shape.bytes_per_element)
        sent_kv = sum(len(share.kv) for share in shares)
        elements = shape.num_heads * both + sent_kv * both
        self.ulysses_bytes = shape.num_rows * elements * shape.bytes_per_element * (ulysses - 1) / ulysses**2
        self._nodes: list[tuple[int, int]] = []

    def compute(self, pairs: int, queries: float) -> float:
        """Seconds for so many visible pairs, and for merging the result of so many queries."""
        return pairs * self.seconds_per_pair + self.launch_overhead + queries * self.merge_per_token if pairs else 0.0

    def nodes(self, places: int) -> list[tuple[int, int]]:
        """Nodes of the first and of the last rank of each place; a message between unequal ones leaves its node."""
        if len(self._nodes) != places:
            size, u = self.hardware.ranks_per_node, self.ulysses
            self._nodes = [(place * u // size, (place * u + u - 1) // size) for place in range(places)]
        return self._nodes

    def seconds(self, num_bytes: float, crosses: bool) -> float:
        h = self.hardware
        if crosses:
            return h.network_latency + num_bytes / h.network_bandwidth
        return h.node_latency + num_bytes / h.node_bandwidth

    def collective(self, num_bytes: float, places: int) -> float:
        """A ring collective in which every place sends `num_bytes` in all, over every network card of a node."""
        h = self.hardware
        cards = max(1, min(h.ranks_per_node // self.ulysses, places))
        crosses = len(set(self.nodes(places))) > 1
        bandwidth = min(h.node_bandwidth, h.network_bandwidth * cards) if crosses else h.node_bandwidth
        latency = h.network_latency if crosses else h.node_latency
        return (places - 1) * latency + num_bytes / (bandwidth * h.collective_efficiency)

    def all_to_all(self, tokens: int) -> float:
        """Ulysses' two exchanges for `tokens` of the ring shard: heads out, results back."""
        if self.ulysses == 1:
            return 0.0
        h, num_bytes = self.hardware, self.ulysses_bytes * tokens
        outside = max(0, self.ulysses - h.ranks_per_node) / max(1, self.ulysses - 1)
        crossing = outside * num_bytes / h.network_bandwidth + (2 * h.network_latency if outside else 0.0)
        return 2 * h.node_latency + (1 - outside) * num_bytes / (h.node_bandwidth * h.collective_efficiency) + crossing


class LinkClock:
    """When every rank is done with the step at hand, and when every rank's links are free again."""

    def __init__(self, size: int) -> None:
        self.now = [0.0] * size
        self.free = [0.0] * (2 * size)  # links inside the node, then links to other nodes
        self.due: dict[int, list[float]] = {}

    def post(self, seconds: Sequence[float], way: "Route", due: int) -> None:
        """Every place sends for so many seconds to its target, which needs it for step `due`; 0: it sends nothing."""
        now, free = self.now, self.free
        both = map(max, now, [now[target] for target in way.targets])
        done = list(map(operator.add, map(max, both, [free[link] for link in way.links]), seconds))
        if not all(seconds):
            done = [end if long else 0.0 for end, long in zip(done, seconds, strict=True)]
        for link, end in zip(way.links, done, strict=True):
            if end:
                free[link] = end
        # Both sides wait: the sender for its buffer, the receiver for its block.
        received = [done[source] for source in way.sources]
        before = self.due.get(due, received)
        self.due[due] = list(map(max, before, done, received))

    def wait(self, due: int) -> None:
        if due in self.due:
            self.now = list(map(max, self.now, self.due.pop(due)))

    def compute(self, seconds: Sequence[float]) -> None:
        self.now = list(map(operator.add, self.now, seconds))


class Route:
    """Where every place sends: its target, whether that lies on another node, and who sends to it."""

    def __init__(self, layer: LayerCost, targets: Sequence[int]) -> None:
        nodes = layer.nodes(len(targets))
        self.targets = targets
        self.crosses = [nodes[target] != here for here, target in zip(nodes, targets, strict=True)]
        self.links = [place + len(nodes) * crosses for place, crosses in enumerate(self.crosses)]
        self.sources = sorted(range(len(targets)), key=targets.__getitem__)

    def seconds(self, layer: LayerCost, num_bytes: Sequence[float]) -> list[float]:
        """Per place the time its message takes; 0 for one without bytes."""
        return [layer.seconds(n, link) if n else 0.0 for n, link in zip(num_bytes, self.crosses, strict=True)]


Passed = tuple[float, tuple[float, ...], tuple[float, ...]]  # seconds, and per step the most and mean bytes sent


def relay(layer: LayerCost, tokens: int, plan: Plan, compute: list[list[float]], backward: bool) -> Passed:
    """Blocks handed from rank to rank."""
    size, steps = plan.num_ranks, len(plan.steps)
    kv, grads = LinkClock(size), LinkClock(size)
    grads.free = kv.free
    sent = [0.0] * steps

    def way(move: Move) -> tuple[Route, list[float], list[float]]:
        """The way with the seconds of a block of keys and values, and of one of gradients."""
        found = Route(layer, [replace(plan, rank=place).ahead(move.outer, move.inner) for place in range(size)])
        blocks = ([tokens * per_token] * size for per_token in (layer.kv_bytes, layer.grad_bytes))
        kv, grads = (found.seconds(layer, block) for block in blocks)
        return found, kv, grads

    moves: dict[int, list[Move]] = {step: [] for step in range(steps)}
    for move in plan.moves:
        moves[move.posted].append(move)
    homewards = {move.posted: move for move in plan.gradient_moves} if backward else {}
    kinds = {(move.outer, move.inner): move for move in (*plan.moves, *homewards.values())}
    ways = {kind: way(move) for kind, move in kinds.items()}
    for step in range(steps):
        kv.wait(step)
        for move in moves[step]:
            along, seconds, _ = ways[move.outer, move.inner]
            kv.post(seconds, along, move.due)
            sent[step] += tokens * layer.kv_bytes
        kv.compute(compute[step])
        if step in homewards:
            grads.now = kv.now
            grads.wait(step)
            move = homewards[step]
            along, _, seconds = ways[move.outer, move.inner]
            grads.post(seconds, along, move.due)
            sent[step] += tokens * layer.grad_bytes
            kv.now = grads.now
    grads.now = kv.now
    grads.wait(steps)
    return max(grads.now), tuple(sent), tuple(sent)


def fetch(
    layer: LayerCost, need: Matrix, sources: list[list[int]], compute: list[list[float]], backward: bool
) -> Passed:
    """Every rank fetches what it sees of the next step's source; gradients go straight home."""
    size, last = len(need), len(compute) - 1
    clock, grads = LinkClock(size), LinkClock(size)
    grads.free = clock.free
    most, mean = [], []
    for step, seconds in enumerate(compute):
        clock.wait(step)
        sent = [0.0] * size
        if step < last:
            way = Route(layer, [(place + step + 1) % size for place in range(size)])
            amounts = [need[target][place] * layer.kv_bytes for place, target in enumerate(way.targets)]
            clock.post(way.seconds(layer, amounts), way, step + 1)
            sent = [a + b for a, b in zip(sent, amounts, strict=True)]
        clock.compute(seconds)
        if backward and step:
            grads.now = clock.now
            way = Route(layer, sources[step])
            amounts = [need[place][source] * layer.grad_bytes for place, source in enumerate(way.targets)]
            grads.post(way.seconds(layer, amounts), way, last + 1)
            sent = [a + b for a, b in zip(sent, amounts, strict=True)]
        most.append(max(sent))
        mean.append(sum(sent) / size)
    grads.now = clock.now
    grads.wait(last + 1)
    return max(grads.now), tuple(most), tuple(mean)
