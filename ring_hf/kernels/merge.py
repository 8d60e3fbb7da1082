"""Merging partial softmax results, and the sums that partial results go into.

Two partial results over disjoint keys combine as

    lse = log(exp(lse_a) + exp(lse_b))
    out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b

The form below is the stable one (as in ring-flash-attention's discussion 34): with w = sigmoid(lse_b - lse_a),
`out = (1 - w) * out_a + w * out_b` and `lse = logaddexp(lse_a, lse_b)`. A side that saw nothing has lse = -inf.

Letters: B batch, H query heads, S local tokens, D head dim.
"""

from collections.abc import Callable

import torch

from .indexing import GatherIndex, TokenIndex


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs: partial results are never summed in half precision."""
    return torch.promote_types(dtype, torch.float32)


def merge_(out: torch.Tensor, lse: torch.Tensor, block_out: torch.Tensor, block_lse: torch.Tensor) -> None:
    """Merges `block_out, block_lse` into `out [..., D], lse [...]` in place; lse -inf on a side: it saw nothing."""
    # -inf on both sides: the difference is NaN, and nothing plus nothing stays nothing.
    apart = torch.nan_to_num_(block_lse - lse, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).to(out.dtype)
    # w out_b + (1 - w) out_a in two passes: unlike lerp_, they read a half precision block without a copy in fp32.
    out.mul_(torch.sigmoid(-apart).unsqueeze(-1)).addcmul_(block_out, torch.sigmoid(apart).unsqueeze(-1))
    torch.logaddexp(lse, block_lse.to(lse.dtype), out=lse)


class OutLseAccumulator:
    """Output and lse of one rank's queries while tiles arrive: `out [B, H, S, D]`, `lse [B, H, S]`, at least fp32."""

    def __init__(self, q: torch.Tensor, head_dim: int) -> None:
        batch, heads, length, _ = q.shape
        # BSHD in memory: the order in which models go on reading the output.
        self._shape = (batch, length, heads, head_dim)
        self._dtype, self._device = accumulate_dtype(q.dtype), q.device
        self._out: torch.Tensor | None = None
        self.lse = torch.full((batch, heads, length), -torch.inf, dtype=self._dtype, device=q.device)

    @property
    def out(self) -> torch.Tensor:
        if self._out is None:
            self._out = torch.zeros(self._shape, dtype=self._dtype, device=self._device).transpose(1, 2)
        return self._out

    def add(self, place: TokenIndex, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Merges a kernel's result for the queries at `place` (in that place's shape)."""
        if self._out is None and out.shape == (*self.lse.shape, self._shape[-1]):
            self._out, self.lse = out.to(self._dtype), lse.to(self._dtype)
            return
        here_out, here_lse = place.of(self.out), place.of(self.lse)
        merge_(here_out, here_lse, out, lse)
        if isinstance(place, GatherIndex):
            place.put(self.out, here_out)
            place.put(self.lse, here_lse)

    def add_sinks(self, sinks_H: torch.Tensor) -> None:
        """One more key per head with this score and no value: after everything else, once."""
        with_sink = torch.logaddexp(self.lse, sinks_H.to(self._dtype)[:, None])
        self.out.mul_(torch.exp(self.lse - with_sink).unsqueeze(-1))
        self.lse = with_sink


class GradAccumulator:
    """A gradient like `x [B, H, S, D]`, summed over pieces in `dtype`.

    A first piece that covers all of `x` is kept as the kernel gave it, and becomes `dtype` when a second is added.
    With `make`, the sum goes into the zeros that `make()` gives, asked for with the first piece.
    """

    def __init__(self, x: torch.Tensor, dtype: torch.dtype, make: Callable[[], torch.Tensor] | None = None) -> None:
        self._like, self._dtype, self._make = x, dtype, make
        self._total: torch.Tensor | None = None

    @property
    def total(self) -> torch.Tensor:
        if self._total is None:
            self._total = self._make() if self._make else torch.zeros_like(self._like, dtype=self._dtype)
        return self._total

    def add(self, place: TokenIndex, grad: torch.Tensor) -> None:
        """Adds `grad` to the tokens at `place` (in that place's shape)."""
        if self._total is None and self._make is None and grad.shape == self._like.shape:
            self._total = grad
            return
        self._total = self.total.to(self._dtype)
        here = place.of(self._total)
        here.add_(grad)
        if isinstance(place, GatherIndex):
            place.put(self._total, here)

    def add_tokens(self, start: int, grad: torch.Tensor) -> None:
        """Adds `grad [B, H, tokens, D]` to the tokens from `start`."""
        self._total = self.total.to(self._dtype)
        self._total[:, :, start : start + grad.shape[2]].add_(grad)
