"""The evaluation loss of a Trainer that computes it outside of the model, such as TRL's SFTTrainer.

A loss that the model computes is that of the whole batch on every rank (`exact_evaluation.py`). An overridden
`compute_loss` sees one shard. If it computes the sum over the targets of the shard, divided by `num_items_in_batch`
and multiplied by the number of processes as the Trainer does, the mean over ranks is exact. So it gets the number of
targets of all ranks, and its losses are averaged. A trial on a few tokens, sharded and whole, checks before the first
batch that it computes this sum.
"""

import functools
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer

from ring_hf.parallel import all_reduce

from .. import context as process
from ..batch_metadata import METADATA_KEY, ContextParallelMetadata
from ..refusal import raise_on_all_ranks
from ..runtime.full_precision import trains_half_weights
from ..runtime.preserved_state import preserve_state
from ..runtime.runtime_state import runtime_state
from ..runtime.trial_inputs import make_trial_inputs
from ..runtime.trial_step import HALF_PRECISION_TOLERANCES, TOLERANCES
from .exact_evaluation import current_evaluator
from .model_guard import ModelGuard
from .sft_trainer import is_sft_trainer


def wrap_compute_loss(trainer: Trainer, model: PreTrainedModel, guard: ModelGuard) -> None:
    """Average the evaluation losses of an overridden `compute_loss` over ranks. Idempotent.

    In evaluation, the wrapped method raises a ValueError on every rank if a trial shows that its loss is not exact.
    """
    if type(trainer).compute_loss is Trainer.compute_loss or "compute_loss" in vars(trainer):
        return
    original = trainer.compute_loss
    is_proven = False
    evaluator = current_evaluator()
    if evaluator is not None:
        evaluator.scalars_are_sums = is_sft_trainer(type(trainer))

    @functools.wraps(original)
    def compute_loss(wrapped: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal is_proven
        context, evaluator = process.current(), current_evaluator()
        is_sharded = isinstance(inputs.get(METADATA_KEY), ContextParallelMetadata)
        if model.training or context is None or evaluator is None or not is_sharded or inputs.get("labels") is None:
            return original(wrapped, inputs, *args, **kwargs)
        if not is_proven:
            _run_trial(trainer, original, model, guard, inputs, context)
            is_proven = True
        kwargs["num_items_in_batch"] = evaluator.prepare_inputs(inputs[METADATA_KEY], inputs)["num_items_in_batch"]
        result = original(wrapped, inputs, *args, **kwargs)
        if isinstance(result, tuple):
            return evaluator.mean_over_ranks(result[0]), *result[1:]
        return evaluator.mean_over_ranks(result)

    trainer.compute_loss = compute_loss


def _run_trial(
    trainer: Trainer,
    original: Any,
    model: PreTrainedModel,
    guard: ModelGuard,
    inputs: dict[str, Any],
    context: process.ProcessContext,
) -> None:
    """Raise on every rank unless the loss of a few tokens is the same on shards and on whole sequences."""
    trial_inputs = make_trial_inputs(model, inputs, context)
    num_targets = trial_inputs.num_targets
    unwrapped = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    world_size = context.size * context.num_replicas

    def compute_loss(inputs: dict[str, Any], num_items: int) -> float:
        num_items_in_batch = torch.tensor(float(num_items), device=inputs["input_ids"].device)
        return float(original(unwrapped, dict(inputs), num_items_in_batch=num_items_in_batch).mean())

    guard.in_trial = True
    error = None
    whole_loss = sharded_loss = 0.0
    try:
        with preserve_state(model, trainer), torch.no_grad():
            with process.whole_sequences():
                whole_loss = compute_loss(trial_inputs.whole, world_size * num_targets)
            sharded_loss = compute_loss(trial_inputs.sharded, context.num_replicas * num_targets)
    except Exception as failure:  # raised on every rank below
        error = f"A trial of the evaluation loss on a few tokens failed: {type(failure).__name__}: {failure}"
    finally:
        guard.in_trial = False
        runtime_state.evaluation_batch = None
    raise_on_all_ranks(error, {}, context)
    sharded_loss = float(all_reduce(torch.tensor(sharded_loss, dtype=torch.float64), context.group)) / context.size
    is_half = model.dtype not in TOLERANCES or trains_half_weights(model)
    tolerance = (HALF_PRECISION_TOLERANCES if is_half else TOLERANCES[model.dtype]).loss
    if abs(sharded_loss - whole_loss) > tolerance * abs(whole_loss):
        error = (
            f"{type(trainer).__name__} computes its evaluation loss from one shard of a sequence: {sharded_loss:.7g} "
            f"on shards, {whole_loss:.7g} on whole sequences of {num_targets} targets. Set eval_strategy='no', or let "
            "compute_loss take the sum over shift_labels divided by num_items_in_batch."
        )
    raise_on_all_ranks(error, {}, context)
