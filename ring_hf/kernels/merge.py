"""Merge partial softmax results, and accumulate outputs and gradients over tiles.

Two partial results over disjoint keys combine as

    lse = log(exp(lse_a) + exp(lse_b))
    out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b

`merge_` uses the stable form (ring-flash-attention, discussion 34): with w = sigmoid(lse_b - lse_a),
`out = (1 - w) * out_a + w * out_b` and `lse = logaddexp(lse_a, lse_b)`. A side without visible keys has lse = -inf.

Letters: B batch, H query heads, S local tokens, D head dim.
"""

from collections.abc import Callable

import torch

from .indexing import GatherIndex, TokenIndex


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return fp64 for fp64, else fp32: partial results are never summed in half precision."""
    return torch.promote_types(dtype, torch.float32)


def merge_(out: torch.Tensor, lse: torch.Tensor, block_out: torch.Tensor, block_lse: torch.Tensor) -> None:
    """Merge `block_out [..., D], block_lse [...]` into `out [..., D], lse [...]` in place.

    `out` and `lse` are at least fp32, `block_out` may be in half precision. An lse of -inf means that the side sees
    no keys.
    """
    # If both sides are -inf, the difference is NaN; the result must stay 0 with lse -inf.
    difference = torch.nan_to_num_(block_lse - lse, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).to(out.dtype)
    # (1 - w) out_a + w out_b in two passes: unlike lerp_, they read a half precision block without a copy in fp32.
    out.mul_(torch.sigmoid(-difference).unsqueeze(-1)).addcmul_(block_out, torch.sigmoid(difference).unsqueeze(-1))
    torch.logaddexp(lse, block_lse.to(lse.dtype), out=lse)


class OutLseAccumulator:
    """Output and lse of one rank's queries, merged over tiles: `out [B, H, S, D]`, `lse [B, H, S]`, at least fp32.

    Args:
        q: queries `[B, H, S, head dim of the keys]`, for sizes, dtype and device.
        head_dim: D, the head dim of the values.
    """

    def __init__(self, q: torch.Tensor, head_dim: int) -> None:
        batch, heads, length, _ = q.shape
        # BSHD in memory, the layout in which models read the output next.
        self._shape = (batch, length, heads, head_dim)
        self._dtype = accumulate_dtype(q.dtype)
        self._device = q.device
        self._out: torch.Tensor | None = None
        self.lse = torch.full((batch, heads, length), -torch.inf, dtype=self._dtype, device=q.device)

    @property
    def out(self) -> torch.Tensor:
        """`[B, H, S, D]`, 0 for queries without visible keys."""
        if self._out is None:
            self._out = torch.zeros(self._shape, dtype=self._dtype, device=self._device).transpose(1, 2)
        return self._out

    def merge(self, queries: TokenIndex, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Merge a kernel's result for `queries`; `out [..., D]` and `lse [...]` have the shape of that index."""
        if self._out is None and out.shape == (*self.lse.shape, self._shape[-1]):
            self._out, self.lse = out.to(self._dtype), lse.to(self._dtype)
            return
        merged_out, merged_lse = queries.gather(self.out), queries.gather(self.lse)
        merge_(merged_out, merged_lse, out, lse)
        if isinstance(queries, GatherIndex):
            queries.scatter(self.out, merged_out)
            queries.scatter(self.lse, merged_lse)

    def merge_all(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Merge a result for all queries: `out [B, H, S, D]` and `lse [B, H, S]`."""
        merge_(self.out, self.lse, out, lse)

    def add_sinks(self, sinks_H: torch.Tensor) -> None:
        """Add one key per head with this score and no value. Call it once, after all results are merged."""
        lse = torch.logaddexp(self.lse, sinks_H.to(self._dtype)[:, None])
        self.out.mul_(torch.exp(self.lse - lse).unsqueeze(-1))
        self.lse = lse


class GradAccumulator:
    """A gradient of `x [B, H, S, D]`, summed over blocks in `dtype`.

    A first result that covers all of `x` is kept in the dtype of the kernel, and converted when a second one is
    added.

    Args:
        x: the tensor whose gradient is summed.
        dtype: dtype of the sum.
        allocate: returns the zeros to sum into, when the first result arrives. Without it they are allocated here.
    """

    def __init__(
        self, x: torch.Tensor, dtype: torch.dtype, allocate: Callable[[], torch.Tensor] | None = None
    ) -> None:
        self._like = x
        self._dtype = dtype
        self._allocate = allocate
        self._total: torch.Tensor | None = None

    @property
    def total(self) -> torch.Tensor:
        """`[B, H, S, D]`: the sum of all results, zeros before the first."""
        if self._total is None:
            self._total = self._allocate() if self._allocate else torch.zeros_like(self._like, dtype=self._dtype)
        return self._total

    def add(self, tokens: TokenIndex, grad: torch.Tensor) -> None:
        """Add `grad [..., D]`, in the shape of the index `tokens`, to these tokens."""
        if self._total is None and self._allocate is None and grad.shape == self._like.shape:
            self._total = grad
            return
        self._total = self.total.to(self._dtype)
        summed = tokens.gather(self._total)
        summed.add_(grad)
        if isinstance(tokens, GatherIndex):
            tokens.scatter(self._total, summed)

    def add_tokens(self, start: int, grad: torch.Tensor) -> None:
        """Add `grad [B, H, num_tokens, D]` to the tokens from `start` on."""
        self._total = self.total.to(self._dtype)
        self._total[:, :, start : start + grad.shape[2]].add_(grad)
