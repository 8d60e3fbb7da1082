"""What a transport is, and the communicator all of them use: the only place that exchanges keys and values.

Messages go through `batch_isend_irecv`, the form that cannot deadlock on NCCL and posts both directions at once on
gloo, where a blocking send before the receive deadlocks. Keys/values and gradients carry different tags, because gloo
may swap two transfers of equal tag. A ring has a dedicated process group, and the moves between the inner rings
of a double ring another one, because an NCCL communicator runs one operation after the other. Everything is posted on
the communication stream (`streams.py`) and waited for before its pass ends, by all ranks in the same order.
"""

from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, Work

from ..geometry import Plan
from ..kernels import GradAccumulator
from .buffers import Buffer, pool_of
from .groups import dedicated_group
from .streams import CommStream, Events, comm_stream_of

KEYS_AND_VALUES, GRADIENTS = 1, 2
# Renamed in torch 2.13, where the old names warn.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class KVBlocks(Protocol):
    """The blocks of keys and values of one pass, in the order of the plan's steps."""

    def start_step(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Start the exchanges that overlap with this step, and return its `(k [B, K, n, D], v [B, K, n, E])`."""

    def finish_step(self, step: int) -> None:
        """Make the block of the next step available. The compute of this step is queued by now."""


class KVGradients(Protocol):
    """The gradients of the keys and values of one backward pass, summed over all ranks."""

    def for_step(self, step: int) -> tuple[GradAccumulator, GradAccumulator]:
        """Return the accumulators of this rank's dK and dV for the block of this step."""

    def send(self, step: int) -> None:
        """Send the sums of this step on, or to the owner of their keys."""

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `(dk, dv)` of this rank's own keys in their dtype, summed over all ranks and rounded once."""


class Transport(Protocol):
    """How a plan's blocks get to the rank that computes with them, and their gradients back."""

    def blocks(self, k_BKCD: torch.Tensor, v_BKCE: torch.Tensor, plan: Plan) -> KVBlocks:
        """Return the blocks of a pass over this rank's keys and values."""

    def gradients(self, k_BKCD: torch.Tensor, v_BKCE: torch.Tensor, plan: Plan) -> KVGradients:
        """Return the gradients of a backward pass."""


class PendingExchange:
    """An exchange under way. It holds its buffers, so that neither is freed or reused while bytes still move."""

    def __init__(self, stream: CommStream, works: list[Work], send: Buffer | None, receive: Buffer | None) -> None:
        self._stream, self._works, self.send, self.receive = stream, works, send, receive

    def wait(self, timeout: timedelta | None = None) -> None:
        """Make later work on the current stream see the received block, and free to overwrite the sent one.

        May be called twice (a second wait on gloo's own work would never return). A `timeout` makes the host wait.

        Raises:
            RuntimeError: if the exchange does not end in that time.
        """
        works, self._works = self._works, []
        if not works:
            return
        events = self._stream.wait_works(works[::-1], timeout)  # receive first: it may complete another rank's send
        for buffer in (self.send, self.receive):
            if buffer is not None:
                buffer.events += events


class RingComm:
    """The ranks that exchange keys and values with this one: all of `group`, or every `ulysses`-th of it.

    The first construction for a group is a collective call of the group.

    Attributes:
        rank: this process's rank in the ring.
        size: number of ring ranks.
        device: of the tensors that are exchanged.
        stream: the communication stream of that device.
    """

    def __init__(self, group: ProcessGroup, device: torch.device, ulysses: int = 1, nested: bool = False) -> None:
        self.rank, ulysses_rank = divmod(dist.get_rank(group), ulysses)
        self.size = dist.get_world_size(group) // ulysses
        ranks = range(ulysses_rank, self.size * ulysses, ulysses)
        self._group = dedicated_group(group, ranks, "ring", device)
        self._inter_node = dedicated_group(group, ranks, "between inner rings", device) if nested else self._group
        self.device, self.stream, self._pool = device, comm_stream_of(device), pool_of(device)

    def isend_irecv(
        self, send: Buffer | None, to: int, receive: Buffer | None, source: int, tag: int, inter_node: bool = False
    ) -> PendingExchange:
        """Start to send to ring rank `to` and to receive from ring rank `source`; None: nothing to move.

        `inter_node` says that both lie on other inner rings; it must be the same on both ends.
        """
        assert self.rank not in (to, source), "an exchange with oneself: a ring of one never gets here"
        group = self._inter_node if inter_node else self._group
        ops = [
            dist.P2POp(op, x.flat, dist.get_global_rank(group, peer), group, tag)
            for op, x, peer in ((dist.isend, send, to), (dist.irecv, receive, source))
            if x is not None
        ]
        with self.stream.on_comm_stream(_events_of(send, receive)):
            works = dist.batch_isend_irecv(ops) if ops else []
        return PendingExchange(self.stream, works, send, receive)

    def all_gather(self, x: torch.Tensor) -> PendingExchange:
        """Start to receive `[ring size, *x.shape]`: `x` of every rank."""
        send = self._wrap(x.contiguous())
        receive = self.acquire(((self.size, *x.shape),), x.dtype)
        with self.stream.on_comm_stream(_events_of(send, receive)):
            work = _all_gather(receive.flat, send.flat, group=self._group, async_op=True)
        return PendingExchange(self.stream, [work], send, receive)

    def reduce_scatter(self, send: Buffer) -> PendingExchange:
        """Start to receive the sum over all ranks of their `x[rank]`, for `x [ring size, ...]`, in new memory."""
        (x,) = send.parts
        receive = self._wrap(torch.empty(x.shape[1:], dtype=x.dtype, device=x.device))
        with self.stream.on_comm_stream(_events_of(send, receive)):
            work = _reduce_scatter(receive.flat, send.flat, group=self._group, async_op=True)
        return PendingExchange(self.stream, [work], send, receive)

    def acquire(self, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, compute: bool = False) -> Buffer:
        """Return a buffer for tensors of these shapes; with `compute` the current stream may write it at once."""
        buffer = self._pool.acquire(shapes, dtype)
        if compute:
            self.stream.wait_events(buffer.events)
        return buffer

    def record_use(self, buffer: Buffer) -> None:
        """Record that the last work that touches this buffer is now queued on the current stream."""
        buffer.events = self.stream.record_event()

    def release(self, *buffers: Buffer | None) -> None:
        """Release buffers whose exchanges were all waited for."""
        for buffer in buffers:
            if buffer is not None:
                self._pool.release(buffer)

    def _wrap(self, x: torch.Tensor) -> Buffer:
        """A tensor from outside the pool as a buffer."""
        self.stream.record_stream(x)
        return Buffer(x.view(-1), (x.shape,), self.stream.record_event())


def _events_of(*buffers: Buffer | None) -> Events:
    return tuple(event for buffer in buffers if buffer is not None for event in buffer.events)


def shapes_with(num_tokens: int, *tensors: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of tensors `[B, K, C, D]`, but with `num_tokens` tokens."""
    return tuple((*x.shape[:2], num_tokens, x.shape[3]) for x in tensors)
