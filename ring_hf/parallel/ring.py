"""Blocks handed on from rank to rank: ring and double ring, which differ in the plan's moves alone.

Letters: B batch, K key/value heads, C tokens of this rank, D head dim.
"""

import torch

from ..geometry import Move, Plan
from ..kernels import GradAccumulator, accumulate_dtype
from .buffers import Buffer
from .transport import GRADIENTS, KEYS_AND_VALUES, PendingExchange, Ring


def _post(
    ring: Ring | None, plan: Plan, move: Move, send: Buffer, receive: Buffer, tag: int, overlap: bool
) -> PendingExchange:
    assert ring is not None
    to, source = plan.ahead(move.outer, move.inner), plan.ahead(-move.outer, -move.inner)
    exchange = ring.post(send, to, receive, source, tag, between=bool(move.outer and not move.inner))
    if not overlap:
        exchange.wait()
    return exchange


class Blocks:
    """Keys and values travelling forward; a buffer is used again as soon as nothing leaves from it any more."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, plan: Plan, ring: Ring | None, overlap: bool) -> None:
        self._own, self._plan, self._ring, self._overlap = (k, v), plan, ring, overlap
        self._held: dict[int, Buffer] = {}  # by step
        self._coming: dict[int, PendingExchange] = {}  # by step that needs it
        if plan.moves:
            assert ring is not None
            self._held[0] = packed = ring.take((k.shape, v.shape), k.dtype, compute=True)
            for copy, x in zip(packed.parts, self._own, strict=True):
                copy.copy_(x)
            ring.touched(packed)

    def post(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sends the block of this step to those that need it next, and returns it for this step's compute."""
        here = self._held.get(step)
        for move in self._plan.moves:
            if move.posted == step:
                assert here is not None and self._ring is not None
                there = self._ring.take(here.shapes, here.flat.dtype)
                self._coming[move.due] = _post(
                    self._ring, self._plan, move, here, there, KEYS_AND_VALUES, self._overlap
                )
        if here is None or not step:
            return self._own
        k, v = here.parts
        return k, v

    def wait(self, step: int) -> None:
        """This step's compute is queued, and the block of the next step is here."""
        if self._ring is None:
            return
        if step and step in self._held:
            self._ring.touched(self._held[step])
        if step + 1 in self._coming:
            exchange = self._coming.pop(step + 1)
            exchange.wait()
            assert exchange.receive is not None
            self._held[step + 1] = exchange.receive
        # The block that a turn began with goes on leaving until the turn ends.
        leaving = {id(exchange.send) for exchange in self._coming.values()}
        for done in [n for n, block in self._held.items() if n <= step and id(block) not in leaving]:
            self._ring.give(self._held.pop(done))


class Gradients:
    """dK and dV on their way home.

    A rank's share for its own keys stays. The sum for a visiting block starts at its first stop of a turn, follows
    the block, and arrives while the next rank computes its own share.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor, plan: Plan, ring: Ring | None, overlap: bool) -> None:
        self._like, self._plan, self._ring, self._overlap = (k, v), plan, ring, overlap
        self._dtype = accumulate_dtype(k.dtype)
        self._own = GradAccumulator(k, self._dtype), GradAccumulator(v, self._dtype)
        self._outgoing: Buffer | None = None
        self._moves = {move.posted: move for move in plan.gradient_moves}
        self._coming: dict[int, list[PendingExchange]] = {}

    def share(self, step: int) -> tuple[GradAccumulator, GradAccumulator]:
        """Empty sums for what this rank adds to the dK and dV of the block at hand."""
        if step == 0:
            return self._own
        k, v = self._like
        self._outgoing = None
        return GradAccumulator(k, self._dtype, lambda: self._packed().parts[0]), GradAccumulator(
            v, self._dtype, lambda: self._packed().parts[1]
        )

    def _packed(self) -> Buffer:
        if self._outgoing is None:
            self._outgoing = self._take(compute=True)
            self._outgoing.flat.zero_()
        return self._outgoing

    def _take(self, compute: bool = False) -> Buffer:
        assert self._ring is not None
        k, v = self._like
        return self._ring.take((k.shape, v.shape), self._dtype, compute)

    def send(self, step: int) -> None:
        """After a step: adds what has come for its block and passes the sum on."""
        if step == 0:
            return
        assert self._ring is not None
        outgoing, self._outgoing = self._packed(), None
        self._add_arrived(outgoing, step)
        self._ring.touched(outgoing)
        move = self._moves[step]
        exchange = _post(self._ring, self._plan, move, outgoing, self._take(), GRADIENTS, self._overlap)
        self._coming.setdefault(move.due, []).append(exchange)

    def _add_arrived(self, outgoing: Buffer, step: int) -> None:
        for exchange in self._coming.pop(step, ()):
            outgoing.flat.add_(self._arrived(exchange).flat)
            self._done(exchange)

    def _arrived(self, exchange: PendingExchange) -> Buffer:
        exchange.wait()
        assert exchange.receive is not None
        return exchange.receive

    def _done(self, exchange: PendingExchange) -> None:
        """What came was added up: both buffers are free."""
        assert self._ring is not None and exchange.receive is not None
        self._ring.touched(exchange.receive)
        self._ring.give(exchange.send, exchange.receive)

    def home(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`(dk, dv)` of this rank's own keys in their dtype, summed over all ranks and rounded once."""
        (last,) = self._coming.pop(len(self._plan.steps), (None,))
        arrived = self._arrived(last).parts if last is not None else (None, None)
        assert not self._coming
        grads = []
        for own, x, coming in zip(self._own, self._like, arrived, strict=True):
            total = own.total if coming is None else own.total + coming
            grads.append(total.to(x.dtype))
            del total
        if last is not None:
            self._done(last)
        return grads[0], grads[1]
