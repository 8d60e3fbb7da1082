"""The contract of an attention kernel: `(out, lse)` of tiles forward, and gradients from the global `out` and `lse`.

Anything with the attributes of `Kernel` is a kernel, a module or an object. Kernels do not communicate.

Letters: B batch, H query heads, K key/value heads, C queries of the shard, S keys of the block, D head dim of queries
and keys, E head dim of values.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch

from ..geometry import Tile
from .indexing import TokenIndex

SupportCheck = Callable[[torch.Tensor, torch.Tensor, float | None], str | None]


class Kernel(Protocol):
    """Attention on tiles. Each result comes with the index of its tokens, and has the shape of that index."""

    @property
    def NAME(self) -> str: ...

    def why_unsupported(self, q: torch.Tensor, v: torch.Tensor, softcap: float | None) -> str | None:
        """Return why this kernel does not support a call with these tensors, or None if it does.

        `choose` caches the answer, so it may only depend on the values in `selection._cache_key`.

        Args:
            q: `[B, H, C, D]`; only the device, the dtype and the shape without C are read.
            v: `[B, K, S, E]`; only E is read.
            softcap: bound of the scores (`softcap * tanh(scores / softcap)`), None without one.
        """

    def forward(
        self,
        q_BHCD: torch.Tensor,
        k_BKSD: torch.Tensor,
        v_BKSE: torch.Tensor,
        tiles: Iterable[Tile],
        scale: float,
        softcap: float | None = None,
    ) -> Iterator[tuple[TokenIndex, torch.Tensor, torch.Tensor]]:
        """Yield `(queries, out, lse)`: one result per call of the operator beneath.

        `out` has the head dim E. `lse` is the natural log-sum-exp of the scores, in the shape of `out` without E;
        it is -inf for a query without visible keys.
        """

    def backward(
        self,
        dout_BHCE: torch.Tensor,
        q_BHCD: torch.Tensor,
        k_BKSD: torch.Tensor,
        v_BKSE: torch.Tensor,
        out_BHCE: torch.Tensor,
        lse_BHC: torch.Tensor,
        tiles: Iterable[Tile],
        scale: float,
        softcap: float | None = None,
    ) -> Iterator[tuple[TokenIndex, TokenIndex, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield `(queries, keys, dq, dk, dv)`, from the `out` and `lse` of all tiles of these queries.

        `lse_BHC` is +inf, not -inf, for a query without visible keys: its weights exp(score - lse) are then 0.
        """
