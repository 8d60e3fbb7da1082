"""Blocks fetched from their owners: each rank gets only the keys it sees, and their gradients go straight home.

What a rank sees of another's shard both of them compute (`geometry.needed`), so nobody asks. A sliding window costs
its own width at each border, packed documents inside one rank cost nothing.

Letters: B batch, K key/value heads, C tokens of this rank, D head dim.
"""

import torch

from ..geometry import Plan, Slice
from ..kernels import GradAccumulator, accumulate_dtype
from .buffers import Buffer
from .transport import GRADIENTS, KEYS_AND_VALUES, PendingExchange, Ring, lengths

Block = tuple[Slice, ...]


def _length(block: Block) -> int:
    return sum(part.stop - part.start for part in block)


class Blocks:
    """Keys and values, fetched one step ahead of their use."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, plan: Plan, ring: Ring, overlap: bool) -> None:
        self._own, self._plan, self._ring, self._overlap = (k, v), plan, ring, overlap
        self._here: Buffer | None = None
        self._exchange: PendingExchange | None = None
        self._ready = ring.lane.mark()
        ring.lane.share(k)
        ring.lane.share(v)

    def post(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Starts fetching the next step's block and sending what others need of this rank's; returns this step's."""
        if step + 1 < len(self._plan.steps):
            theirs, mine = self._plan.lent[step + 1], self._plan.steps[step + 1].block
            sent, receive = self._pick(theirs), self._take(mine)
            to, source = self._plan.ahead(0, step + 1), self._plan.ahead(0, -(step + 1))
            self._exchange = self._ring.post(sent, to, receive, source, KEYS_AND_VALUES)
            if not self._overlap:
                self._exchange.wait()
        k, v = self._own if self._here is None else self._here.parts
        return k, v

    def _take(self, block: Block) -> Buffer | None:
        k, v = self._own
        return self._ring.take(lengths(k, v, _length(block)), k.dtype) if block else None

    def _pick(self, block: Block) -> Buffer | None:
        """A copy of the tokens of a block that this rank owns, one slice after the other.

        Made on the side stream: it needs the keys and values, but not what was computed since.
        """
        packed = self._take(block)
        if packed is None:
            return None
        with self._ring.lane.side((*packed.marks, *self._ready)):
            place = 0
            for part in block:
                for copy, x in zip(packed.parts, self._own, strict=True):
                    copy[:, :, place : place + part.stop - part.start] = x[:, :, part.start : part.stop]
                place += part.stop - part.start
        return packed

    def wait(self, step: int) -> None:
        """This step's compute is queued, and the block of the next step is here."""
        if self._here is not None:
            self._ring.touched(self._here)
        following = None
        if self._exchange is not None:
            self._exchange.wait()
            following = self._exchange.receive
            self._ring.give(self._exchange.send)
        self._ring.give(self._here)
        self._here, self._exchange = following, None


class Gradients:
    """dK and dV, sent to the owner of their keys after each step and added there while the next one is computed."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, plan: Plan, ring: Ring, overlap: bool) -> None:
        self._like, self._plan, self._ring, self._overlap = (k, v), plan, ring, overlap
        self._dtype = accumulate_dtype(k.dtype)
        self._own = GradAccumulator(k, self._dtype), GradAccumulator(v, self._dtype)
        self._outgoing: Buffer | None = None
        self._coming: tuple[PendingExchange, Block] | None = None

    def share(self, step: int) -> tuple[GradAccumulator, GradAccumulator]:
        """Empty sums for what this rank adds to the dK and dV of the block at hand."""
        if step == 0:
            return self._own
        self._outgoing = self._take(self._plan.steps[step].block, compute=True)
        if self._outgoing is None:
            k, v = (x[:, :, :0] for x in self._like)
            return GradAccumulator(k, self._dtype), GradAccumulator(v, self._dtype)
        self._outgoing.flat.zero_()
        of_k, of_v = self._outgoing.parts
        k, v = self._like
        return GradAccumulator(k, self._dtype, lambda: of_k), GradAccumulator(v, self._dtype, lambda: of_v)

    def _take(self, block: Block, compute: bool = False) -> Buffer | None:
        shapes = lengths(*self._like, _length(block))
        return self._ring.take(shapes, self._dtype, compute) if block else None

    def send(self, step: int) -> None:
        """After a step: sends its sums home, and adds up what came home during it."""
        self._add()
        if step == 0:
            return
        outgoing, mine = self._outgoing, self._plan.lent[step]
        if outgoing is not None:
            self._ring.touched(outgoing)
        to, source = self._plan.ahead(0, -step), self._plan.ahead(0, step)
        exchange = self._ring.post(outgoing, to, self._take(mine), source, GRADIENTS)
        self._outgoing = None
        if not self._overlap:
            exchange.wait()
        self._coming = exchange, mine

    def _add(self) -> None:
        if self._coming is None:
            return
        exchange, block = self._coming
        exchange.wait()
        self._coming = None
        if exchange.receive is not None:
            for own, grad in zip(self._own, exchange.receive.parts, strict=True):
                place = 0
                for part in block:
                    own.add_tokens(part.start, grad[:, :, place : place + part.stop - part.start])
                    place += part.stop - part.start
            self._ring.touched(exchange.receive)
        self._ring.give(exchange.send, exchange.receive)

    def home(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`(dk, dv)` of this rank's own keys in their dtype, summed over all ranks and rounded once."""
        self._add()
        dk, dv = (own.total.to(x.dtype) for own, x in zip(self._own, self._like, strict=True))
        return dk, dv
