"""Blocks handed on from rank to rank: ring and double ring, which differ in the plan's moves alone.

Letters: B batch, K key/value heads, C tokens of this rank, D head dim.
"""

import torch

from ..geometry import Move, Plan
from ..kernels import Sum, accumulate_dtype
from .transport import GRADIENTS, KEYS_AND_VALUES, Exchange, Packed, Ring


def _post(
    ring: Ring | None, plan: Plan, move: Move, send: torch.Tensor, receive: torch.Tensor, tag: int, overlap: bool
) -> Exchange:
    assert ring is not None
    to, source = plan.ahead(move.outer, move.inner), plan.ahead(-move.outer, -move.inner)
    exchange = ring.post(send, to, receive, source, tag)
    if not overlap:
        exchange.wait()
    return exchange


class Blocks:
    """Keys and values travelling forward; a buffer is used again as soon as nothing leaves from it any more."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, plan: Plan, ring: Ring | None, overlap: bool) -> None:
        self._own, self._plan, self._ring, self._overlap = (k, v), plan, ring, overlap
        self._left = len(plan.moves)
        self._held = {0: Packed.of(k, v)} if plan.moves else {}  # by step
        self._coming: dict[int, tuple[Exchange, Packed, Packed]] = {}  # by step: from which buffer, into which
        self._free: list[Packed] = []

    def post(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sends the block of this step to those that need it next, and returns it for this step's compute."""
        here = self._held.get(step)
        for move in self._plan.moves:
            if move.posted == step:
                assert here is not None
                there = self._free.pop() if self._free else Packed(*here.shapes, here.flat.dtype, here.flat.device)
                exchange = _post(self._ring, self._plan, move, here.flat, there.flat, KEYS_AND_VALUES, self._overlap)
                self._coming[move.due] = exchange, here, there
                self._left -= 1
        return (here.first, here.second) if here is not None and step else self._own

    def wait(self, step: int) -> None:
        """The block of the next step is here."""
        if step + 1 in self._coming:
            exchange, _, there = self._coming.pop(step + 1)
            exchange.wait()
            self._held[step + 1] = there
        # The block that a turn began with goes on leaving until the turn ends.
        leaving = {id(here) for _, here, _ in self._coming.values()}
        for done in [n for n, packed in self._held.items() if n <= step and id(packed) not in leaving]:
            self._free.append(self._held.pop(done))
        del self._free[self._left :]


class Gradients:
    """dK and dV on their way home.

    A rank's share for its own keys stays. The sum for a visiting block starts at its first stop of a turn, follows
    the block, and arrives while the next rank computes its own share.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor, plan: Plan, ring: Ring | None, overlap: bool) -> None:
        self._like, self._plan, self._ring, self._overlap = (k, v), plan, ring, overlap
        self._dtype = accumulate_dtype(k.dtype)
        self._own = Sum(k, self._dtype), Sum(v, self._dtype)
        self._outgoing: Packed | None = None
        self._moves = {move.posted: move for move in plan.gradient_moves}
        self._coming: dict[int, list[Exchange]] = {}

    def share(self, step: int) -> tuple[Sum, Sum]:
        """Empty sums for what this rank adds to the dK and dV of the block at hand."""
        if step == 0:
            return self._own
        k, v = self._like
        self._outgoing = None
        return Sum(k, self._dtype, lambda: self._packed().first), Sum(v, self._dtype, lambda: self._packed().second)

    def _packed(self) -> Packed:
        if self._outgoing is None:
            k, v = self._like
            self._outgoing = Packed(k.shape, v.shape, self._dtype, k.device)
            self._outgoing.flat.zero_()
        return self._outgoing

    def send(self, step: int) -> None:
        """After a step: adds what has come for its block and passes the sum on."""
        if step == 0:
            return
        outgoing, self._outgoing = self._packed(), None
        for exchange in self._coming.pop(step, ()):
            outgoing.flat.add_(exchange.wait())
        move = self._moves[step]
        receive = torch.empty_like(outgoing.flat)
        exchange = _post(self._ring, self._plan, move, outgoing.flat, receive, GRADIENTS, self._overlap)
        self._coming.setdefault(move.due, []).append(exchange)

    def home(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`(dk, dv)` of this rank's own keys in their dtype, summed over all ranks and rounded once."""
        last = self._coming.pop(len(self._plan.steps), None)
        arrived = last[0].wait() if last else None
        assert not self._coming
        grads, place = [], 0
        for own, x in zip(self._own, self._like, strict=True):
            total = own.total
            if arrived is not None:
                total = total + arrived[place : place + x.numel()].view(x.shape)
                place += x.numel()
            grads.append(total.to(x.dtype))
            del total
        return grads[0], grads[1]
