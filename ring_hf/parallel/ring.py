"""Ring and double ring: blocks are passed from rank to rank. The two differ in the plan's moves alone.

Letters: B batch, K key/value heads, C tokens of this rank, D and E head dims.
"""

from dataclasses import dataclass

import torch

from ..geometry import Move, Plan
from ..kernels import GradAccumulator, accumulate_dtype
from .buffers import Buffer
from .transport import GRADIENTS, KEYS_AND_VALUES, PendingExchange, RingComm


@dataclass(frozen=True)
class RingTransport:
    """The transport of the names "ring" and "double_ring"; `comm` is None with one rank."""

    comm: RingComm | None
    overlap: bool = True

    def blocks(self, k_BKCD: torch.Tensor, v_BKCE: torch.Tensor, plan: Plan) -> "KVBlocks":
        return KVBlocks(k_BKCD, v_BKCE, plan, self)

    def gradients(self, k_BKCD: torch.Tensor, v_BKCE: torch.Tensor, plan: Plan) -> "KVGradients":
        return KVGradients(k_BKCD, v_BKCE, plan, self)

    def exchange(self, plan: Plan, move: Move, send: Buffer, receive: Buffer, tag: int) -> PendingExchange:
        """Start a move of the plan."""
        assert self.comm is not None
        to, source = plan.peer(move.outer, move.inner), plan.peer(-move.outer, -move.inner)
        between_nodes = bool(move.outer and not move.inner)
        exchange = self.comm.isend_irecv(send, to, receive, source, tag, inter_node=between_nodes)
        if not self.overlap:
            exchange.wait()
        return exchange


class KVBlocks:
    """Keys and values on their way round the ring; a buffer is reused as soon as nothing leaves from it any more."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, plan: Plan, transport: RingTransport) -> None:
        self._own, self._plan, self._transport, self._comm = (k, v), plan, transport, transport.comm
        self._blocks: dict[int, Buffer] = {}  # by step
        self._pending: dict[int, PendingExchange] = {}  # by step that needs it
        if plan.moves:
            assert self._comm is not None
            self._blocks[0] = packed = self._comm.acquire((k.shape, v.shape), k.dtype, compute=True)
            for copy, x in zip(packed.parts, self._own, strict=True):
                copy.copy_(x)
            self._comm.record_use(packed)

    def start_step(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Send the block of this step to the ranks that need it next, and return it for this step's compute."""
        block = self._blocks.get(step)
        for move in self._plan.moves:
            if move.send_step == step:
                assert block is not None and self._comm is not None
                receive = self._comm.acquire(block.shapes, block.flat.dtype)
                self._pending[move.recv_step] = self._transport.exchange(
                    self._plan, move, block, receive, KEYS_AND_VALUES
                )
        if block is None or not step:
            return self._own
        k, v = block.parts
        return k, v

    def finish_step(self, step: int) -> None:
        """Make the block of the next step available. The compute of this step is queued by now."""
        if self._comm is None:
            return
        if step and step in self._blocks:
            self._comm.record_use(self._blocks[step])
        if step + 1 in self._pending:
            exchange = self._pending.pop(step + 1)
            exchange.wait()
            assert exchange.receive is not None
            self._blocks[step + 1] = exchange.receive
        # The first block of an inner ring's turn is still being sent between nodes until the turn ends.
        leaving = {id(exchange.send) for exchange in self._pending.values()}
        finished = [index for index, block in self._blocks.items() if index <= step and id(block) not in leaving]
        for index in finished:
            self._comm.release(self._blocks.pop(index))


class KVGradients:
    """dK and dV on their way to the owner of the keys.

    A rank's sums for its own keys stay. The sum for a visiting block starts at its first stop of a turn, follows the
    block, and arrives while the next rank computes its own part.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor, plan: Plan, transport: RingTransport) -> None:
        self._like, self._plan, self._transport, self._comm = (k, v), plan, transport, transport.comm
        self._dtype = accumulate_dtype(k.dtype)
        self._own = GradAccumulator(k, self._dtype), GradAccumulator(v, self._dtype)
        self._outgoing: Buffer | None = None
        self._moves = {move.send_step: move for move in plan.gradient_moves}
        self._pending: dict[int, list[PendingExchange]] = {}

    def for_step(self, step: int) -> tuple[GradAccumulator, GradAccumulator]:
        """Return the accumulators of this rank's dK and dV for the block of this step."""
        if step == 0:
            return self._own
        k, v = self._like
        self._outgoing = None
        return GradAccumulator(k, self._dtype, lambda: self._packed().parts[0]), GradAccumulator(
            v, self._dtype, lambda: self._packed().parts[1]
        )

    def _packed(self) -> Buffer:
        if self._outgoing is None:
            self._outgoing = self._acquire(compute=True)
            self._outgoing.flat.zero_()
        return self._outgoing

    def _acquire(self, compute: bool = False) -> Buffer:
        assert self._comm is not None
        k, v = self._like
        return self._comm.acquire((k.shape, v.shape), self._dtype, compute)

    def send(self, step: int) -> None:
        """Add the sums that have arrived for this step's block to this rank's, and pass the total on."""
        if step == 0:
            return
        assert self._comm is not None
        outgoing, self._outgoing = self._packed(), None
        self._add_received(outgoing, step)
        self._comm.record_use(outgoing)
        move = self._moves[step]
        exchange = self._transport.exchange(self._plan, move, outgoing, self._acquire(), GRADIENTS)
        self._pending.setdefault(move.recv_step, []).append(exchange)

    def _add_received(self, outgoing: Buffer, step: int) -> None:
        """Add the sums that have arrived for this step, and keep no name of their buffers, which are free then."""
        for exchange in self._pending.pop(step, ()):
            outgoing.flat.add_(self._received(exchange).flat)
            self._release(exchange)

    def _received(self, exchange: PendingExchange) -> Buffer:
        exchange.wait()
        assert exchange.receive is not None
        return exchange.receive

    def _release(self, exchange: PendingExchange) -> None:
        """The received sum was added: both buffers are free."""
        assert self._comm is not None and exchange.receive is not None
        self._comm.record_use(exchange.receive)
        self._comm.release(exchange.send, exchange.receive)

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `(dk, dv)` of this rank's own keys in their dtype, summed over all ranks and rounded once."""
        (last,) = self._pending.pop(len(self._plan.steps), (None,))
        received = self._received(last).parts if last is not None else (None, None)
        assert not self._pending
        grads = []
        for own, x, others in zip(self._own, self._like, received, strict=True):
            total = own.total if others is None else own.total + others
            grads.append(total.to(x.dtype))
            del total
        if last is not None:
            self._release(last)
        return grads[0], grads[1]
