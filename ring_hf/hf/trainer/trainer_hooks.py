"""What is done to a Trainer that callbacks cannot do: find it, try its training step, keep its random numbers in step.

Transformers hands its callbacks everything but the Trainer itself. It is the `self` of a frame above the callback.
"""

import functools
import hashlib
import random
import sys
import types
from typing import Any

import numpy
import torch
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import seed_worker

from ring_hf.parallel import broadcast_object, gather_numbers

from .. import context as process
from ..runtime.proven_classes import find_unproven_path
from ..runtime.runtime_state import runtime_state
from ..runtime.trial_step import run_trial
from .engines import engine_of, gradient_method
from .exact_evaluation import current_evaluator
from .model_guard import Guard


def find_trainer() -> Trainer | None:
    """Return the Trainer that is calling, or None if something else calls the callback."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner
        frame = frame.f_back
    return None


# The trial step


def arm_trial(trainer: Trainer, model: PreTrainedModel, guard: Guard) -> None:
    """Have the Trainer's first training step begin with a trial step, if something in its path is not proven."""
    context = process.current()
    reason = find_unproven_path(trainer)
    if context is None or current_evaluator() is None or (reason is None and not context.verify):
        return
    stock, replaced = trainer.training_step, "training_step" in vars(trainer)
    if hasattr(stock, "begins_with_trial"):
        return  # an earlier train() that took no step

    @functools.wraps(stock)
    def training_step(wrapped: Any, inputs: dict[str, Any], num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        if replaced:
            trainer.training_step = stock
        else:
            del trainer.training_step
        _take_trial(trainer, model, guard, inputs, num_items_in_batch, reason or "verify=True", context)
        return stock(wrapped, inputs, num_items_in_batch, **kwargs)

    training_step.begins_with_trial = True  # type: ignore[attr-defined]
    trainer.training_step = training_step


def _take_trial(
    trainer: Trainer,
    model: PreTrainedModel,
    guard: Guard,
    inputs: dict[str, Any],
    num_items: Any,
    reason: str,
    context: process.ProcessContext,
) -> None:
    unwrapped = trainer.accelerator.unwrap_model(trainer.model_wrapped)

    def step(few: dict[str, Any], count: float | None) -> torch.Tensor:
        runtime_state.captured = []
        try:
            given = None if count is None else torch.as_tensor(num_items).new_tensor(count)
            trainer.training_step(unwrapped, few, given)
            captured = runtime_state.captured
        finally:
            runtime_state.captured = None
        if len(captured) != 1:
            raise ValueError(
                f"{type(trainer).__name__}.training_step calls accelerator.backward {len(captured)} times, not once, "
                "so that its loss cannot be compared. Use a Trainer that leaves the backward pass to Accelerate."
            )
        return captured[0]

    method = gradient_method(engine_of(context, model), reason)
    guard.in_trial = True
    try:
        guard.allowed_outputs = run_trial(
            model,
            inputs,
            step,
            reason,
            context,
            count=num_items is not None,
            owner=trainer,
            method=method,
        )
    finally:
        guard.in_trial = False


# Random numbers


def seed_workers_by_replica(loader: Any, context: process.ProcessContext) -> None:
    """Let loader workers of all ranks that share a sequence draw the same numbers: Transformers seeds them by the
    process."""
    loader = getattr(loader, "base_dataloader", loader)
    init = getattr(loader, "worker_init_fn", None)
    if isinstance(init, functools.partial) and init.func is seed_worker:
        loader.worker_init_fn = functools.partial(init.func, *init.args, **{**init.keywords, "rank": context.replica})


class RandomStates:
    """The global generators of all processes, from which samplers and augmentations draw.

    Transformers seeds them alike. A callback that samples text on rank 0 moves that rank's on, and the samplers of the
    next epoch would deal other rows to it: so every epoch begins with the states of the first process, as it would in
    a run of one process. Where processes began with different states on purpose, nothing is changed: the comparison
    of batches will tell whether ranks that share a sequence drift apart.
    """

    def __init__(self) -> None:
        self._began_alike = False

    def start(self, device: torch.device) -> None:
        """Note whether all processes begin with the same states. A collective call."""
        self._began_alike = _are_alike(device)

    def align(self, device: torch.device) -> None:
        """Take the states of the first process, if they have come to differ. A collective call."""
        if self._began_alike and not _are_alike(device):
            python, numpys, torchs = broadcast_object(_states())
            random.setstate(python)
            numpy.random.set_state(numpys)
            torch.set_rng_state(torchs)


def _states() -> tuple[Any, Any, torch.Tensor]:
    return random.getstate(), numpy.random.get_state(), torch.get_rng_state()


def _are_alike(device: torch.device) -> bool:
    python, numpys, torchs = _states()
    state = repr((python, numpys[2:])).encode() + numpys[1].tobytes() + torchs.numpy().tobytes()
    digest = int.from_bytes(hashlib.blake2b(state, digest_size=8).digest(), signed=True)
    return len({tuple(numbers) for numbers in gather_numbers([digest], device)}) == 1
