"""Hooks into a Trainer that callbacks do not provide: find it, try its training step, synchronize its random numbers.

Transformers passes everything to its callbacks but the Trainer itself, which is the `self` of a calling frame.
"""

import functools
import hashlib
import random
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy
import torch
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import seed_worker

from ring_hf.parallel import broadcast_object, gather_numbers, share_reason

from .. import context as process
from ..runtime.proven_classes import find_unproven_part
from ..runtime.runtime_state import runtime_state
from ..runtime.trial_step import run_trial
from .engines import engine_of, require_gradient_method
from .exact_evaluation import current_evaluator
from .model_guard import ModelGuard


def find_trainer() -> Trainer | None:
    """Return the Trainer in a calling frame, or None if there is none."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner
        frame = frame.f_back
    return None


# The trial step


def enable_trial_step(trainer: Trainer, model: PreTrainedModel, guard: ModelGuard) -> None:
    """Begin the Trainer's first training step with a trial step, if some part of it is not proven by name. A
    collective call of all processes.

    The replaced `training_step` raises a ValueError on every rank if the trial differs from one process. All ranks
    take it if one has to (a hook that logs on the first rank only, for example), since it needs all of them.
    """
    context = process.current()
    if context is None or current_evaluator() is None:
        return
    reason = share_reason(find_unproven_part(trainer))
    if reason is None and not context.verify:
        return
    original = trainer.training_step
    was_replaced = "training_step" in vars(trainer)
    if hasattr(original, "begins_with_trial"):
        return  # an earlier train() that took no step

    @functools.wraps(original)
    def training_step(wrapped: Any, inputs: dict[str, Any], num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        if was_replaced:
            trainer.training_step = original
        else:
            del trainer.training_step
        _run_trial(trainer, model, guard, inputs, num_items_in_batch, reason or "verify=True", context)
        return original(wrapped, inputs, num_items_in_batch, **kwargs)

    training_step.begins_with_trial = True  # type: ignore[attr-defined]
    trainer.training_step = training_step


def _run_trial(
    trainer: Trainer,
    model: PreTrainedModel,
    guard: ModelGuard,
    inputs: dict[str, Any],
    num_items_in_batch: Any,
    reason: str,
    context: process.ProcessContext,
) -> None:
    def step(trial_inputs: dict[str, Any], num_items: float | None) -> torch.Tensor:
        count = None if num_items is None else torch.as_tensor(num_items_in_batch).new_tensor(num_items)
        return capture_loss(trainer, trainer.training_step, trial_inputs, count)

    guard.in_trial = True
    try:
        guard.allowed_outputs = run_trial(
            model,
            inputs,
            step,
            reason,
            context,
            pass_num_items=num_items_in_batch is not None,
            trainer=trainer,
            method=require_gradient_method(engine_of(context, model), reason),
        )
    finally:
        guard.in_trial = False


def capture_loss(
    trainer: Trainer, training_step: Callable[..., Any], inputs: dict[str, Any], num_items_in_batch: Any
) -> torch.Tensor:
    """Return the loss (a scalar) that a training step hands to its backward pass, and run no backward pass.

    The model runs outside of the wrapper of its engine where that is possible.

    Args:
        training_step: the Trainer's own, or the function that replaced it.
        num_items_in_batch: targets of all ranks, or None where the Trainer passes none.

    Raises:
        ValueError: if the step runs another number of backward passes than one.
    """
    unwrapped = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    runtime_state.captured_losses = []
    try:
        training_step(unwrapped, inputs, num_items_in_batch)
        losses = runtime_state.captured_losses
    finally:
        runtime_state.captured_losses = None
    if len(losses) != 1:
        raise ValueError(
            f"{type(trainer).__name__}.training_step calls accelerator.backward {len(losses)} times, not once, so its "
            "loss cannot be compared. Use a Trainer that leaves the backward pass to Accelerate."
        )
    return losses[0]


# Random numbers


def seed_workers_by_replica(loader: Any, context: process.ProcessContext) -> None:
    """Seed the workers of a data loader by the replica, so that ranks that share a sequence draw the same numbers.
    Transformers seeds them by the process."""
    loader = getattr(loader, "base_dataloader", loader)
    init = getattr(loader, "worker_init_fn", None)
    if isinstance(init, functools.partial) and init.func is seed_worker:
        keywords = {**init.keywords, "rank": context.replica}
        loader.worker_init_fn = functools.partial(init.func, *init.args, **keywords)


class RngSynchronizer:
    """Keeps the global random number generators of all processes equal, from which samplers and augmentations draw.

    Transformers seeds them alike. A callback that samples text on rank 0 advances the generators of that rank alone,
    whose samplers would then choose other rows in the next epoch. So every epoch begins with the states of the first
    process, as in a run of one process. If processes start with different states on purpose, nothing is changed: the
    comparison of batches detects whether ranks that share a sequence drift apart.
    """

    def __init__(self) -> None:
        self._started_equal = False

    def record_start(self, device: torch.device) -> None:
        """Record whether all processes start with the same states. A collective call.

        Args:
            device: where the collective runs.
        """
        self._started_equal = _are_equal_across_processes(device)

    def synchronize(self, device: torch.device) -> None:
        """Load the states of the first process if they differ now but did not at the start. A collective call.

        Args:
            device: where the collective runs.
        """
        if self._started_equal and not _are_equal_across_processes(device):
            python_state, numpy_state, torch_state = broadcast_object(_get_states())
            random.setstate(python_state)
            numpy.random.set_state(numpy_state)
            torch.set_rng_state(torch_state)


def _get_states() -> tuple[Any, Any, torch.Tensor]:
    return random.getstate(), numpy.random.get_state(), torch.get_rng_state()


def _are_equal_across_processes(device: torch.device) -> bool:
    python_state, numpy_state, torch_state = _get_states()
    state = repr((python_state, numpy_state[2:])).encode() + numpy_state[1].tobytes() + torch_state.numpy().tobytes()
    digest = int.from_bytes(hashlib.blake2b(state, digest_size=8).digest(), signed=True)
    return len({tuple(numbers) for numbers in gather_numbers([digest], device)}) == 1
