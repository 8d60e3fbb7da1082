"""A Trainer whose loss is the weighted mean over all targets of an optimizer step.

With `loss_weights`, the loss of a model is `sum(weight * loss) / num_items_in_batch`. The Trainer passes the number of
targets there, over the micro-batches and ranks of the step. `count_loss_weights` has it pass the sum of their weights.
With weights that sum to 1 for every example (`ring_hf.data.weigh_examples`), that sum is the number of examples, and
the loss the mean over examples.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Trainer

from ..batch_metadata import IGNORE_INDEX
from .exact_evaluation import current_evaluator

COLUMN = "loss_weights"


def count_loss_weights(trainer: Trainer) -> None:
    """Have a Trainer divide the loss of each optimizer step by the sum of the `loss_weights` of its targets.

    The sum is taken over micro-batches and ranks, in training and in evaluation, with context parallelism or without.
    Batches without weights are counted as before.

    Args:
        trainer: a Trainer of Transformers, before `train()`. Its model takes the loss in blocks
            (`ring_hf.memory.apply`), as no other loss knows weights.

    Raises:
        ValueError: if the Trainer would drop the weights, or its model does not take the number of items.
    """
    if trainer.args.remove_unused_columns:
        raise ValueError(
            f"remove_unused_columns=True: the Trainer would drop the column {COLUMN}, which is no argument of the "
            "model's forward. Set it to False in TrainingArguments."
        )
    if not trainer.model_accepts_loss_kwargs:
        raise ValueError(
            f"{type(trainer.model).__name__} takes no num_items_in_batch, so its loss is a mean over each batch alone "
            "and cannot be weighted over an optimizer step. Use a model whose forward takes **kwargs."
        )
    original = trainer._get_num_items_in_batch

    @functools.wraps(original)
    def count(batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        has_weights = [batch.get(COLUMN) is not None for batch in batch_samples]
        if not any(has_weights):
            return original(batch_samples, device)
        if not all(has_weights):
            raise ValueError(
                f"Some batches of an optimizer step have {COLUMN} and others do not. Give all rows of a dataset the "
                "column."
            )
        total = sum_weights(batch_samples).to(device)
        if trainer.args.average_tokens_across_devices and trainer.args.world_size > 1:
            total = trainer.accelerator.gather(total).sum()
        return total

    trainer._get_num_items_in_batch = count
    evaluator = current_evaluator()
    if evaluator is not None:
        evaluator.counts_weights = True


def sum_weights(batches: Sequence[dict[str, Any]]) -> torch.Tensor:
    """Return the sum of the weights of all targets in these batches, a scalar.

    Args:
        batches: `labels` and `loss_weights` of shape [B, S], or with `shift_labels`, both already shifted.
    """
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        is_shifted = "shift_labels" in batch
        labels = batch["shift_labels"] if is_shifted else batch["labels"][..., 1:]
        weights = batch[COLUMN] if is_shifted else batch[COLUMN][..., 1:]
        total += (weights * (labels != IGNORE_INDEX)).sum(dtype=torch.float64).cpu()
    return total.float()
