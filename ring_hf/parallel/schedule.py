"""The ring schedule, forward and backward: post the next exchange, compute the tiles that are here, wait, swap.

Ring Attention (Liu et al. 2023, arXiv 2310.01889) for any layout and mask: what to compute in a step comes from the
plan alone. Backward sends the keys and values round again; their gradients follow one step behind in fp32, each rank
adding its share, and go straight home after the last step that anybody needs.

Letters: B batch, H query heads, K key/value heads, C tokens of this rank, D head dim.
"""

from types import ModuleType

import torch

from ..geometry import Plan, Step, Tile
from ..kernels import State, accumulate_dtype, windows
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
    for step in plan.steps:
        k, v = blocks.post_next()
        for tile in step.tiles:
            for piece, out, lse in kernel.forward(*_cut(tile, (q_BHCD,), (k, v)), tile, scale):
                state.add(tile, piece, out, lse)
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
    """This rank's `(dq, dk, dv)` in at least fp32, from the global `out` and `lse` of its queries."""
    dq = torch.zeros_like(q_BHCD, dtype=accumulate_dtype(q_BHCD.dtype))
    blocks = _Blocks(k_BKCD, v_BKCD, plan, ring, overlap)
    grads = _Gradients(k_BKCD, v_BKCD, plan, ring, overlap)
    for step in plan.steps:
        k, v = blocks.post_next()
        dk, dv = grads.fresh()
        for tile in step.tiles:
            cut = _cut(tile, (dout_BHCD, q_BHCD), (k, v), (out_BHCD, lse_BHC))
            for piece, piece_dq, piece_dk, piece_dv in kernel.backward(*cut, tile, scale):
                at_q = (piece.q, piece.num_q, piece.count, piece.stride)
                at_k = (piece.k, piece.num_k, piece.count, piece.stride)
                windows(_queries(tile, dq), *at_q).add_(piece_dq)
                windows(_keys(tile, dk), *at_k).add_(piece_dk)
                windows(_keys(tile, dv), *at_k).add_(piece_dv)
        grads.add_and_send(step)
        blocks.wait()
    return dq, *grads.home()


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
    """Keys and values travelling forward; two buffers take turns."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, plan: Plan, ring: Ring | None, overlap: bool) -> None:
        self._k, self._v, self._ring, self._overlap = k, v, ring, overlap
        self._left = plan.hops
        self._here = Packed.of(k, v) if plan.hops else None
        self._next = self._here.like() if self._here is not None else None
        self._exchange: Exchange | None = None

    def post_next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sends the block at hand onwards (if anybody still needs it) and returns it for this step's compute."""
        here = (self._k, self._v)
        if self._left and self._here is not None and self._next is not None:
            assert self._ring is not None
            self._exchange = self._ring.post(self._here.flat, self._next.flat, KEYS_AND_VALUES)
            if not self._overlap:
                self._exchange.wait()
        return here

    def wait(self) -> None:
        if self._exchange is None:
            return
        assert self._here is not None and self._next is not None
        self._exchange.wait()
        self._exchange = None
        self._here, self._next = self._next, self._here
        self._k, self._v = self._here.first, self._here.second
        self._left -= 1


class _Gradients:
    """dK and dV on their way home: the sum for the block at hand arrives while this rank computes its own share."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, plan: Plan, ring: Ring | None, overlap: bool) -> None:
        self._plan, self._ring, self._overlap = plan, ring, overlap
        self._like = k.shape, v.shape, accumulate_dtype(k.dtype), k.device
        self._share: Packed | None = None
        self._arriving: Packed | None = None
        self._exchange: Exchange | None = None

    def fresh(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Zeroed `(dk, dv)` for this rank's share of the block at hand."""
        self._share = Packed(*self._like)
        self._share.flat.zero_()
        return self._share.first, self._share.second

    def add_and_send(self, step: Step) -> None:
        """Adds what the ranks before summed up, and passes it on: to the next holder, or home after the last step."""
        assert self._share is not None
        if self._exchange is not None:
            self._share.flat.add_(self._exchange.wait())
            self._exchange = None
        hops = self._plan.hops
        if not hops:
            return
        assert self._ring is not None
        is_last = step is self._plan.steps[-1]
        shift = -hops if is_last else 1
        if shift % self._ring.size == 0:
            return
        self._arriving = self._share.like()
        self._exchange = self._ring.post(self._share.flat, self._arriving.flat, GRADIENTS, shift)
        if not self._overlap:
            self._exchange.wait()

    def home(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`(dk, dv)` of this rank's own keys, summed over all ranks."""
        if self._exchange is not None:
            self._exchange.wait()
            self._share = self._arriving
        assert self._share is not None
        return self._share.first, self._share.second
