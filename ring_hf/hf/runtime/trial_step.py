"""A trial step: the whole path of a training step on a few tokens a rank, once sharded and once whole on every rank.

Loss and gradients of both must agree. What is proven by name (the classes of models in `proven.py`, trained by
Transformers' own Trainer with nothing around the model) needs no trial. Everything else takes one before the first
optimizer step: a class of model that adds to its loss, a wrapper that looks at tokens, a `compute_loss` that works on
logits. Tokens come from the first batch; labels are thinned out unevenly, so that a mean over shards of means over
targets is not the mean over all targets by chance.

With cp ranks that share a sequence of N targets, a rank of the sharded step has the loss `cp * S_r / N`, where S_r is
the sum over its targets: the engine takes the mean over ranks. The whole step has `S / N` on every rank.

Shapes: B rows, n tokens of the trial, k of them on each rank.
"""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ring_hf.memory.sharded_weights import is_dtensor
from ring_hf.parallel import all_reduce

from .. import context as process
from ..batch_metadata import METADATA_KEY
from ..refusal import raise_on_all_ranks
from . import full_precision
from .gradients import BY_AUTOGRAD, GradientMethod, Take, compute_dtype, local
from .preserved_state import preserved
from .runtime_state import runtime_state
from .token_reads import TokenReads
from .trial_inputs import TrialInputs, make_inputs

logger = logging.getLogger("ring_hf")

MAX_COMPARED = 2**26  # gradient elements, smallest parameters first: every layer has small ones
MAX_FROZEN = 2**22
# Relative: loss, gradients.
TOLERANCES = {torch.float64: (1e-6, 2e-5), torch.float32: (1e-5, 2e-4)}  # fp64 models keep norms in fp32
WIDENED = (5e-6, 1e-2)  # computed in fp32, gradients rounded to half-precision weights
LOW_PRECISION = (1e-2, 5e-2)

Inputs = dict[str, Any]
Gradients = tuple[Tensor, list[Tensor | None]]  # the loss, and the gradient of every parameter that is compared
# Runs a training step up to its backward pass: (inputs, number of targets of all ranks or None) -> loss.
Step = Callable[[Inputs, float | None], Tensor]


@dataclass(frozen=True)
class TrialResult:
    """The largest relative differences, and the parameter whose gradient differs most."""

    loss: float
    gradient: float
    parameter: str
    whole_loss: float
    sharded_loss: float


def try_model(
    model: PreTrainedModel,
    kwargs: Inputs,
    reason: str,
    context: process.ProcessContext,
    method: GradientMethod = BY_AUTOGRAD,
) -> None:
    """Take a trial step of a model alone, in a loop of one's own: nothing is known of what surrounds it.

    Raises:
        ValueError: on every rank, if the two losses or gradients differ.
    """
    known = {METADATA_KEY, "input_ids", "labels", "shift_labels", "position_ids", "loss_weights", "num_items_in_batch"}
    more = {key: value for key, value in kwargs.items() if key not in known}

    def step(inputs: Inputs, num_items: float | None) -> Tensor:
        return model(**inputs, **more).loss

    run_trial(model, kwargs, step, reason, context, method=method)


def run_trial(
    model: PreTrainedModel,
    inputs: Inputs,
    step: Step,
    reason: str,
    context: process.ProcessContext,
    count: bool = False,
    owner: Any = None,
    method: GradientMethod = BY_AUTOGRAD,
) -> frozenset[str]:
    """Take a trial step, and return the outputs of the model that were used outside of it.

    Args:
        model: the Transformers model inside what `step` runs.
        inputs: of the first batch, with this rank's shard.
        step: the path to try.
        reason: why, for the log.
        count: whether the step is told the number of targets of all ranks, as the Trainer does.
        owner: whose counters the step moves, and which are to be put back (a Trainer).
        method: how gradients are taken.

    Raises:
        ValueError: on every rank, if the two losses or gradients differ, or one of the steps fails.
    """
    began = time.perf_counter()
    few = make_inputs(model, inputs, context)
    dtype = compute_dtype(model)
    is_half = dtype in full_precision.HALF
    widened = is_half and full_precision.fits(model)
    outermost = model if owner is None else owner.model
    with (
        preserved(model, owner),
        method.opened(outermost) as take,
        _compared(outermost, with_frozen=not method.are_reduced) as parameters,
    ):
        attempt = functools.partial(_attempt, few, step, take, parameters, context, count)
        try:
            whole, sharded, used = attempt(widened)
        except ValueError:
            if not widened:
                raise
            widened = False
            whole, sharded, used = attempt(widened)
    result = _compare(whole, sharded, parameters, context, method.are_reduced)
    bar = WIDENED if widened else LOW_PRECISION if is_half else TOLERANCES[dtype]
    error = None
    if not (result.loss <= bar[0] and result.gradient <= bar[1]):
        error = (
            f"A trial step of {few.num_targets} targets does not have the numbers of one process: loss "
            f"{result.sharded_loss:.7g} on shards, {result.whole_loss:.7g} on whole sequences; gradients differ by "
            f"{result.gradient:.1e} ({result.parameter}; at most {bar[1]:.0e} is rounding). It was taken because "
            f"{reason}: something there computes from one shard what it should from the whole sequence. Leave it "
            "out, or let it take sums over the shard's targets (shift_labels) divided by num_items_in_batch."
        )
    raise_on_all_ranks(error, {}, context)
    if context.replica == context.rank == 0:
        logger.info(
            "trial step (%s): loss differs by %.1e, gradients by %.1e from one process; %.2f s",
            reason,
            result.loss,
            result.gradient,
            time.perf_counter() - began,
        )
    return used


def _attempt(
    few: TrialInputs,
    step: Step,
    take: Take,
    parameters: dict[str, nn.Parameter],
    context: process.ProcessContext,
    count: bool,
    widened: bool,
) -> tuple[Gradients, Gradients, frozenset[str]]:
    """Return what the whole step and the sharded step gave, and the outputs used outside of the model.

    Raises:
        ValueError: on every rank, if one of them fails on any.
    """
    world = context.size * context.num_replicas

    def take_step(inputs: Inputs, num_replicas: int) -> Gradients | str:
        targets = float(num_replicas * few.num_targets) if count else None
        with full_precision.computing() if widened else contextlib.nullcontext():
            return _run(lambda: step(dict(inputs), targets), take, parameters)

    with process.whole_sequences():
        whole = take_step(few.whole, world)
    _agree_on_failure(whole, "on whole sequences", context)
    recording: set[str] = set()
    runtime_state.monitor.recording = recording
    runtime_state.token_reads = TokenReads(few.sharded)
    try:
        with runtime_state.token_reads:
            sharded = take_step(few.sharded, context.num_replicas)
        error = runtime_state.token_reads.error()
    finally:
        runtime_state.monitor.recording = runtime_state.token_reads = None
    _agree_on_failure(sharded, "on shards", context)
    raise_on_all_ranks(error, {}, context)
    assert not isinstance(whole, str) and not isinstance(sharded, str)
    return whole, sharded, frozenset(recording)


def _run(step: Callable[[], Tensor], take: Take, parameters: dict[str, nn.Parameter]) -> Gradients | str:
    """Return the loss and the gradients of one step, or why it failed."""
    try:
        with torch.enable_grad(), _refusing_backward():
            loss = step()
        if not loss.requires_grad:
            return "The loss depends on no parameter that is trained."
        # A wrapper may freeze some of them in its forward pass (X-LoRA).
        trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
        gradients = iter(take(loss, trained))
        return loss.detach(), [next(gradients) if p.requires_grad else None for p in parameters.values()]
    except Exception as problem:  # reported on every rank, with what was being tried
        return f"{type(problem).__name__}: {problem}"


def _agree_on_failure(result: Gradients | str, where: str, context: process.ProcessContext) -> None:
    raise_on_all_ranks(f"A trial step {where} failed: {result}" if isinstance(result, str) else None, {}, context)


@contextlib.contextmanager
def _refusing_backward() -> Iterator[None]:
    """Within, a backward pass that does not go through the accelerator raises before it leaves a gradient anywhere.

    An engine may keep gradients elsewhere than in `parameter.grad` (ZeRO), so that nobody would see them there.
    """
    stock = torch.autograd.backward

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "The training step runs a backward pass of its own (loss.backward()), whose gradients cannot be compared. "
            "Add its loss to the one that is returned, or call accelerator.backward once."
        )

    torch.autograd.backward = refuse  # what Tensor.backward calls
    try:
        yield
    finally:
        torch.autograd.backward = stock


def _compare(
    whole: Gradients,
    sharded: Gradients,
    parameters: dict[str, nn.Parameter],
    context: process.ProcessContext,
    are_reduced: bool,
) -> TrialResult:
    """Return how far the mean over ranks of the sharded step is from the whole step of this rank."""
    whole_loss = float(whole[0].double().mean())
    sharded_loss = float(all_reduce(sharded[0].double().mean(), context.group)) / context.size
    squares, world = [], context.size * context.num_replicas
    for parameter, want, got in zip(parameters.values(), whole[1], sharded[1], strict=True):
        shape = getattr(parameter, "ds_shape", local(parameter).shape)  # ZeRO-3 has left nothing of it here
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        zeros = torch.zeros(shape, dtype=dtype, device=local(parameter).device)
        target = zeros if want is None else want.to(zeros)
        mean = zeros if got is None else got.to(zeros)
        is_shard = are_reduced and is_dtensor(parameter)
        if not is_shard:
            mean = all_reduce(mean, context.group) / context.size
        num_copies = world if are_reduced and not is_shard else 1
        squares.append(torch.stack([(x.double() ** 2).sum() / num_copies for x in (target, mean - target)]))
    summed = torch.stack(squares)
    if are_reduced:  # each rank has compared its shards of the parameters, and its copies of others
        for group in (context.group, context.replica_group):
            summed = summed if group is None else all_reduce(summed, group)
    norms, differences = summed.sqrt().T.tolist()
    if not max(norms) > 0:
        raise ValueError("No gradient reached the parameters that a trial step compares, so that it proves nothing.")
    floor = 1e-2 * max(norms)
    ratios = [d / max(n, floor, 1e-30) for d, n in zip(differences, norms, strict=True)]
    worst = max(range(len(ratios)), key=lambda n: ratios[n] if ratios[n] == ratios[n] else float("inf"))
    return TrialResult(
        loss=abs(sharded_loss - whole_loss) / max(abs(whole_loss), 1e-30),
        gradient=ratios[worst],
        parameter=list(parameters)[worst],
        whole_loss=whole_loss,
        sharded_loss=sharded_loss,
    )


@contextlib.contextmanager
def _compared(model: nn.Module, with_frozen: bool) -> Iterator[dict[str, nn.Parameter]]:
    """Choose the smallest parameters, as many as `MAX_COMPARED` elements allow, those that are trained first.

    Where the engine allows it, some frozen ones get gradients for the length of the trial, too: of an adapter, those
    that are trained may have none on a few tokens.
    """
    named = sorted((p.numel(), name, p) for name, p in model.named_parameters() if p.is_floating_point())
    chosen: dict[str, nn.Parameter] = {}
    budgets = {True: MAX_COMPARED, False: MAX_FROZEN} if with_frozen else {True: MAX_COMPARED}
    for trained, budget in budgets.items():
        for numel, name, parameter in named:
            if parameter.requires_grad == trained and (numel <= budget or not chosen):
                chosen[name] = parameter
                budget -= numel
    frozen = [parameter for parameter in chosen.values() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield chosen
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
