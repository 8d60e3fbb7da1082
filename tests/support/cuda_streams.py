"""A model of CUDA streams and NCCL, on which the real transports run without a GPU.

`record` runs the host program of every rank to its end, one after the other, as a host that is infinitely ahead of its
device: every tensor operation, copy and exchange becomes a node of a stream. Streams run their nodes in order and wait
for one another only through events; an exchange waits for the stream that is current when it starts, and `Work.wait`
makes the then current stream wait. Two checks read the recording:

* `races`: by vector clocks, every two accesses to the same memory, one of them a write, must be ordered by a chain of
  streams and events. Allocating and freeing write, on the stream of the allocation: the caching allocator gives freed
  memory to the next user there, unless `record_stream` named the other streams. Without a race, every schedule that
  CUDA may choose computes the same.
* `replay.Replay`: executes the nodes of all ranks in any order they allow, optionally one exchange at a time per
  device, in the order of launches.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ring_hf.parallel import buffers, streams, transport

Clock = dict[int, int]
POISONED = buffers.Pool.acquire  # as the harness has made it: the poison would be written without a wait
ACQUIRE = getattr(POISONED, "__wrapped__", POISONED)


def _maximum(first: Clock, second: Clock) -> Clock:
    return {stream: max(first.get(stream, 0), second.get(stream, 0)) for stream in {*first, *second}}


@dataclass(eq=False)
class Node:
    """One operation of a stream.

    Attributes:
        launch: number of operations that the host program queued before it.
        ends: of an exchange: (kind, channel, tensor).
    """

    rank: int
    stream: int
    index: int
    launch: int
    label: str
    clock: Clock
    after: set["Node"]
    run: Callable[[], None] | None = None
    ends: list[tuple[str, Any, Any]] = field(default_factory=list)

    def follows(self, other: "Node") -> bool:
        """Return whether every schedule runs `other` first."""
        return self.clock.get(other.stream, 0) >= other.index


@dataclass(eq=False)
class Access:
    node: Node
    writes: bool
    label: str


class Stream:
    def __init__(self, machine: "Machine", name: str) -> None:
        machine.num_streams += 1
        self.machine, self.name, self.number = machine, name, machine.num_streams
        self.clock: Clock = {}
        self.after: set[Node] = set()

    def wait_event(self, event: "Event") -> None:
        self.machine.notice_freed()
        self.clock = _maximum(self.clock, event.clock)
        self.after |= event.after

    def add(self, label: str, run: Callable[[], None] | None = None) -> Node:
        machine = self.machine
        self.clock[self.number] = index = self.clock.get(self.number, 0) + 1
        node = Node(machine.rank, self.number, index, len(machine.nodes), label, dict(self.clock), self.after, run)
        self.after = {node}
        machine.nodes.append(node)
        return node


class Event:
    def __init__(self) -> None:
        self.clock: Clock = {}
        self.after: set[Node] = set()

    def record(self, stream: Stream) -> None:
        self.clock, self.after = dict(stream.clock), set(stream.after)


class Cuda:
    """The functions of `torch.cuda` that `CudaCommStream` calls, for the rank whose program runs."""

    Event = Event

    def __init__(self, machine: "Machine") -> None:
        self._machine = machine

    def Stream(self, device: torch.device) -> Stream:
        return Stream(self._machine, "side")

    def current_stream(self, device: torch.device) -> Stream:
        return self._machine.current

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._machine.current = self._machine.current, stream
        yield
        self._machine.current = before


class Machine(TorchDispatchMode):
    """The device of one rank while its program runs.

    Args:
        hold: keep all memory, so that the recording can be replayed.
        torch_holds: torch records its own streams on the tensors of its exchanges, as it does for messages; otherwise
            only our own code keeps them.
    """

    def __init__(self, rank: int, size: int, hold: bool, torch_holds: bool) -> None:
        super().__init__()
        self.rank, self.size, self.hold, self.torch_holds = rank, size, hold, torch_holds
        self.num_streams = rank * 1000
        self.nodes: list[Node] = []
        self.label = ""  # of the operations that are queued now
        self.part = ""  # of the program that runs, for the labels of exchanges
        self.current = self.compute = Stream(self, "compute")
        self.groups: dict[str, Stream] = {}
        self.accesses: dict[int, list[Access]] = {}
        self._live: dict[
            int, tuple[int, StorageWeakRef, Stream]
        ] = {}  # by address: token, weak reference, stream of the allocation
        self._tokens = 0
        self._shared: dict[int, set[Stream]] = {}  # by token: streams that record_stream named
        self.stream = streams.CudaCommStream(torch.device("cpu"), Cuda(self))
        self.pool = buffers.Pool(torch.device("cpu"), self.stream)

    def token(self, x: torch.Tensor) -> int:
        storage = x.untyped_storage()
        entry = self._live.get(storage._cdata)
        if entry is None or entry[1].expired():
            self._tokens += 1
            entry = self._live[storage._cdata] = self._tokens, StorageWeakRef(storage), self.current
        return entry[0]

    def touch(self, node: Node, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> None:
        for tensors, kind in ((reads, False), (writes, True)):
            for x in tensors:
                self.accesses.setdefault(self.token(x), []).append(Access(node, kind, node.label))

    def share(self, x: torch.Tensor, stream: Stream) -> None:
        self._shared.setdefault(self.token(x), set()).add(stream)

    def notice_freed(self) -> None:
        """Record a write to memory whose last tensor is gone: the next operation of its stream may reuse it."""
        for address, (token, reference, home) in list(self._live.items()):
            if not reference.expired():
                continue
            del self._live[address]
            clock = dict(home.clock)
            for stream in self._shared.pop(token, ()):
                clock = _maximum(clock, stream.clock)
            freed = Node(self.rank, home.number, clock.get(home.number, 0), len(self.nodes), "freed", clock, set())
            self.accesses.setdefault(token, []).append(Access(freed, True, "freed"))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.notice_freed()
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        written = [
            x
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for x in tree_leaves(value)
        ] + ([kwargs["out"]] if "out" in kwargs else [])
        addresses = {x.untyped_storage()._cdata for x in inputs}
        fresh = [x for x in outputs if x.untyped_storage()._cdata not in addresses]
        if not written and not fresh:
            return result  # a view
        node = self.current.add(self.label or str(func))
        self.touch(node, inputs, [*written, *fresh])
        if self.hold:
            node.run = _rerun(func, args, kwargs, None if written else outputs)
        return result

    def exchange(self, group: str, label: str, ends: list[tuple[str, Any, Any]]) -> "Work":
        self.notice_freed()
        if group not in self.groups:
            self.groups[group] = Stream(self, group)
        queue, event = self.groups[group], Event()
        event.record(self.current)
        queue.wait_event(event)
        node = queue.add(f"exchange {self.part}{label}")
        self.touch(
            node,
            [x for kind, _, x in ends if kind != "receive"],
            [x for kind, _, x in ends if kind != "send"],
        )
        for _, _, x in ends if self.torch_holds else ():
            self.share(x, queue)
        node.ends = ends if self.hold else []
        return Work(self, queue)


def _rerun(func: Any, args: tuple, kwargs: dict, outputs: list[torch.Tensor] | None) -> Callable[[], None]:
    def run() -> None:
        values = tree_leaves(func(*args, **kwargs))
        for x, value in zip(outputs or (), values, strict=False):
            x.copy_(value)

    return run


class Work:
    """Like NCCL's: waiting does not block the host and keeps no memory alive."""

    def __init__(self, machine: Machine, queue: Stream) -> None:
        self._machine, self._event = machine, Event()
        self._event.record(queue)

    def wait(self) -> None:
        self._machine.current.wait_event(self._event)


@dataclass(frozen=True)
class Group:
    size: int
    group_name: str = "everyone's"


_machine: Machine  # of the rank whose program runs


def _start(ops: list[Any]) -> list[Work]:
    ends, label = [], f"{ops[0].group.group_name} tag {ops[0].tag}"
    for op in ops:
        sends = op.op is dist.isend
        pair = (_machine.rank, op.peer) if sends else (op.peer, _machine.rank)
        ends.append(("send" if sends else "receive", (op.group.group_name, *pair), op.tensor))
    return [_machine.exchange(ops[0].group.group_name, label, ends)]


def collective(kind: str) -> Callable[..., Work]:
    """Return a collective of all ranks: "all_gather", "reduce_scatter" or "all_reduce" (in place)."""

    def post(out: torch.Tensor, x: torch.Tensor, group: Group, async_op: bool = True) -> Work:
        channel = group.group_name
        return _machine.exchange(channel, f"{channel} {kind}", [("send", channel, x), (kind, channel, out)])

    return post


@dataclass
class _Op:
    op: Any
    tensor: torch.Tensor
    peer: int
    group: Group
    tag: int


def machine() -> Machine:
    return _machine


def record(
    size: int, program: Callable[[int], Any], hold: bool = False, torch_holds: bool = False
) -> tuple[list[Machine], list[Any]]:
    """Run `program(rank)` for every rank and return the machines that recorded it and the results."""
    global _machine
    fakes = {
        "get_rank": lambda group=None: _machine.rank,
        "get_world_size": lambda group=None: size,
        "get_global_rank": lambda group, rank: rank,
        "P2POp": _Op,
        "batch_isend_irecv": _start,
    }
    transport_fakes = {
        "dedicated_group": lambda group, ranks, purpose, device: Group(size, purpose),
        "comm_stream_of": lambda device: _machine.stream,
        "pool_of": lambda device: _machine.pool,
        "_all_gather": collective("all_gather"),
        "_reduce_scatter": collective("reduce_scatter"),
    }
    machines, results = [], []
    with (
        mock.patch.multiple(dist, **fakes),
        mock.patch.multiple(transport, **transport_fakes),
        mock.patch.object(
            buffers.Pool, "acquire", ACQUIRE if buffers.Pool.acquire is POISONED else buffers.Pool.acquire
        ),
        mock.patch.object(torch.Tensor, "record_stream", lambda x, stream: _machine.share(x, stream)),
    ):
        for rank in range(size):
            _machine = Machine(rank, size, hold, torch_holds)
            with _machine:
                results.append(program(rank))
            machines.append(_machine)
    return machines, results


def races(machines: list[Machine]) -> list[str]:
    """Return every two accesses to the same memory that no chain of streams and events orders."""
    unordered = []
    for device in machines:
        for accesses in device.accesses.values():
            for n, later in enumerate(accesses):
                for earlier in accesses[:n]:
                    if (earlier.writes or later.writes) and not later.node.follows(earlier.node):
                        unordered.append(f"rank {device.rank}: {earlier.label} / {later.label}")
    return unordered
