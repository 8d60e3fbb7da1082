"""The evaluation loss of a Trainer that computes it outside of the model, such as TRL's SFTTrainer.

What the model computes itself is that of the whole batch on every rank (`evaluation.py`). A `compute_loss` of its own
sees one shard. If it takes the sum over its targets divided by `num_items_in_batch`, times the number of processes as
the Trainer does, the mean over ranks is exact: so it is told the number of targets of all ranks, and its losses are
averaged. Whether it does so is tried on a few tokens, sharded and whole, before the first batch.
"""

import functools
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer

from ring_hf.parallel import all_reduce

from .. import context as process
from ..batch_metadata import METADATA_KEY, ContextParallelMetadata
from ..refusal import raise_on_all_ranks
from ..runtime.preserved_state import preserved
from ..runtime.runtime_state import runtime_state
from ..runtime.trial_inputs import make_inputs
from ..runtime.trial_step import LOW_PRECISION, TOLERANCES
from .exact_evaluation import Evaluator, current_evaluator
from .model_guard import Guard


def install(trainer: Trainer, model: PreTrainedModel, guard: Guard) -> None:
    """Wrap a Trainer's own `compute_loss`; Transformers' own needs nothing. Idempotent."""
    if type(trainer).compute_loss is Trainer.compute_loss or "compute_loss" in vars(trainer):
        return
    stock = trainer.compute_loss
    is_proven = False
    evaluator = current_evaluator()
    if evaluator is not None:
        evaluator.scalars_are_sums = any(_is_sft(kind) for kind in type(trainer).__mro__)

    @functools.wraps(stock)
    def compute_loss(wrapped: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal is_proven
        context, evaluator = process.current(), current_evaluator()
        sharded = isinstance(inputs.get(METADATA_KEY), ContextParallelMetadata) and inputs.get("labels") is not None
        if model.training or context is None or evaluator is None or not sharded:
            return stock(wrapped, inputs, *args, **kwargs)
        if not is_proven:
            _try(trainer, stock, model, guard, inputs, context, evaluator)
            is_proven = True
        kwargs["num_items_in_batch"] = evaluator.prepare(inputs[METADATA_KEY], inputs)["num_items_in_batch"]
        result = stock(wrapped, inputs, *args, **kwargs)
        if isinstance(result, tuple):
            return evaluator.mean_over_ranks(result[0]), *result[1:]
        return evaluator.mean_over_ranks(result)

    trainer.compute_loss = compute_loss


def _is_sft(kind: type) -> bool:
    """TRL's SFTTrainer gathers sums: tokens that count, their entropy, those that were predicted rightly."""
    return kind.__name__ == "SFTTrainer" and kind.__module__.split(".")[0] == "trl"


def _try(
    trainer: Trainer,
    stock: Any,
    model: PreTrainedModel,
    guard: Guard,
    inputs: dict[str, Any],
    context: process.ProcessContext,
    evaluator: Evaluator,
) -> None:
    """Raise on every rank unless the loss of a few tokens is the same on shards and on whole sequences."""
    few = make_inputs(model, inputs, context)
    unwrapped = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    world = context.size * context.num_replicas

    def loss_of(inputs: dict[str, Any], count: int) -> float:
        given = torch.tensor(float(count), device=inputs["input_ids"].device)
        return float(stock(unwrapped, dict(inputs), num_items_in_batch=given).mean())

    guard.in_trial = True
    error, whole, sharded = None, 0.0, 0.0
    try:
        with preserved(model, trainer), torch.no_grad():
            with process.whole_sequences():
                whole = loss_of(few.whole, world * few.num_targets)
            sharded = loss_of(few.sharded, context.num_replicas * few.num_targets)
    except Exception as problem:  # reported on every rank
        error = f"The evaluation loss could not be tried on a few tokens: {type(problem).__name__}: {problem}"
    finally:
        guard.in_trial = False
        runtime_state.batch = None
    raise_on_all_ranks(error, {}, context)
    sharded = float(all_reduce(torch.tensor(sharded, dtype=torch.float64), context.group)) / context.size
    bar = TOLERANCES.get(model.dtype, LOW_PRECISION)[0]
    if abs(sharded - whole) > bar * abs(whole):
        error = (
            f"{type(trainer).__name__} computes its evaluation loss from one shard of a sequence: {sharded:.7g} on "
            f"shards, {whole:.7g} on whole sequences of {few.num_targets} targets. Set eval_strategy='no', or let "
            "compute_loss take the sum over shift_labels divided by num_items_in_batch."
        )
    raise_on_all_ranks(error, {}, context)
