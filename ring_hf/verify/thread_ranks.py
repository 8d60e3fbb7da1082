"""Ranks as threads of one process: a fake `torch.distributed` on which `ring_hf.parallel` runs unchanged.

It is stricter than a network: a message is read from the sender's buffer only when the receiver waits for it, and the
sender's wait ends only then, so that a buffer that is reused or read too early gives wrong numbers. A rank that raises
wakes all others. Only the functions of `torch.distributed` that `ring_hf.parallel` calls are here.
"""

import contextlib
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from ..parallel import groups, transport, ulysses

_TIMEOUT = 60.0  # seconds
_thread = threading.local()


class ThreadGroup(dist.ProcessGroup):
    """Some of the ranks, by their ranks in the whole world."""

    def __init__(self, members: Sequence[int], purpose: str = "all") -> None:
        super().__init__(0, len(members))  # type: ignore[call-arg]
        self.members, self.purpose = list(members), purpose

    @property
    def group_name(self) -> str:  # type: ignore[override]
        return f"threads {self.members} {self.purpose}"


@dataclass
class _Op:
    op: Callable[..., Any]
    tensor: torch.Tensor
    peer: int
    group: ThreadGroup
    tag: int


@dataclass
class _Message:
    tensor: torch.Tensor
    received: threading.Event


class _Send:
    def __init__(self, world: "World", message: _Message) -> None:
        self._world, self._message = world, message

    def wait(self) -> None:
        self._world.wait_until(self._message.received.wait)


class _Receive:
    def __init__(self, world: "World", channel: queue.SimpleQueue, tensor: torch.Tensor) -> None:
        self._world, self._channel, self._tensor = world, channel, tensor

    def wait(self) -> None:
        def receive(timeout: float) -> bool:
            with contextlib.suppress(queue.Empty):
                message = self._channel.get(timeout=timeout)
                assert message.tensor.shape == self._tensor.shape and message.tensor.dtype == self._tensor.dtype
                self._tensor.copy_(message.tensor)
                message.received.set()
                return True
            return False

        self._world.wait_until(receive)


class World:
    """State that the threads of one run share."""

    def __init__(self, size: int) -> None:
        self.size, self.failed = size, threading.Event()
        self.channels: dict[tuple[str, int, int, int], queue.SimpleQueue] = defaultdict(queue.SimpleQueue)
        self.rendezvous: dict[str, tuple[threading.Barrier, dict[int, Any]]] = {}
        self._lock = threading.Lock()

    def channel(self, group: ThreadGroup, sender: int, receiver: int, tag: int) -> queue.SimpleQueue:
        with self._lock:  # else two threads that miss the same key would make two queues
            return self.channels[group.group_name, sender, receiver, tag]

    def wait_until(self, attempt: Callable[[float], bool]) -> None:
        """Call `attempt(seconds)` until it succeeds.

        Raises:
            RuntimeError: if another rank has failed.
            TimeoutError: after a minute.
        """
        for timeout in (_TIMEOUT / 1000, *[_TIMEOUT / 100] * 100):
            if attempt(timeout):
                return
            if self.failed.is_set():
                raise RuntimeError("another rank failed")
        raise TimeoutError("a message did not come or was not received")

    def exchange(self, group: ThreadGroup, value: Any) -> list[Any]:
        """Return the value of every member of a group, in group order: a collective call.

        Raises:
            RuntimeError: if another rank has failed.
        """
        with self._lock:
            key = group.group_name
            if key not in self.rendezvous:
                self.rendezvous[key] = threading.Barrier(len(group.members)), {}
        barrier, values = self.rendezvous[key]
        if self.failed.is_set():
            raise RuntimeError("another rank failed")
        values[_thread.rank] = value
        barrier.wait(_TIMEOUT)
        in_group_order = [values[member] for member in group.members]
        barrier.wait(_TIMEOUT)
        return in_group_order

    def fail(self) -> None:
        with self._lock:
            self.failed.set()
            for barrier, _ in self.rendezvous.values():
                barrier.abort()


def _rank(group: ThreadGroup) -> int:
    return group.members.index(_thread.rank)


def _start(ops: list[_Op]) -> list[_Send | _Receive]:
    world: World = _thread.world
    works: list[_Send | _Receive] = []
    for op in ops:
        if op.op is dist.isend:
            message = _Message(op.tensor, threading.Event())
            world.channel(op.group, _thread.rank, op.peer, op.tag).put(message)
            works.append(_Send(world, message))
        else:
            channel = world.channel(op.group, op.peer, _thread.rank, op.tag)
            works.append(_Receive(world, channel, op.tensor))
    return works


class _Collective:
    """Completes when it is waited for, from copies of the tensors that were made when it was posted."""

    def __init__(self, finish: Callable[[], Any]) -> None:
        self._finish = finish

    def wait(self) -> None:
        self._finish()


def _all_gather(out: torch.Tensor, x: torch.Tensor, group: ThreadGroup, async_op: bool) -> _Collective:
    assert async_op
    parts = _thread.world.exchange(group, x.clone())
    return _Collective(lambda: out.copy_(torch.cat(parts)))


def _reduce_scatter(out: torch.Tensor, x: torch.Tensor, group: ThreadGroup, async_op: bool) -> _Collective:
    assert async_op
    total = torch.stack(_thread.world.exchange(group, x.clone())).sum(0)
    return _Collective(lambda: out.copy_(total.chunk(len(group.members))[_rank(group)]))


def _dedicated_group(group: ThreadGroup, ranks: Sequence[int], purpose: str, device: torch.device) -> ThreadGroup:
    return ThreadGroup([group.members[rank] for rank in ranks], purpose)


def _all_to_all(out: torch.Tensor, x: torch.Tensor, received: list[int], sent: list[int], group: ThreadGroup) -> None:
    received_parts = _thread.world.exchange(group, [part.clone() for part in x.split(sent)])
    own_parts = [parts[_rank(group)] for parts in received_parts]
    assert [part.numel() for part in own_parts] == received
    out.copy_(torch.cat(own_parts))


@contextlib.contextmanager
def threads_as_ranks() -> Iterator[Callable[[int, Callable[[int, str], Any]], list[Any]]]:
    """Yield `run(size, fn)`, which calls `fn(rank, group_name)` in `size` threads and returns results in rank order.

    `run` raises the exception of the rank that failed first.
    """
    pool = ThreadPoolExecutor(max_workers=16)
    fakes: dict[str, Any] = {
        "get_rank": _rank,
        "get_world_size": lambda group=None: len(group.members) if group else _thread.world.size,
        "get_global_rank": lambda group, rank: group.members[rank],
        "P2POp": _Op,
        "batch_isend_irecv": _start,
        "all_to_all_single": lambda out, x, received, sent, group: _all_to_all(out, x, received, sent, group),
    }

    def run(size: int, fn: Callable[[int, str], Any]) -> list[Any]:
        world = World(size)
        name = groups.register_group(ThreadGroup(range(size)))

        def run_rank(rank: int) -> Any:
            _thread.rank, _thread.world = rank, world
            try:
                return fn(rank, name)
            except BaseException:
                world.fail()
                raise

        futures = [pool.submit(run_rank, rank) for rank in range(size)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:  # the others only report that a rank failed
            followers = (RuntimeError, threading.BrokenBarrierError)
            raise next((error for error in errors if not isinstance(error, followers)), errors[0])
        return [future.result() for future in futures]

    with (
        mock.patch.multiple(dist, **fakes),
        mock.patch.multiple(
            transport, _all_gather=_all_gather, _reduce_scatter=_reduce_scatter, dedicated_group=_dedicated_group
        ),
        mock.patch.object(ulysses, "dedicated_group", _dedicated_group),
        pool,
    ):
        yield run
