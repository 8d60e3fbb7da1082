"""Moving bytes between the ranks of a ring: the only place that calls `torch.distributed` for keys and values.

Messages go through `batch_isend_irecv`, the form that cannot deadlock on NCCL and posts both directions at once on
gloo, where a blocking send before the receive deadlocks. Keys/values and their gradients carry tags of their own: gloo
may swap two transfers of equal tag. A ring has a process group of its own, and the moves between the inner rings of a
double ring another, as one NCCL communicator does one thing after the other. Everything is posted on the lane's side
stream (`lanes.py`) and waited for before its pass ends, by all ranks in the same order.
"""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, Work

from .buffers import Buffer, pool_of
from .groups import dedicated_group
from .streams import CommStream, comm_stream_of

KEYS_AND_VALUES, GRADIENTS = 1, 2
# Renamed in torch 2.13, where the old names warn.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class PendingExchange:
    """One exchange under way. Holds its buffers, so that neither is freed or used again while bytes still move."""

    def __init__(self, lane: CommStream, works: list[Work], send: Buffer | None, receive: Buffer | None) -> None:
        self._lane, self._works, self.send, self.receive = lane, works, send, receive

    def wait(self, patience: timedelta | None = None) -> None:
        """Later work on the current stream finds the received block, and may overwrite the sent one.

        May be called again: a second wait on gloo's own work would wait for ever. With `patience` the host waits too.
        """
        works, self._works = self._works, []
        if not works:
            return
        marks = self._lane.finish(works[::-1], patience)  # receive first: it may end another rank's send
        for buffer in (self.send, self.receive):
            if buffer is not None:
                buffer.marks += marks


class Ring:
    """The ranks that exchange keys and values with this one: all of `group`, or every `ulysses`-th of it.

    Making one is a collective call of `group` the first time.

    Attributes:
        rank: this rank's place.
        size: number of places.
        device: of what is exchanged; `lane` orders it.
    """

    def __init__(self, group: ProcessGroup, device: torch.device, ulysses: int = 1, nested: bool = False) -> None:
        self.rank, part = divmod(dist.get_rank(group), ulysses)
        self.size = dist.get_world_size(group) // ulysses
        ranks = range(part, self.size * ulysses, ulysses)
        self._group = dedicated_group(group, ranks, "ring", device)
        self._between = dedicated_group(group, ranks, "between inner rings", device) if nested else self._group
        self.device, self.lane, self._pool = device, comm_stream_of(device), pool_of(device)

    def post(
        self, send: Buffer | None, to: int, receive: Buffer | None, source: int, tag: int, between: bool = False
    ) -> PendingExchange:
        """Starts sending to the rank `to` and receiving from the rank `source` of this ring; None: nothing to move.

        `between` says that the two lie on other inner rings; the same on both ends.
        """
        assert self.rank not in (to, source), "an exchange with oneself: a ring of one never gets here"
        group = self._between if between else self._group
        ops = [
            dist.P2POp(op, x.flat, dist.get_global_rank(group, peer), group, tag)
            for op, x, peer in ((dist.isend, send, to), (dist.irecv, receive, source))
            if x is not None
        ]
        with self.lane.side(_marks(send, receive)):
            works = dist.batch_isend_irecv(ops) if ops else []
        return PendingExchange(self.lane, works, send, receive)

    def all_gather(self, x: torch.Tensor) -> PendingExchange:
        """Starts to receive `[ring size, *x.shape]`: `x` of every rank."""
        send = self._own(x.contiguous())
        receive = self.take(((self.size, *x.shape),), x.dtype)
        with self.lane.side(_marks(send, receive)):
            work = _all_gather(receive.flat, send.flat, group=self._group, async_op=True)
        return PendingExchange(self.lane, [work], send, receive)

    def reduce_scatter(self, send: Buffer) -> PendingExchange:
        """Starts to receive the sum over all ranks of their `x[rank]`, for `x [ring size, ...]`, in new memory."""
        (x,) = send.parts
        receive = self._own(torch.empty(x.shape[1:], dtype=x.dtype, device=x.device))
        with self.lane.side(_marks(send, receive)):
            work = _reduce_scatter(receive.flat, send.flat, group=self._group, async_op=True)
        return PendingExchange(self.lane, [work], send, receive)

    def take(self, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, compute: bool = False) -> Buffer:
        """A buffer; with `compute` the current stream may write it at once."""
        buffer = self._pool.take(shapes, dtype)
        if compute:
            self.lane.wait(buffer.marks)
        return buffer

    def touched(self, buffer: Buffer) -> None:
        """The current stream was given its last work so far that reads or writes this buffer."""
        buffer.marks = self.lane.mark()

    def give(self, *buffers: Buffer | None) -> None:
        """Buffers that are not needed any more, all of whose exchanges were waited for."""
        for buffer in buffers:
            if buffer is not None:
                self._pool.give(buffer)

    def _own(self, x: torch.Tensor) -> Buffer:
        """A tensor outside the pool as one that travels."""
        self.lane.share(x)
        return Buffer(x.view(-1), (x.shape,), self.lane.mark())


def _marks(*buffers: Buffer | None) -> tuple:
    return tuple(mark for buffer in buffers if buffer is not None for mark in buffer.marks)


def lengths(x: torch.Tensor, y: torch.Tensor, tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of two tensors `[B, K, C, D]`, but with so many tokens."""
    first, second = ((*z.shape[:2], tokens, z.shape[3]) for z in (x, y))
    return first, second
