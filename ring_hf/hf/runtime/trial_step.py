"""A trial step: a complete training step on a few tokens per rank, once sharded and once whole on every rank.

Loss and gradients of both must agree. Models that are proven by name (`proven_classes.py`), trained by Transformers'
own Trainer without any wrapper, need no trial. Everything else takes one before the first optimizer step: a model
class that adds to its loss, a wrapper that reads tokens, a `compute_loss` that uses logits. The tokens come from the
first batch. Labels are masked unevenly, so that a mean over shards of means over targets cannot equal the mean over
all targets by chance.

With cp ranks that share a sequence of N targets, the loss of a rank in the sharded step is `cp * S_r / N`, where S_r
is the sum over the targets of its shard: the engine averages over ranks. The loss of the whole step is `S / N` on
every rank.

Shapes: B rows, n tokens of the trial, k of them on each rank.
"""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ring_hf.memory.sharded_weights import is_dtensor
from ring_hf.parallel import all_reduce

from .. import context as process
from ..batch_metadata import METADATA_KEY
from ..refusal import raise_on_all_ranks
from . import full_precision
from .gradients import AUTOGRAD_GRADIENTS, ComputeGradients, GradientMethod, compute_dtype, to_local
from .preserved_state import preserve_state
from .runtime_state import runtime_state
from .token_reads import TokenReadRecorder
from .trial_inputs import TrialInputs, make_trial_inputs

logger = logging.getLogger("ring_hf")

MAX_TRAINED_ELEMENTS = 2**26  # of compared gradients, smallest parameters first: every layer has small ones
MAX_FROZEN_ELEMENTS = 2**22


class Tolerances(NamedTuple):
    """Largest relative differences that are rounding."""

    loss: float
    gradient: float


TOLERANCES = {
    torch.float64: Tolerances(loss=1e-6, gradient=2e-5),  # fp64 models compute norms in fp32
    torch.float32: Tolerances(loss=1e-5, gradient=2e-4),
}
FP32_COMPUTE_TOLERANCES = Tolerances(loss=5e-6, gradient=1e-2)  # gradients are rounded to half-precision weights
HALF_PRECISION_TOLERANCES = Tolerances(loss=1e-2, gradient=5e-2)

Inputs = dict[str, Any]
# Runs a training step up to its backward pass: (inputs, number of targets of all ranks or None) -> loss.
Step = Callable[[Inputs, float | None], Tensor]


class StepResult(NamedTuple):
    """The loss of a step (a scalar), and the gradient of each compared parameter in the parameter's shape, or None."""

    loss: Tensor
    gradients: list[Tensor | None]


@dataclass(frozen=True)
class TrialResult:
    """Both losses, and how far the steps differ.

    Attributes:
        loss: relative difference of the losses.
        gradient: largest relative difference of a gradient (2-norm), that of `parameter`.
    """

    loss: float
    gradient: float
    parameter: str
    whole_loss: float
    sharded_loss: float


def run_model_trial(
    model: PreTrainedModel,
    kwargs: Inputs,
    reason: str,
    context: process.ProcessContext,
    method: GradientMethod = AUTOGRAD_GRADIENTS,
) -> None:
    """Run a trial step of the model's own loss, for a custom training loop: the code around the model is unknown.

    Args:
        kwargs: arguments of the first forward pass: the first batch of this rank, and other settings of the model.
        reason: why a trial is needed, for the log.
        method: how gradients are computed.

    Raises:
        ValueError: on every rank, if the two losses or gradients differ, or one of the steps fails.
    """
    known = {METADATA_KEY, "input_ids", "labels", "shift_labels", "position_ids", "loss_weights", "num_items_in_batch"}
    other_kwargs = {key: value for key, value in kwargs.items() if key not in known}

    def step(inputs: Inputs, num_items: float | None) -> Tensor:
        return model(**inputs, **other_kwargs).loss

    run_trial(model, kwargs, step, reason, context, method=method)


def run_trial(
    model: PreTrainedModel,
    inputs: Inputs,
    step: Step,
    reason: str,
    context: process.ProcessContext,
    pass_num_items: bool = False,
    trainer: Any = None,
    method: GradientMethod = AUTOGRAD_GRADIENTS,
) -> frozenset[str]:
    """Run a trial step.

    Args:
        model: the Transformers model that `step` runs.
        inputs: the first batch of this rank: its metadata, and tensors of shape [B, k or more].
        step: the training step to try.
        reason: why a trial is needed, for the log and the error.
        pass_num_items: whether the step gets the number of targets of all ranks, as the Trainer passes it.
        trainer: the Trainer of the step, whose counters are restored; None in a loop without one.
        method: how gradients are computed.

    Returns:
        The names of model outputs that the loss was computed from outside of the model.

    Raises:
        ValueError: on every rank, if the two losses or gradients differ, or one of the steps fails.
    """
    start_time = time.perf_counter()
    trial_inputs = make_trial_inputs(model, inputs, context)
    dtype = compute_dtype(model)
    is_half = dtype in full_precision.HALF_DTYPES or full_precision.trains_half_weights(model)
    in_fp32 = is_half and full_precision.can_run_in_fp32(model)
    outermost = model if trainer is None else trainer.model
    with (
        preserve_state(model, trainer),
        method.prepare(outermost) as compute_gradients,
        _select_parameters(outermost, with_frozen=not method.are_reduced) as parameters,
    ):
        run_both = functools.partial(
            _run_both_steps, trial_inputs, step, compute_gradients, parameters, context, pass_num_items
        )
        try:
            whole, sharded, used_outputs = run_both(in_fp32)
        except ValueError:
            if not in_fp32:
                raise
            in_fp32 = False
            whole, sharded, used_outputs = run_both(in_fp32)
    result = _compare(whole, sharded, parameters, context, method.are_reduced)
    tolerances = HALF_PRECISION_TOLERANCES if is_half else TOLERANCES[dtype]
    if in_fp32:
        tolerances = FP32_COMPUTE_TOLERANCES
    error = None
    if not (result.loss <= tolerances.loss and result.gradient <= tolerances.gradient):
        error = (
            f"A trial step on {trial_inputs.num_targets} targets does not match one process: the loss is "
            f"{result.sharded_loss:.7g} on shards, {result.whole_loss:.7g} on whole sequences, and gradients differ "
            f"by {result.gradient:.1e} ({result.parameter}; at most {tolerances.gradient:.0e} is rounding). The trial "
            f"was run because {reason}. Code there computes from one shard a value that needs the whole sequence. "
            "Remove it, or let it compute a sum over the shard's targets (shift_labels), divided by "
            "num_items_in_batch."
        )
    raise_on_all_ranks(error, {}, context)
    if context.replica == context.rank == 0:
        logger.info(
            "trial step (%s): loss differs by %.1e, gradients by %.1e from one process; %.2f s",
            reason,
            result.loss,
            result.gradient,
            time.perf_counter() - start_time,
        )
    return used_outputs


def _run_both_steps(
    trial_inputs: TrialInputs,
    step: Step,
    compute_gradients: ComputeGradients,
    parameters: dict[str, nn.Parameter],
    context: process.ProcessContext,
    pass_num_items: bool,
    in_fp32: bool,
) -> tuple[StepResult, StepResult, frozenset[str]]:
    """Return the results of the whole and the sharded step, and the outputs that were used outside of the model.

    Raises:
        ValueError: on every rank, if a step fails on any rank.
    """
    world_size = context.size * context.num_replicas

    def run(inputs: Inputs, num_replicas: int) -> StepResult | str:
        num_items = float(num_replicas * trial_inputs.num_targets) if pass_num_items else None
        with full_precision.FullPrecisionMode() if in_fp32 else contextlib.nullcontext():
            return run_step(lambda: step(dict(inputs), num_items), compute_gradients, parameters)

    with process.whole_sequences():
        whole = run(trial_inputs.whole, world_size)
    _raise_failure(whole, "on whole sequences", context)
    used_outputs: set[str] = set()
    runtime_state.loss_monitor.recorded_outputs = used_outputs
    runtime_state.token_reads = TokenReadRecorder(trial_inputs.sharded)
    try:
        with runtime_state.token_reads:
            sharded = run(trial_inputs.sharded, context.num_replicas)
        error = runtime_state.token_reads.check()
    finally:
        runtime_state.loss_monitor.recorded_outputs = None
        runtime_state.token_reads = None
    _raise_failure(sharded, "on shards", context)
    raise_on_all_ranks(error, {}, context)
    assert not isinstance(whole, str) and not isinstance(sharded, str)
    return whole, sharded, frozenset(used_outputs)


def run_step(
    step: Callable[[], Tensor], compute_gradients: ComputeGradients, parameters: dict[str, nn.Parameter]
) -> StepResult | str:
    """Return the loss and the gradients of one step, or the reason why it failed."""
    try:
        with torch.enable_grad(), _backward_disabled():
            loss = step()
        if not loss.requires_grad:
            return "The loss depends on no parameter that is trained."
        # A wrapper may freeze some of them in its forward pass (X-LoRA).
        trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
        gradients = iter(compute_gradients(loss, trained))
        return StepResult(loss.detach(), [next(gradients) if p.requires_grad else None for p in parameters.values()])
    except Exception as error:  # raised on every rank by `_raise_failure`
        return f"{type(error).__name__}: {error}"


def _raise_failure(result: StepResult | str, on: str, context: process.ProcessContext) -> None:
    raise_on_all_ranks(f"A trial step {on} failed: {result}" if isinstance(result, str) else None, {}, context)


@contextlib.contextmanager
def _backward_disabled() -> Iterator[None]:
    """Raise if a backward pass does not go through the accelerator, before it leaves a gradient anywhere.

    An engine (ZeRO) may keep gradients elsewhere than in `parameter.grad`, where the trial would not find them.
    """
    original = torch.autograd.backward

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "The training step runs a backward pass of its own (loss.backward()), whose gradients cannot be compared. "
            "Add its loss to the one that is returned, or call accelerator.backward once."
        )

    torch.autograd.backward = refuse  # which Tensor.backward calls
    try:
        yield
    finally:
        torch.autograd.backward = original


def _compare(
    whole: StepResult,
    sharded: StepResult,
    parameters: dict[str, nn.Parameter],
    context: process.ProcessContext,
    are_reduced: bool,
) -> TrialResult:
    """Return how far the mean over ranks of the sharded step is from this rank's whole step.

    Raises:
        ValueError: on every rank, if all gradients are zero.
    """
    whole_loss, sharded_loss = mean_losses(whole, sharded, context)
    measured = measure_gradients(whole, sharded, parameters, context, are_reduced)
    if not max(gradient.norm for gradient in measured) > 0:
        raise ValueError("The trial step proves nothing: all gradients of the parameters that it compares are zero.")
    ratios = relative_differences(measured)
    worst = max(range(len(ratios)), key=lambda n: ratios[n] if ratios[n] == ratios[n] else float("inf"))
    return TrialResult(
        loss=abs(sharded_loss - whole_loss) / max(abs(whole_loss), 1e-30),
        gradient=ratios[worst],
        parameter=list(parameters)[worst],
        whole_loss=whole_loss,
        sharded_loss=sharded_loss,
    )


def mean_losses(whole: StepResult, sharded: StepResult, context: process.ProcessContext) -> tuple[float, float]:
    """Return the loss of this rank's whole step, and the mean of the sharded step over the ranks of a sequence. A
    collective call."""
    sharded_loss = float(all_reduce(sharded.loss.double().mean(), context.group)) / context.size
    return float(whole.loss.double().mean()), sharded_loss


class GradientNorms(NamedTuple):
    """Norms (2-norms) of one parameter's gradient.

    Attributes:
        norm: of the whole step.
        sharded_norm: of the mean over ranks of the sharded step.
        difference: of the difference of the two.
    """

    norm: float
    sharded_norm: float
    difference: float


def measure_gradients(
    whole: StepResult,
    sharded: StepResult,
    parameters: dict[str, nn.Parameter],
    context: process.ProcessContext,
    are_reduced: bool,
) -> list[GradientNorms]:
    """Return the norms of each parameter's gradients, the same on every rank of a sequence. A collective call.

    Args:
        are_reduced: see `GradientMethod`.
    """
    world_size = context.size * context.num_replicas
    squares = []  # by parameter: squared norms of the whole gradient, the sharded mean, their difference
    for parameter, whole_grad, sharded_grad in zip(
        parameters.values(), whole.gradients, sharded.gradients, strict=True
    ):
        shape = getattr(parameter, "ds_shape", to_local(parameter).shape)  # ZeRO-3 has freed the parameter itself
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        zeros = torch.zeros(shape, dtype=dtype, device=to_local(parameter).device)
        expected = zeros if whole_grad is None else whole_grad.to(zeros)
        mean = zeros if sharded_grad is None else sharded_grad.to(zeros)
        is_shard = are_reduced and is_dtensor(parameter)
        if not is_shard:
            mean = all_reduce(mean, context.group) / context.size
        num_copies = world_size if are_reduced and not is_shard else 1
        norms = (expected, mean, mean - expected)
        squares.append(torch.stack([(x.double() ** 2).sum() / num_copies for x in norms]))
    summed = torch.stack(squares)
    if are_reduced:  # each rank has compared its shards of DTensors, and its copies of other parameters
        for group in (context.group, context.replica_group):
            summed = summed if group is None else all_reduce(summed, group)
    return [GradientNorms(*row) for row in summed.sqrt().tolist()]


def relative_differences(measured: list[GradientNorms]) -> list[float]:
    """Return the relative difference of each gradient; those of norms below 1 % of the largest are relative to that,
    since a gradient that is zero but for rounding has no direction."""
    floor = 1e-2 * max(gradient.norm for gradient in measured)
    return [gradient.difference / max(gradient.norm, floor, 1e-30) for gradient in measured]


@contextlib.contextmanager
def _select_parameters(model: nn.Module, with_frozen: bool) -> Iterator[dict[str, nn.Parameter]]:
    """Yield the smallest parameters by name, up to `MAX_TRAINED_ELEMENTS` elements, those that are trained first.

    With `with_frozen`, up to `MAX_FROZEN_ELEMENTS` elements of frozen parameters get gradients during the trial: on a
    few tokens, the trained parameters of an adapter may have none.
    """
    named = sorted((p.numel(), name, p) for name, p in model.named_parameters() if p.is_floating_point())
    selected: dict[str, nn.Parameter] = {}
    budgets = {True: MAX_TRAINED_ELEMENTS}
    if with_frozen:
        budgets[False] = MAX_FROZEN_ELEMENTS
    for is_trained, budget in budgets.items():
        for numel, name, parameter in named:
            if parameter.requires_grad == is_trained and (numel <= budget or not selected):
                selected[name] = parameter
                budget -= numel
    frozen = [parameter for parameter in selected.values() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield selected
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
