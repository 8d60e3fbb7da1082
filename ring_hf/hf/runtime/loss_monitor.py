"""Is the loss that is trained the loss that the model computed?

Under context parallelism every rank has the loss of its shard, a share of the whole: shares add up. What a Trainer or
a loop makes of it before the backward pass must leave that so. With L_r the loss of rank r, the loss T_r that is
trained may be `factor * L_r + residual` with the same factor and the same residual on every rank: a constant (the
number of processes, the steps of gradient accumulation) times the loss, plus terms that do not depend on the sequence
(a penalty on weights). Anything else (`L_r ** 2`, a weight per row, a term computed from one shard) is refused.

A second way into the model is one of its other outputs: a loss computed from `logits` sees one shard. So outputs are
handed out as aliases, whose gradient can only come from outside the model, and such a gradient is an error unless a
trial step has proven the whole path (`trial.py`). Auxiliary losses of experts are those of the whole sequence on every
rank already; their gradient, of which each rank passes on its own part, is multiplied by the number of ranks, for the
engine takes the mean over ranks.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ring_hf.memory.lazy_logits import LazyLogits

from ..context import ProcessContext
from .pass_message import NO_FINGERPRINT, PassMessage, groups_of

NAN = float("nan")
WHOLE_ON_EVERY_RANK = ("aux_loss", "router_logits")


class LossMonitor:
    """Follows the losses of one process from the forward pass to the backward pass.

    Attributes:
        recording: during a trial step, the names of outputs that get a gradient from outside; else None.
    """

    def __init__(self) -> None:
        self.recording: set[str] | None = None
        self.is_compared = False  # whether the ranks have compared a backward pass of this training
        self._terms: list[tuple[torch.Tensor, torch.Tensor]] = []  # (gradient of a loss, the loss)
        self._outside = False
        self._last: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # of the last backward pass

    def restart(self) -> None:
        """Compare the next backward pass at once, as another loop may begin."""
        self.is_compared, self._last = False, None
        self._terms.clear()

    # In the forward pass

    def alias_outputs(self, output: Any, num_ranks: int, has_labels: bool, allowed: frozenset[str]) -> Any:
        """Return the output of a model with every tensor replaced by an alias that tells who uses it.

        Args:
            allowed: names of outputs that a trial step has proven to be used rightly outside the model.
        """
        if isinstance(output, tuple):
            names = ["loss" if n == 0 and has_labels else f"output {n}" for n in range(len(output))]
            return tuple(self._alias(name, x, num_ranks, allowed) for name, x in zip(names, output, strict=True))
        for name in list(output.keys()):
            output[name] = self._alias(name, output[name], num_ranks, allowed)
        return output

    def _alias(self, name: str, value: Any, num_ranks: int, allowed: frozenset[str]) -> Any:
        if isinstance(value, tuple | list):
            parts = [self._alias(name, x, num_ranks, allowed) for x in value] if _is_plain(value) else value
            return type(value)(parts) if _is_plain(value) else value
        if isinstance(value, LazyLogits):
            value.on_compute = lambda logits: self._alias(name, logits, num_ranks, allowed)
            return value
        if not isinstance(value, torch.Tensor) or not value.requires_grad:
            return value
        return _Alias.apply(value, self._hook(name, value.detach(), num_ranks, allowed))

    def _hook(
        self, name: str, value: torch.Tensor, num_ranks: int, allowed: frozenset[str]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        def hook(gradient: torch.Tensor) -> torch.Tensor:
            if name == "loss":
                if self.recording is None:  # a trial step compares gradients itself
                    self._terms.append((gradient.detach(), value))
                return gradient
            if name in WHOLE_ON_EVERY_RANK:
                return gradient * num_ranks
            self._outside = True
            if self.recording is not None:
                self.recording.add(name)
            elif name not in allowed:
                raise ValueError(
                    f"The model's output {name!r} is used for the loss outside of the model, where this rank has only "
                    "its shard of the sequence, and no trial step has proven that the losses of the shards add up. "
                    "Let the model compute the loss from its labels, or train with a Trainer whose compute_loss takes "
                    "the sum over shift_labels, divided by num_items_in_batch: a trial step then proves it."
                )
            return gradient

        return hook

    # In the backward pass

    def after_backward(self, trained: torch.Tensor, scale: torch.Tensor) -> PassMessage | None:
        """Take down what was trained; `scale` is the gradient of `trained`, with which the engine begins.

        Return a message to compare at once if this is the first backward pass, else None: then it goes with the
        message of the next forward pass.
        """
        terms, outside = self._terms, self._outside
        self._terms, self._outside = [], False
        if outside:  # proven by a trial step, or the hooks had raised
            self._last = None
            return None
        loss, scale = trained.detach().double().mean(), scale.double().sum()
        factor = residual = torch.zeros_like(loss)
        for gradient, value in terms:
            factor = factor + gradient.double() / scale
            residual = residual + gradient.double() / scale * value.double()
        bar = 64 * torch.finfo(trained.dtype).eps * loss.abs()
        self._last = (factor, loss - residual, bar)
        if self.is_compared:
            return None
        self.is_compared = True
        return PassMessage(NO_FINGERPRINT, True, False, 0.0, NAN, *self.take_last())

    def take_last(self) -> tuple[float, float, float]:
        """Return factor, residual and its rounding of the last backward pass, once; NaN if there is none.

        Of a `loss.backward()` past the accelerator only the factor is known.
        """
        if self._terms and not self._outside:
            factor = torch.stack([gradient.double() for gradient, _ in self._terms]).sum()
            self._last = factor, torch.full_like(factor, NAN), torch.full_like(factor, NAN)
        self._terms, self._outside = [], False
        last, self._last = self._last, None
        return (NAN, NAN, NAN) if last is None else (float(last[0]), float(last[1]), float(last[2]))


class _Alias(torch.autograd.Function):
    """The same tensor, whose gradient passes through a hook: a hook of the tensor would be lost if it is changed in
    place."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, hook: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.hook = hook
        # No view, of which FSDP2 warns; and a version that is shared, so that changes in place of saved tensors show.
        return x.detach() if x.ndim else x.clone()  # the Trainer multiplies the loss in place

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        (gradient,) = gradients  # None where DDP hands on that an output was not used
        return None if gradient is None else ctx.hook(gradient), None


def find_other_loss(messages: Sequence[PassMessage], context: ProcessContext) -> str | None:
    """Return why the losses that were trained are not those of the model, for an error that is the same everywhere."""
    for group in groups_of(messages, context):
        factors = [message.loss_factor for _, message in group]
        residuals = [message.loss_residual for _, message in group]
        rounding = max(message.loss_bar for _, message in group)
        for what, values, bar in (
            ("multiplies the loss of the model by", factors, 1e-5 * max(abs(factor) for factor in factors)),
            ("adds to the loss of the model", residuals, rounding),
        ):
            if not _are_equal(values, bar):
                listed = ", ".join(f"rank {rank}: {value:.6g}" for (rank, _), value in zip(group, values, strict=True))
                return (
                    f"The loss that is trained is not that of the model: what is computed outside of it {what} a "
                    f"number that differs between shards of one sequence ({listed}). A loss may be multiplied by a "
                    "constant, and terms that do not depend on the sequence may be added. Let the model compute the "
                    "rest, or train with a Trainer whose compute_loss a trial step can prove."
                )
    return None


def _are_equal(values: Sequence[float], bar: float) -> bool:
    """Whether the values are equal up to `bar`; a loss that is not a number says nothing."""
    return any(map(math.isnan, values)) or max(values) - min(values) <= bar


def _is_plain(value: Any) -> bool:
    return type(value) in (tuple, list)
