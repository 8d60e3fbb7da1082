"""Ranks as threads of one process: a stand-in for `torch.distributed` that the real code runs on unchanged.

Stricter than a network: a message is read from the sender's buffer only when the receiver waits for it, and the
sender's wait ends only then, so that a buffer used again too early, or read too early, shows up as a wrong number.
A rank that raises wakes all others. Only what `ring_hf.parallel` uses of `torch.distributed` is here.
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

from ring_hf.parallel import groups, transport, ulysses

_PATIENCE = 60.0
_thread = threading.local()


class ThreadGroup(dist.ProcessGroup):
    """Some of the ranks, by their numbers in the whole world."""

    def __init__(self, members: Sequence[int], purpose: str = "all") -> None:
        super().__init__(0, len(members))
        self.members, self.purpose = list(members), purpose

    @property
    def group_name(self) -> str:
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
    taken: threading.Event


class _Send:
    def __init__(self, world: "World", message: _Message) -> None:
        self._world, self._message = world, message

    def wait(self) -> None:
        self._world.until(self._message.taken.wait)


class _Receive:
    def __init__(self, world: "World", channel: queue.SimpleQueue, tensor: torch.Tensor) -> None:
        self._world, self._channel, self._tensor = world, channel, tensor

    def wait(self) -> None:
        def take(timeout: float) -> bool:
            with contextlib.suppress(queue.Empty):
                message = self._channel.get(timeout=timeout)
                assert message.tensor.shape == self._tensor.shape and message.tensor.dtype == self._tensor.dtype
                self._tensor.copy_(message.tensor)
                message.taken.set()
                return True
            return False

        self._world.until(take)


class World:
    """Everything the threads of one run share."""

    def __init__(self, size: int) -> None:
        self.size, self.failed = size, threading.Event()
        self.channels: dict[tuple[str, int, int, int], queue.SimpleQueue] = defaultdict(queue.SimpleQueue)
        self.meetings: dict[str, tuple[threading.Barrier, dict[int, Any]]] = {}
        self._lock = threading.Lock()

    def channel(self, group: ThreadGroup, sender: int, receiver: int, tag: int) -> queue.SimpleQueue:
        with self._lock:  # two threads that miss the same key would make two queues
            return self.channels[group.group_name, sender, receiver, tag]

    def until(self, attempt: Callable[[float], bool]) -> None:
        """Tries until it succeeds; gives up when another rank has failed, or after a minute."""
        for timeout in (_PATIENCE / 1000, *[_PATIENCE / 100] * 100):
            if attempt(timeout):
                return
            if self.failed.is_set():
                raise RuntimeError("another rank failed")
        raise TimeoutError("a message did not come, or was not taken")

    def exchange(self, group: ThreadGroup, value: Any) -> list[Any]:
        """What every member of a group brings to a collective, in group order."""
        with self._lock:
            key = group.group_name
            if key not in self.meetings:
                self.meetings[key] = threading.Barrier(len(group.members)), {}
        barrier, brought = self.meetings[key]
        if self.failed.is_set():
            raise RuntimeError("another rank failed")
        brought[_thread.rank] = value
        barrier.wait(_PATIENCE)
        found = [brought[member] for member in group.members]
        barrier.wait(_PATIENCE)
        return found

    def fail(self) -> None:
        with self._lock:
            self.failed.set()
            for barrier, _ in self.meetings.values():
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
    """Done when it is waited for, from what each rank's tensor held when it was posted."""

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


def _own_group(group: ThreadGroup, ranks: Sequence[int], purpose: str, device: torch.device) -> ThreadGroup:
    return ThreadGroup([group.members[rank] for rank in ranks], purpose)


def _all_to_all(out: torch.Tensor, x: torch.Tensor, received: list[int], sent: list[int], group: ThreadGroup) -> None:
    brought = _thread.world.exchange(group, [part.clone() for part in x.split(sent)])
    mine = [parts[_rank(group)] for parts in brought]
    assert [part.numel() for part in mine] == received
    out.copy_(torch.cat(mine))


@contextlib.contextmanager
def threads_as_ranks() -> Iterator[Callable[[int, Callable[[int, str], Any]], list[Any]]]:
    """Inside, `run(size, fn)` calls `fn(rank, group name)` on `size` threads and returns the results in rank order."""
    pool = ThreadPoolExecutor(max_workers=16)
    stand_ins = {
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

        def one(rank: int) -> Any:
            _thread.rank, _thread.world = rank, world
            try:
                return fn(rank, name)
            except BaseException:
                world.fail()
                raise

        futures = [pool.submit(one, rank) for rank in range(size)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:  # the one that the others only heard of
            followers = (RuntimeError, threading.BrokenBarrierError)
            raise next((error for error in errors if not isinstance(error, followers)), errors[0])
        return [future.result() for future in futures]

    with (
        mock.patch.multiple(dist, **stand_ins),
        mock.patch.multiple(
            transport, _all_gather=_all_gather, _reduce_scatter=_reduce_scatter, dedicated_group=_own_group
        ),
        mock.patch.object(ulysses, "dedicated_group", _own_group),
        pool,
    ):
        yield run
