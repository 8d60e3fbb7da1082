"""Blocks fetched from their owners: a rank gets only the keys that it can see, and returns their gradients directly.

Both ends compute from the geometry which part of a shard the other one sees (`geometry.needed_kv_ranges`), so nobody
asks. A sliding window costs its own width at each border; packed documents inside one rank cost nothing.

Letters: B batch, K key/value heads, C tokens of this rank, D and E head dims.
"""

from dataclasses import dataclass

import torch

from ..geometry import Plan, Slice
from ..kernels import GradAccumulator, accumulate_dtype
from .buffers import Buffer
from .transport import GRADIENTS, KEYS_AND_VALUES, PendingExchange, RingComm, shapes_with

Block = tuple[Slice, ...]


@dataclass(frozen=True)
class DirectFetchTransport:
    """The transport of the name "direct"."""

    comm: RingComm
    overlap: bool = True

    def blocks(self, k_BKCD: torch.Tensor, v_BKCE: torch.Tensor, plan: Plan) -> "KVBlocks":
        return KVBlocks(k_BKCD, v_BKCE, plan, self)

    def gradients(self, k_BKCD: torch.Tensor, v_BKCE: torch.Tensor, plan: Plan) -> "KVGradients":
        return KVGradients(k_BKCD, v_BKCE, plan, self)


def _num_tokens(block: Block) -> int:
    return sum(part.stop - part.start for part in block)


class KVBlocks:
    """Keys and values, fetched one step before they are used."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, plan: Plan, transport: DirectFetchTransport) -> None:
        self._own, self._plan, self._comm, self._overlap = (k, v), plan, transport.comm, transport.overlap
        self._block: Buffer | None = None
        self._pending: PendingExchange | None = None
        self._inputs_ready = self._comm.stream.record_event()
        self._comm.stream.record_stream(k)
        self._comm.stream.record_stream(v)

    def start_step(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Start to fetch the next step's block and to send what others need of this rank's; return this step's."""
        if step + 1 < len(self._plan.steps):
            theirs, mine = self._plan.sends[step + 1], self._plan.steps[step + 1].block
            send, receive = self._pack(theirs), self._acquire(mine)
            to, source = self._plan.peer(0, step + 1), self._plan.peer(0, -(step + 1))
            self._pending = self._comm.isend_irecv(send, to, receive, source, KEYS_AND_VALUES)
            if not self._overlap:
                self._pending.wait()
        k, v = self._own if self._block is None else self._block.parts
        return k, v

    def _acquire(self, block: Block) -> Buffer | None:
        return self._comm.acquire(shapes_with(_num_tokens(block), *self._own), self._own[0].dtype) if block else None

    def _pack(self, block: Block) -> Buffer | None:
        """A copy of the tokens of a block that this rank owns, one slice after the other.

        Made on the communication stream: it needs the keys and values, but not what was computed since.
        """
        packed = self._acquire(block)
        if packed is None:
            return None
        with self._comm.stream.on_comm_stream((*packed.events, *self._inputs_ready)):
            offset = 0
            for part in block:
                size = part.stop - part.start
                for copy, x in zip(packed.parts, self._own, strict=True):
                    copy[:, :, offset : offset + size] = x[:, :, part.start : part.stop]
                offset += size
        return packed

    def finish_step(self, step: int) -> None:
        """Make the block of the next step available. The compute of this step is queued by now."""
        if self._block is not None:
            self._comm.record_use(self._block)
        next_block = None
        if self._pending is not None:
            self._pending.wait()
            next_block = self._pending.receive
            self._comm.release(self._pending.send)
        self._comm.release(self._block)
        self._block, self._pending = next_block, None


class KVGradients:
    """dK and dV, sent to the owner of their keys after each step and added there during the next one."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, plan: Plan, transport: DirectFetchTransport) -> None:
        self._like, self._plan, self._comm, self._overlap = (k, v), plan, transport.comm, transport.overlap
        self._dtype = accumulate_dtype(k.dtype)
        self._own = GradAccumulator(k, self._dtype), GradAccumulator(v, self._dtype)
        self._outgoing: Buffer | None = None
        self._pending: tuple[PendingExchange, Block] | None = None

    def for_step(self, step: int) -> tuple[GradAccumulator, GradAccumulator]:
        """Return the accumulators of this rank's dK and dV for the block of this step."""
        if step == 0:
            return self._own
        self._outgoing = self._acquire(self._plan.steps[step].block, compute=True)
        if self._outgoing is None:
            k, v = (x[:, :, :0] for x in self._like)
            return GradAccumulator(k, self._dtype), GradAccumulator(v, self._dtype)
        self._outgoing.flat.zero_()
        of_k, of_v = self._outgoing.parts
        k, v = self._like
        return GradAccumulator(k, self._dtype, lambda: of_k), GradAccumulator(v, self._dtype, lambda: of_v)

    def _acquire(self, block: Block, compute: bool = False) -> Buffer | None:
        shapes = shapes_with(_num_tokens(block), *self._like)
        return self._comm.acquire(shapes, self._dtype, compute) if block else None

    def send(self, step: int) -> None:
        """Send this step's sums to the owner of the keys, and add the sums that arrived during it."""
        self._add_received()
        if step == 0:
            return
        outgoing, mine = self._outgoing, self._plan.sends[step]
        if outgoing is not None:
            self._comm.record_use(outgoing)
        to, source = self._plan.peer(0, -step), self._plan.peer(0, step)
        exchange = self._comm.isend_irecv(outgoing, to, self._acquire(mine), source, GRADIENTS)
        self._outgoing = None
        if not self._overlap:
            exchange.wait()
        self._pending = exchange, mine

    def _add_received(self) -> None:
        if self._pending is None:
            return
        exchange, block = self._pending
        exchange.wait()
        self._pending = None
        if exchange.receive is not None:
            for own, grad in zip(self._own, exchange.receive.parts, strict=True):
                offset = 0
                for part in block:
                    size = part.stop - part.start
                    own.add_tokens(part.start, grad[:, :, offset : offset + size])
                    offset += size
            self._comm.record_use(exchange.receive)
        self._comm.release(exchange.send, exchange.receive)

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `(dk, dv)` of this rank's own keys in their dtype, summed over all ranks and rounded once."""
        self._add_received()
        dk, dv = (own.total.to(x.dtype) for own, x in zip(self._own, self._like, strict=True))
        return dk, dv
