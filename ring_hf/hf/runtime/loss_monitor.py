"""Compare the loss that is trained with the loss that the model computed.

Under context parallelism, each rank holds the loss of its shard, and the sum over the ranks is the loss of the
sequence. A Trainer or a loop may change this loss before the backward pass only if the sum stays right. With L_r the
model's loss on rank r, the trained loss T_r may be `factor * L_r + residual` with one factor and one residual for all
ranks: a constant (the number of processes, the steps of gradient accumulation) times the loss, plus terms that do not
depend on the sequence (a penalty on weights). Anything else (`L_r ** 2`, a weight per row, a term computed from one
shard) is refused.

Gradients can also enter the model by its other outputs: a loss computed from `logits` covers one shard. The model
therefore returns aliases of its outputs. A gradient that arrives at an alias comes from outside the model, and is an
error unless a trial step has proven this output (`trial_step.py`). Auxiliary losses of experts already cover the whole
sequence on every rank. Each rank passes on its own part of their gradient, multiplied by the number of ranks, since
the engine averages over ranks.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ring_hf.memory.lazy_logits import LazyLogits

from ..context import ProcessContext
from .pass_message import NO_FINGERPRINT, PassMessage, group_by_sequence

NAN = float("nan")
REPLICATED_OUTPUTS = ("aux_loss", "router_logits")


class TrainedLoss(NamedTuple):
    """The loss of one backward pass as `factor * model_loss + residual`; NaN for a value that is not known.

    Attributes:
        tolerance: largest difference of `residual` between ranks that is rounding.
        is_finite: whether the loss was neither NaN nor infinite.
    """

    factor: float = NAN
    residual: float = NAN
    tolerance: float = NAN
    is_finite: bool = True


class LossMonitor:
    """Follows the losses of one process from the forward pass to the backward pass.

    Attributes:
        recorded_outputs: during a trial step, the names of outputs that get a gradient from outside; else None.
        is_compared: whether the ranks have compared a backward pass of this training.
    """

    def __init__(self) -> None:
        self.recorded_outputs: set[str] | None = None
        self.is_compared = False
        self._loss_gradients: list[tuple[torch.Tensor, torch.Tensor]] = []  # (gradient of a loss, the loss)
        self._is_used_outside = False  # whether another output got a gradient
        # Factor, residual and tolerance of the last backward pass, each a scalar.
        self._last_backward: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._last_loss: torch.Tensor | None = None  # a scalar

    def reset(self) -> None:
        """Compare right after the next backward pass, which may belong to another training loop."""
        self.is_compared = False
        self._last_backward = self._last_loss = None
        self._loss_gradients.clear()

    # In the forward pass

    def alias_outputs(self, output: Any, num_ranks: int, has_labels: bool, allowed: frozenset[str]) -> Any:
        """Return the output of a model with every tensor replaced by an alias whose gradient is monitored.

        Args:
            output: a `ModelOutput` or tuple. Tensors of any shape, nested in tuples and lists, keep shape and dtype.
            num_ranks: ranks that share the sequence.
            has_labels: whether the first item of a tuple is the loss.
            allowed: names of outputs that a trial step has proven, so that they may be used outside the model.

        Raises:
            ValueError: later, in the backward pass, if another output has a gradient from outside.
        """
        if isinstance(output, tuple):
            names = ["loss" if n == 0 and has_labels else f"output {n}" for n in range(len(output))]
            return tuple(self._alias(name, x, num_ranks, allowed) for name, x in zip(names, output, strict=True))
        for name in list(output.keys()):
            output[name] = self._alias(name, output[name], num_ranks, allowed)
        return output

    def _alias(self, name: str, value: Any, num_ranks: int, allowed: frozenset[str]) -> Any:
        if type(value) in (tuple, list):
            return type(value)(self._alias(name, x, num_ranks, allowed) for x in value)
        if isinstance(value, LazyLogits):
            value.on_compute = lambda logits: self._alias(name, logits, num_ranks, allowed)
            return value
        if not isinstance(value, torch.Tensor) or not value.requires_grad:
            return value
        return _Alias.apply(value, self._make_hook(name, value.detach(), num_ranks, allowed))

    def _make_hook(
        self, name: str, value: torch.Tensor, num_ranks: int, allowed: frozenset[str]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        def hook(gradient: torch.Tensor) -> torch.Tensor:
            if name == "loss":
                if self.recorded_outputs is None:  # a trial step compares gradients itself
                    self._loss_gradients.append((gradient.detach(), value))
                return gradient
            if name in REPLICATED_OUTPUTS:
                return gradient * num_ranks
            self._is_used_outside = True
            if self.recorded_outputs is not None:
                self.recorded_outputs.add(name)
            elif name not in allowed:
                raise ValueError(
                    f"The loss is computed from the model's output {name!r} outside of the model, where this rank has "
                    "only its shard of the sequence, and no trial step has proven that the losses of the shards add "
                    "up. Let the model compute the loss from its labels, or train with a Trainer whose compute_loss "
                    "takes the sum over shift_labels, divided by num_items_in_batch: a trial step can prove that."
                )
            return gradient

        return hook

    # In the backward pass

    def record_backward(self, trained: torch.Tensor, scale: torch.Tensor) -> PassMessage | None:
        """Record a backward pass.

        Args:
            trained: the loss that was trained, a scalar.
            scale: the gradient of `trained` with which the engine began the backward pass, a scalar.

        Returns:
            A message for an immediate comparison after the first backward pass, else None: later ones are part of the
            message of the next forward pass.
        """
        loss_gradients, is_used_outside = self._loss_gradients, self._is_used_outside
        self._loss_gradients, self._is_used_outside = [], False
        self._last_loss = trained.detach()
        if is_used_outside:  # a trial step has proven it, or the hooks would have raised
            self._last_backward = None
            return None
        loss, scale = trained.detach().double().mean(), scale.double().sum()
        factor = residual = torch.zeros_like(loss)
        for gradient, value in loss_gradients:
            factor = factor + gradient.double() / scale
            residual = residual + gradient.double() / scale * value.double()
        tolerance = 64 * torch.finfo(trained.dtype).eps * loss.abs()
        self._last_backward = (factor, loss - residual, tolerance)
        if self.is_compared:
            return None
        self.is_compared = True
        last = self.pop_last_backward()
        return PassMessage(
            NO_FINGERPRINT,
            is_training=True,
            needs_agreement=False,
            loss_factor=last.factor,
            loss_residual=last.residual,
            loss_tolerance=last.tolerance,
            is_finite=last.is_finite,
        )

    def pop_last_backward(self) -> TrainedLoss:
        """Return and forget the last backward pass. After a plain `loss.backward()`, without the accelerator, only the
        factor is known."""
        if self._loss_gradients and not self._is_used_outside:
            factor = torch.stack([gradient.double() for gradient, _ in self._loss_gradients]).sum()
            self._last_backward = factor, torch.full_like(factor, NAN), torch.full_like(factor, NAN)
            self._last_loss = self._loss_gradients[-1][1]
        self._loss_gradients, self._is_used_outside = [], False
        (last, loss), self._last_backward, self._last_loss = (self._last_backward, self._last_loss), None, None
        is_finite = loss is None or bool(loss.isfinite().all())
        if last is None:
            return TrainedLoss(is_finite=is_finite)
        factor, residual, tolerance = last
        return TrainedLoss(float(factor), float(residual), float(tolerance), is_finite)


class _Alias(torch.autograd.Function):
    """Return the same tensor and pass its gradient through a hook. A hook on the tensor itself would be lost when the
    tensor is changed in place."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, hook: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.hook = hook
        # Not a view, about which FSDP2 warns. The version counter is shared, so autograd still detects in-place
        # changes of saved tensors. The loss is cloned, since the Trainer multiplies it in place.
        return x.detach() if x.ndim else x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        (gradient,) = gradients  # None where DDP passes on that an output was not used
        return None if gradient is None else ctx.hook(gradient), None


def find_loss_mismatch(messages: Sequence[PassMessage], context: ProcessContext) -> str | None:
    """Return why the losses that were trained are not those of the model, or None.

    The result is the same on every rank, so all can raise it together.
    """
    for group in group_by_sequence(messages, context):
        factors = [message.loss_factor for _, message in group]
        residuals = [message.loss_residual for _, message in group]
        tolerance = max(message.loss_tolerance for _, message in group)
        for operation, values, max_difference in (
            ("multiplies the loss of the model by", factors, 1e-5 * max(abs(factor) for factor in factors)),
            ("adds to the loss of the model", residuals, tolerance),
        ):
            if not _are_equal(values, max_difference):
                listed = ", ".join(f"rank {rank}: {value:.6g}" for (rank, _), value in zip(group, values, strict=True))
                return (
                    f"The loss that is trained is not that of the model: code outside of the model {operation} a "
                    f"number that differs between shards of one sequence ({listed}). A loss may be multiplied by a "
                    "constant, and terms that do not depend on the sequence may be added. Let the model compute the "
                    "rest, or train with a Trainer whose compute_loss a trial step can prove."
                )
    return None


def _are_equal(values: Sequence[float], max_difference: float) -> bool:
    """Return whether the values are equal up to `max_difference`, or one of them is NaN (there was no loss)."""
    return any(map(math.isnan, values)) or max(values) - min(values) <= max_difference
