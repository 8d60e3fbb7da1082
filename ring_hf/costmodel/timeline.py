"""When messages and compute of one attention pass end: a clock per rank, a queue per link.

A step begins when the step before is done and its block has arrived; a message begins when both sides have posted it
and the sender's link is free, and takes latency + bytes / bandwidth. Links inside a node and between nodes are
separate.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..geometry.heads import head_split
from ..geometry.plan import Move, Plan
from .devices import BACKWARD_FLOPS_RATIO, Hardware, Shape
from .work_matrices import Matrix


class LayerCost:
    """Seconds and bytes of the parts of a pass, for one rank's share of the heads.

    Attributes:
        seconds_per_pair: compute time of a visible pair.
        launch_overhead: seconds that a step with work costs whatever its size.
        merge_seconds_per_token: time to merge a query's partial result.
        kv_bytes, grad_bytes: bytes of a token's keys and values, and of their gradients.
        ulysses_bytes: bytes that a rank sends in Ulysses' exchanges per token of the ring rank.
    """

    def __init__(self, shape: Shape, hardware: Hardware, ulysses: int, backward: bool) -> None:
        shares = head_split(shape.num_heads, shape.num_kv_heads, ulysses)
        num_heads = max(share.num_q for share in shares)
        num_kv_heads = max(len(share.kv) for share in shares)
        dims = shape.head_dim + shape.v_head_dim
        slowdown = hardware.full_precision if shape.bytes_per_element >= 4 else 1.0
        flops = hardware.backward_flops if backward else hardware.flops
        ratio = BACKWARD_FLOPS_RATIO if backward else 1.0
        self.hardware, self.ulysses = hardware, ulysses
        self.seconds_per_pair = 2 * num_heads * dims * ratio * slowdown / flops
        self.launch_overhead = hardware.launch_overhead
        self.merge_seconds_per_token = (
            3 * 4 * shape.num_rows * num_heads * shape.v_head_dim / hardware.memory_bandwidth
        )
        self.kv_bytes = shape.num_rows * num_kv_heads * dims * shape.bytes_per_element
        self.grad_bytes = shape.num_rows * num_kv_heads * dims * max(4, shape.bytes_per_element)
        kv_copies = sum(len(share.kv) for share in shares)
        num_elements = shape.num_heads * dims + kv_copies * dims
        self.ulysses_bytes = shape.num_rows * num_elements * shape.bytes_per_element * (ulysses - 1) / ulysses**2
        self._nodes: list[tuple[int, int]] = []

    def compute_seconds(self, pairs: int, queries: float) -> float:
        """Return the time to compute `pairs` visible pairs and to merge the results of `queries` queries."""
        if not pairs:
            return 0.0
        return pairs * self.seconds_per_pair + self.launch_overhead + queries * self.merge_seconds_per_token

    def nodes(self, ring_size: int) -> list[tuple[int, int]]:
        """Return for each ring rank the nodes of its first and its last rank.

        A message between ring ranks whose pairs differ leaves its node.
        """
        if len(self._nodes) != ring_size:
            node_size, u = self.hardware.ranks_per_node, self.ulysses
            self._nodes = [(rank * u // node_size, (rank * u + u - 1) // node_size) for rank in range(ring_size)]
        return self._nodes

    def message_seconds(self, num_bytes: float, is_inter_node: bool) -> float:
        h = self.hardware
        if is_inter_node:
            return h.network_latency + num_bytes / h.network_bandwidth
        return h.node_latency + num_bytes / h.node_bandwidth

    def collective_seconds(self, num_bytes: float, ring_size: int) -> float:
        """Return the time of a ring collective in which every ring rank sends `num_bytes` in all.

        It uses every network card of a node.
        """
        h = self.hardware
        num_cards = max(1, min(h.ranks_per_node // self.ulysses, ring_size))
        is_inter_node = len(set(self.nodes(ring_size))) > 1
        bandwidth = min(h.node_bandwidth, h.network_bandwidth * num_cards) if is_inter_node else h.node_bandwidth
        latency = h.network_latency if is_inter_node else h.node_latency
        return (ring_size - 1) * latency + num_bytes / (bandwidth * h.collective_efficiency)

    def all_to_all_seconds(self, tokens: int) -> float:
        """Return the time of Ulysses' two exchanges for `tokens` of the ring shard: heads out, results back."""
        if self.ulysses == 1:
            return 0.0
        h, num_bytes = self.hardware, self.ulysses_bytes * tokens
        outside = max(0, self.ulysses - h.ranks_per_node) / max(1, self.ulysses - 1)  # share of peers on other nodes
        inter_node = outside * num_bytes / h.network_bandwidth + (2 * h.network_latency if outside else 0.0)
        intra_node = (1 - outside) * num_bytes / (h.node_bandwidth * h.collective_efficiency)
        return 2 * h.node_latency + intra_node + inter_node


class Route:
    """The target of each ring rank's message, whether it is on another node, and the rank it receives from."""

    def __init__(self, layer: LayerCost, targets: Sequence[int]) -> None:
        nodes = layer.nodes(len(targets))
        self.targets = targets
        self.is_inter_node = [nodes[target] != node for node, target in zip(nodes, targets, strict=True)]
        self.links = [rank + len(nodes) * is_inter_node for rank, is_inter_node in enumerate(self.is_inter_node)]
        self.sources = sorted(range(len(targets)), key=targets.__getitem__)

    def seconds(self, layer: LayerCost, num_bytes: Sequence[float]) -> list[float]:
        """Return the time of each rank's message; 0 for one without bytes."""
        return [
            layer.message_seconds(n, is_inter_node) if n else 0.0
            for n, is_inter_node in zip(num_bytes, self.is_inter_node, strict=True)
        ]


class LinkClock:
    """When every rank is done with the current step, and when every rank's links are free again, in seconds."""

    def __init__(self, size: int) -> None:
        self.now = [0.0] * size
        self.link_free = [0.0] * (2 * size)  # links inside the node, then links to other nodes
        self._arrivals: dict[int, list[float]] = {}  # by the step that needs the messages

    def send(self, seconds: Sequence[float], route: Route, recv_step: int) -> None:
        """Every rank sends to its target, which needs the message for `recv_step`; 0 seconds: it sends nothing."""
        now, link_free = self.now, self.link_free
        both_ready = map(max, now, [now[target] for target in route.targets])
        started = map(max, both_ready, [link_free[link] for link in route.links])
        done = list(map(operator.add, started, seconds))
        if not all(seconds):
            done = [end if duration else 0.0 for end, duration in zip(done, seconds, strict=True)]
        for link, end in zip(route.links, done, strict=True):
            if end:
                link_free[link] = end
        # Both sides wait: the sender for its buffer, the receiver for its block.
        received = [done[source] for source in route.sources]
        earlier = self._arrivals.get(recv_step, received)
        self._arrivals[recv_step] = list(map(max, earlier, done, received))

    def wait(self, recv_step: int) -> None:
        """Every rank waits for the messages that it needs for `recv_step`."""
        if recv_step in self._arrivals:
            self.now = list(map(max, self.now, self._arrivals.pop(recv_step)))

    def compute(self, seconds: Sequence[float]) -> None:
        """Every rank computes."""
        self.now = list(map(operator.add, self.now, seconds))


@dataclass(frozen=True)
class PassTimes:
    """Seconds until the last rank has its result; per step the most and the mean bytes that a rank sends."""

    seconds: float
    max_sent: tuple[float, ...]
    mean_sent: tuple[float, ...]


def simulate_ring(layer: LayerCost, tokens: int, plan: Plan, compute: list[list[float]], backward: bool) -> PassTimes:
    """Simulate a pass in which blocks of `tokens` are passed from rank to rank.

    Args:
        plan: any ring rank's; only its moves count.
        compute: `[step][ring rank]`, seconds.
    """
    size, num_steps = plan.num_ranks, len(plan.steps)
    kv_clock, grad_clock = LinkClock(size), LinkClock(size)
    grad_clock.link_free = kv_clock.link_free
    sent = [0.0] * num_steps

    kv_moves: dict[int, list[Move]] = {step: [] for step in range(num_steps)}
    for move in plan.moves:
        kv_moves[move.send_step].append(move)
    grad_moves = {move.send_step: move for move in plan.gradient_moves} if backward else {}
    routes: dict[tuple[int, int], Route] = {}
    kv_seconds: dict[tuple[int, int], list[float]] = {}
    grad_seconds: dict[tuple[int, int], list[float]] = {}
    for move in (*plan.moves, *grad_moves.values()):
        offset = move.outer, move.inner
        if offset not in routes:
            routes[offset] = Route(layer, [replace(plan, rank=rank).peer(*offset) for rank in range(size)])
            kv_seconds[offset] = routes[offset].seconds(layer, [tokens * layer.kv_bytes] * size)
            grad_seconds[offset] = routes[offset].seconds(layer, [tokens * layer.grad_bytes] * size)

    for step in range(num_steps):
        kv_clock.wait(step)
        for move in kv_moves[step]:
            offset = move.outer, move.inner
            kv_clock.send(kv_seconds[offset], routes[offset], move.recv_step)
            sent[step] += tokens * layer.kv_bytes
        kv_clock.compute(compute[step])
        if step in grad_moves:
            grad_clock.now = kv_clock.now
            grad_clock.wait(step)
            move = grad_moves[step]
            offset = move.outer, move.inner
            grad_clock.send(grad_seconds[offset], routes[offset], move.recv_step)
            sent[step] += tokens * layer.grad_bytes
            kv_clock.now = grad_clock.now
    grad_clock.now = kv_clock.now
    grad_clock.wait(num_steps)
    return PassTimes(max(grad_clock.now), tuple(sent), tuple(sent))


def simulate_direct(
    layer: LayerCost, kv_needed: Matrix, sources: list[list[int]], compute: list[list[float]], backward: bool
) -> PassTimes:
    """Simulate a pass in which every rank fetches the keys it sees from their owner and sends the gradients back.

    Args:
        kv_needed: `[ring rank][source]`, tokens.
        sources: `[step][ring rank]`, the owner of the step's block.
        compute: `[step][ring rank]`, seconds.
    """
    size, last = len(kv_needed), len(compute) - 1
    kv_clock, grad_clock = LinkClock(size), LinkClock(size)
    grad_clock.link_free = kv_clock.link_free
    max_sent, mean_sent = [], []
    for step, seconds in enumerate(compute):
        kv_clock.wait(step)
        sent = [0.0] * size
        if step < last:
            route = Route(layer, [(rank + step + 1) % size for rank in range(size)])
            num_bytes = [kv_needed[target][rank] * layer.kv_bytes for rank, target in enumerate(route.targets)]
            kv_clock.send(route.seconds(layer, num_bytes), route, step + 1)
            sent = [a + b for a, b in zip(sent, num_bytes, strict=True)]
        kv_clock.compute(seconds)
        if backward and step:
            grad_clock.now = kv_clock.now
            route = Route(layer, sources[step])
            num_bytes = [kv_needed[rank][source] * layer.grad_bytes for rank, source in enumerate(route.targets)]
            grad_clock.send(route.seconds(layer, num_bytes), route, last + 1)
            sent = [a + b for a, b in zip(sent, num_bytes, strict=True)]
        max_sent.append(max(sent))
        mean_sent.append(sum(sent) / size)
    grad_clock.now = kv_clock.now
    grad_clock.wait(last + 1)
    return PassTimes(max(grad_clock.now), tuple(max_sent), tuple(mean_sent))
