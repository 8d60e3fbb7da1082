"""Blocks fetched from their owners: each rank gets only the keys it sees, and their gradients go straight home.

What a rank sees of another's shard both of them compute (`geometry.needed`), so nobody asks. A sliding window costs
its own width at each border, packed documents inside one rank cost nothing.

Letters: B batch, K key/value heads, C tokens of this rank, D head dim.
"""

import torch

from ..geometry import Plan, Slice
from ..kernels import Sum, accumulate_dtype
from .transport import GRADIENTS, KEYS_AND_VALUES, Exchange, Packed, Ring

Block = tuple[Slice, ...]


def _length(block: Block) -> int:
    return sum(part.stop - part.start for part in block)


def _pick(k_BKCD: torch.Tensor, v_BKCD: torch.Tensor, block: Block) -> Packed:
    """A copy of the tokens of a block that this rank owns, one slice after the other."""
    packed = Packed.like(k_BKCD, v_BKCD, _length(block), k_BKCD.dtype)
    place = 0
    for part in block:
        for copy, x in ((packed.first, k_BKCD), (packed.second, v_BKCD)):
            copy[:, :, place : place + part.stop - part.start] = x[:, :, part.start : part.stop]
        place += part.stop - part.start
    return packed


class Blocks:
    """Keys and values, fetched one step ahead of their use."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, plan: Plan, ring: Ring, overlap: bool) -> None:
        self._own, self._plan, self._ring, self._overlap = (k, v), plan, ring, overlap
        self._here: Packed | None = None
        self._exchange: Exchange | None = None
        self._next: Packed | None = None

    def post(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Starts fetching the next step's block and sending what others need of this rank's; returns this step's."""
        k, v = self._own
        if step + 1 < len(self._plan.steps):
            theirs, mine = self._plan.lent[step + 1], self._plan.steps[step + 1].block
            sent = _pick(k, v, theirs).flat if theirs else None
            self._next = Packed.like(k, v, _length(mine), k.dtype)
            to, source = self._plan.ahead(0, step + 1), self._plan.ahead(0, -(step + 1))
            receive = self._next.flat if mine else None
            self._exchange = self._ring.post(sent, to, receive, source, KEYS_AND_VALUES)
            if not self._overlap:
                self._exchange.wait()
        return (self._here.first, self._here.second) if self._here is not None else (k, v)

    def wait(self, step: int) -> None:
        """The block of the next step is here."""
        if self._exchange is not None:
            self._exchange.wait()
        self._here, self._next, self._exchange = self._next, None, None


class Gradients:
    """dK and dV, sent to the owner of their keys after each step and added there while the next one is computed."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, plan: Plan, ring: Ring, overlap: bool) -> None:
        self._like, self._plan, self._ring, self._overlap = (k, v), plan, ring, overlap
        self._dtype = accumulate_dtype(k.dtype)
        self._own = Sum(k, self._dtype), Sum(v, self._dtype)
        self._outgoing: Packed | None = None
        self._coming: tuple[Exchange, Packed, Block] | None = None

    def share(self, step: int) -> tuple[Sum, Sum]:
        """Empty sums for what this rank adds to the dK and dV of the block at hand."""
        if step == 0:
            return self._own
        k, v = self._like
        outgoing = Packed.like(k, v, _length(self._plan.steps[step].block), self._dtype)
        outgoing.flat.zero_()
        self._outgoing = outgoing
        return Sum(k, self._dtype, lambda: outgoing.first), Sum(v, self._dtype, lambda: outgoing.second)

    def send(self, step: int) -> None:
        """After a step: sends its sums home, and adds up what came home during it."""
        self._add()
        if step == 0:
            return
        assert self._outgoing is not None
        theirs, mine = self._plan.steps[step].block, self._plan.lent[step]
        k, v = self._like
        receive = Packed.like(k, v, _length(mine), self._dtype)
        to, source = self._plan.ahead(0, -step), self._plan.ahead(0, step)
        exchange = self._ring.post(
            self._outgoing.flat if theirs else None, to, receive.flat if mine else None, source, GRADIENTS
        )
        self._outgoing = None
        if not self._overlap:
            exchange.wait()
        self._coming = exchange, receive, mine

    def _add(self) -> None:
        if self._coming is None:
            return
        exchange, receive, block = self._coming
        exchange.wait()
        self._coming = None
        for own, grad in zip(self._own, (receive.first, receive.second), strict=True):
            place = 0
            for part in block:
                own.add_tokens(part.start, grad[:, :, place : place + part.stop - part.start])
                place += part.stop - part.start

    def home(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`(dk, dv)` of this rank's own keys in their dtype, summed over all ranks and rounded once."""
        self._add()
        dk, dv = (own.total.to(x.dtype) for own, x in zip(self._own, self._like, strict=True))
        return dk, dv
