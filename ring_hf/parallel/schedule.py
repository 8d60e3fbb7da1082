"""The ring schedule, forward and backward: post the next exchange, compute the tiles that are here, wait, swap.

Ring Attention (Liu et al. 2023, arXiv 2310.01889) for any layout and mask: what to compute in a step comes from the
plan alone. Backward sends the keys and values round again; a block's gradients follow it one step behind in fp32, each
rank adding its share, and go straight home after the last step that anybody needs.

Letters: B batch, H query heads, K key/value heads, C tokens of this rank, D head dim.
"""

from types import ModuleType

import torch

from ..geometry import Plan, Tile, split
from ..kernels import State, Sum, accumulate_dtype
from .transport import GRADIENTS, KEYS_AND_VALUES, Exchange, Packed, Ring


def ring_forward(
    q_BHCD: torch.Tensor,
    k_BKCD: torch.Tensor,
    v_BKCD: torch.Tensor,
    plan: Plan,
    ring: Ring | None,
    kernel: ModuleType,
    scale: float,
    overlap: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's `(out [B, H, C, D], lse [B, H, C])` in at least fp32."""
    state = State(q_BHCD, v_BKCD.shape[-1])
    blocks = _Blocks(k_BKCD, v_BKCD, plan, ring, overlap)
    # Results are as large as the shard: each is dropped before the next one is made.
    for step in plan.steps:
        k, v = blocks.post_next()
        for tile in step.tiles:
            for piece, out, lse in kernel.forward(*_cut(tile, (q_BHCD,), (k, v)), tile, scale):
                state.add(tile, piece, out, lse)
                del out, lse
        blocks.wait()
    return state.out, state.lse


def ring_backward(
    dout_BHCD: torch.Tensor,
    q_BHCD: torch.Tensor,
    k_BKCD: torch.Tensor,
    v_BKCD: torch.Tensor,
    out_BHCD: torch.Tensor,
    lse_BHC: torch.Tensor,
    plan: Plan,
    ring: Ring | None,
    kernel: ModuleType,
    scale: float,
    overlap: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This rank's `(dq, dk, dv)` in the dtypes of q, k and v, from the global `out` and `lse` of its queries."""
    dq = Sum(q_BHCD, _sum_dtype(plan, q_BHCD.dtype))
    blocks = _Blocks(k_BKCD, v_BKCD, plan, ring, overlap)
    grads = _Gradients(k_BKCD, v_BKCD, plan, ring, overlap)
    # As in forward, nothing as large as the shard is held by a name longer than it is needed.
    for hop, step in enumerate(plan.steps):
        k, v = blocks.post_next()
        dk, dv = grads.share(hop)
        for tile in step.tiles:
            pieces = kernel.backward(*_cut(tile, (dout_BHCD, q_BHCD), (k, v), (out_BHCD, lse_BHC)), tile, scale)
            for piece, piece_dq, piece_dk, piece_dv in pieces:
                dq.add(tile.row, tile.num_rows, tile.q + piece.q, piece.num_q, piece, piece_dq)
                del piece_dq
                dk.add(tile.row, tile.num_rows, tile.k + piece.k, piece.num_k, piece, piece_dk)
                dv.add(tile.row, tile.num_rows, tile.k + piece.k, piece.num_k, piece, piece_dv)
                del piece_dk, piece_dv
        del k, v, dk, dv
        blocks.wait()
        grads.send(hop)
    return dq.total.to(q_BHCD.dtype), *grads.home()


def _sum_dtype(plan: Plan, dtype: torch.dtype) -> torch.dtype:
    """fp32, unless no query gets more than two results: their sum is rounded once either way."""
    pieces = sum(len(split(tile.num_q, tile.num_k, tile.lo, tile.hi)) for step in plan.steps for tile in step.tiles)
    return accumulate_dtype(dtype) if pieces > 2 else dtype


def _queries(tile: Tile, x: torch.Tensor) -> torch.Tensor:
    return x[tile.row : tile.row + tile.num_rows, :, tile.q : tile.q + tile.num_q]


def _keys(tile: Tile, x: torch.Tensor) -> torch.Tensor:
    return x[tile.row : tile.row + tile.num_rows, :, tile.k : tile.k + tile.num_k]


def _cut(tile: Tile, queries: tuple, keys: tuple, more_queries: tuple = ()) -> tuple[torch.Tensor, ...]:
    return (
        *(_queries(tile, x) for x in queries),
        *(_keys(tile, x) for x in keys),
        *(_queries(tile, x) for x in more_queries),
    )


class _Blocks:
    """Keys and values travelling forward; two buffers take turns, and the last block is handed over for good."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, plan: Plan, ring: Ring | None, overlap: bool) -> None:
        self._ring, self._overlap, self._left = ring, overlap, plan.hops
        self._block: tuple[torch.Tensor, torch.Tensor] | None = (k, v)
        self._here = Packed.of(k, v) if plan.hops else None
        self._next = self._here.like() if self._here is not None else None
        self._exchange: Exchange | None = None

    def post_next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sends the block at hand onwards (if anybody still needs it) and returns it for this step's compute."""
        assert self._block is not None
        block = self._block
        if self._left:
            assert self._ring is not None and self._here is not None and self._next is not None
            self._exchange = self._ring.post(self._here.flat, self._next.flat, KEYS_AND_VALUES)
            if not self._overlap:
                self._exchange.wait()
        else:
            self._block = self._here = None
        return block

    def wait(self) -> None:
        """The next block is here, and the one sent is gone."""
        if self._exchange is None:
            return
        assert self._next is not None
        self._exchange.wait()
        self._exchange = None
        self._left -= 1
        self._here, self._next = self._next, self._here if self._left else None
        self._block = self._here.first, self._here.second


class _Gradients:
    """dK and dV on their way home.

    A rank's share for its own keys stays. The sum for a visiting block starts at the block's first stop, is passed on
    with each hop, arrives while this rank computes its own share, and goes home after the last stop.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor, plan: Plan, ring: Ring | None, overlap: bool) -> None:
        self._like, self._hops, self._ring, self._overlap = (k, v), plan.hops, ring, overlap
        self._dtype = accumulate_dtype(k.dtype)
        self._own = Sum(k, self._dtype), Sum(v, self._dtype)
        self._outgoing: Packed | None = None
        self._exchange: Exchange | None = None

    def share(self, hop: int) -> tuple[Sum, Sum]:
        """Empty sums for what this rank adds to the dK and dV of the block at hand."""
        if hop == 0:
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

    def send(self, hop: int) -> None:
        """After the step of `hop`: passes the block's sum on to its next holder, or home after the last one."""
        if hop == 0:
            return
        assert self._ring is not None
        outgoing, self._outgoing = self._packed(), None
        if self._exchange is not None:
            outgoing.flat.add_(self._exchange.wait())
        shift = -self._hops if hop == self._hops else 1
        self._exchange = self._ring.post(outgoing.flat, torch.empty_like(outgoing.flat), GRADIENTS, shift)
        if not self._overlap:
            self._exchange.wait()

    def home(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`(dk, dv)` of this rank's own keys in their dtype, summed over all ranks and rounded once."""
        arrived = self._exchange.wait() if self._exchange is not None else None
        grads, place = [], 0
        for own, x in zip(self._own, self._like, strict=True):
            total = own.total
            if arrived is not None:
                total = total + arrived[place : place + x.numel()].view(x.shape)
                place += x.numel()
            grads.append(total.to(x.dtype))
            del total
        return grads[0], grads[1]
