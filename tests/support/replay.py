"""Replays a recording of `tests/support/cuda_streams.py`, in any order that its streams and events allow.

An exchange starts when its stream reaches it and ends when its other ends have started; pairs are matched by order
alone, because NCCL has no tags. A schedule is a function that chooses among the nodes that may run next.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from tests.support.cuda_streams import Machine, Node


class Replay:
    """Executes a recording with `hold`, in any order its streams and events allow.

    Args:
        serial: a device runs one exchange at a time, in the order of the launches.
    """

    def __init__(self, machines: list[Machine], serial: bool = False) -> None:
        self._machines, self._serial = machines, serial
        self._done: set[Node] = set()
        self._started: set[Node] = set()
        self._partners: dict[Node, set[Node]] = {}
        self._transfers: dict[Node, list[Callable[[], None]]] = {}
        for nodes, transfer in _transfers(machines):
            for node in nodes:
                self._partners.setdefault(node, set()).update(nodes)
                self._transfers.setdefault(node, []).append(transfer)

    def run(self, choose: Callable[[list[Node]], Node]) -> int:
        """Run nodes until none is left, each time the one that `choose` takes, and return how many there were.

        Args:
            choose: returns one of the nodes that may start or end next.

        Raises:
            TimeoutError: in a deadlock, when nodes are left and none of them may run.
        """
        streams: dict[int, list[Node]] = {}
        for machine in self._machines:
            for node in machine.nodes:
                streams.setdefault(node.stream, []).append(node)
        while heads := [queue[0] for queue in streams.values() if queue]:
            ready = [node for node in heads if self._may_run(node)]
            if not ready:
                raise TimeoutError(f"deadlock at {[f'rank {node.rank}: {node.label}' for node in heads]}")
            node = choose(ready)
            if node.ends and node not in self._started:
                self._started.add(node)
                continue
            if node.run is not None:
                node.run()
            for transfer in self._transfers.get(node, ()):
                transfer()
            self._done.add(streams[node.stream].pop(0))
        return len(self._done)

    def _may_run(self, node: Node) -> bool:
        if node in self._started:
            return self._partners.get(node, set()) <= self._started and node in self._partners
        if not node.after <= self._done:
            return False
        earlier = self._machines[node.rank].nodes[: node.launch] if self._serial and node.ends else ()
        return all(other in self._done for other in earlier if other.ends)


def _transfers(machines: list[Machine]) -> Iterator[tuple[list[Node], Callable[[], None]]]:
    """Yield the nodes of each exchange and a function that copies its data.

    The first node that ends calls it: that is the latest moment that NCCL allows.
    """
    ends: dict[tuple[str, Any], list[tuple[Node, torch.Tensor]]] = {}
    for machine in machines:
        for node in machine.nodes:
            for kind, channel, x in node.ends:
                by_rank = channel if isinstance(channel, tuple) else (channel, machine.rank)
                ends.setdefault((kind, by_rank), []).append((node, x))
    for (kind, channel), received in ends.items():
        if kind == "receive":
            for (source, x), (node, out) in zip(ends.get(("send", channel), ()), received, strict=False):
                yield [source, node], _once(lambda out=out, x=x: out.copy_(x))
        elif kind != "send" and channel[1] == 0:
            members = [(channel[0], machine.rank) for machine in machines]
            for parts in zip(*(ends[kind, member] for member in members), strict=True):
                nodes = [node for node, _ in parts]
                sent = [next(x for end, _, x in node.ends if end == "send") for node in nodes]
                yield nodes, _once(lambda kind=kind, sent=sent, parts=parts: _collect(kind, sent, parts))


def _once(move: Callable[[], Any]) -> Callable[[], None]:
    moves = [move]

    def run() -> None:
        while moves:
            moves.pop()()

    return run


def _collect(kind: str, sent: list[torch.Tensor], parts: Sequence[tuple[Node, torch.Tensor]]) -> None:
    total = torch.cat(sent) if kind == "all_gather" else torch.stack(sent).sum(0)
    for rank, (_, out) in enumerate(parts):
        out.copy_(total.chunk(len(parts))[rank] if kind == "reduce_scatter" else total)


def policies(seed: int) -> dict[str, Callable[[list[Node]], Node]]:
    """Return schedules: at random, exchanges as late as possible, compute as late as possible, one rank far behind."""
    draw = random.Random(seed)

    def postpone(is_last: Callable[[Node], bool]) -> Callable[[list[Node]], Node]:
        return lambda ready: draw.choice([node for node in ready if not is_last(node)] or ready)

    return {
        "at random": draw.choice,
        "exchanges late": postpone(lambda node: node.label.startswith("exchange")),
        "compute late": postpone(lambda node: node.label.startswith("compute")),
        "rank 0 late": postpone(lambda node: node.rank == 0),
        "rank 1 late": postpone(lambda node: node.rank == 1),
    }
