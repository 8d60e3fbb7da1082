"""Correct the batch sizes and token counts that a Trainer reports for sequences shared by several ranks.

The Trainer treats every process as a data-parallel replica. Its gradients are right with that (a shard is a batch of
its own), but its batch size and number of tokens are not: layouts add padding that one process does not have.
"""

import functools
import re
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from ..batch_metadata import METADATA_KEY, ContextParallelMetadata
from ..context import ProcessContext
from .exact_evaluation import current_evaluator


def correct_counters(trainer: Trainer, context: ProcessContext) -> None:
    """Replace the counting methods of a Trainer. Idempotent."""
    if "get_total_train_batch_size" not in vars(trainer):
        _correct_batch_size(trainer, context)
        _correct_input_tokens(trainer)
        _correct_num_items(trainer)
    if hasattr(trainer, "_total_train_tokens") and "training_step" not in vars(trainer):
        _correct_sft_tokens(trainer)


def count_tokens(batch: ContextParallelMetadata, num_rows: int, with_padding: bool) -> int:
    """Return the number of tokens of a whole batch, with or without the padding of the inner collator."""
    if with_padding or batch.sequence.num_tokens is None:
        return num_rows * batch.unpadded_length
    return sum(batch.sequence.num_tokens)


def _correct_batch_size(trainer: Trainer, context: ProcessContext) -> None:
    """Correct the sequences per optimizer step in the log, the samples per second, and the model card."""
    original_size = trainer.get_total_train_batch_size
    original_card = trainer.create_model_card

    def get_total_train_batch_size(args: Any) -> int:
        return original_size(args) // context.size

    @functools.wraps(original_card)
    def create_model_card(*args: Any, **kwargs: Any) -> None:
        original_card(*args, **kwargs)
        card = Path(str(trainer.args.output_dir)) / "README.md"
        if trainer.is_world_process_zero() and card.exists():
            size = f"- total_train_batch_size: {get_total_train_batch_size(trainer.args)}"
            card.write_text(re.sub(r"(?m)^- total_train_batch_size: \d+$", size, card.read_text()))

    trainer.get_total_train_batch_size = get_total_train_batch_size
    trainer.create_model_card = create_model_card


def _correct_input_tokens(trainer: Trainer) -> None:
    """Have `include_num_input_tokens_seen` count the tokens that one process counts."""
    original = getattr(trainer, "_track_num_input_tokens", None)
    if original is None:
        return

    def track(inputs: dict[str, Any]) -> None:
        batch, mode = inputs.get(METADATA_KEY), trainer.args.include_num_input_tokens_seen
        if mode == "no" or not isinstance(batch, ContextParallelMetadata):
            return original(inputs)
        num_tokens = count_tokens(batch, inputs["input_ids"].shape[0], with_padding=mode == "all")
        trainer.state.num_input_tokens_seen += _sum_over_replicas(trainer, num_tokens, batch)

    trainer._track_num_input_tokens = track


def _correct_num_items(trainer: Trainer) -> None:
    """Count targets as the Trainer does for this class in one process.

    For classes without a `loss_type` (GPT-2, BERT), the Trainer counts labels without shifting them first. It
    therefore counts the first label of a row, which no token predicts.
    """
    original = getattr(trainer, "_get_num_items_in_batch", None)
    if original is None or getattr(trainer, "_loss_shifts_labels", True):
        return

    def count(batch_samples: list, *args: Any, **kwargs: Any) -> Any:
        unshifted = [{key: x for key, x in batch.items() if key != "shift_labels"} for batch in batch_samples]
        return original(unshifted, *args, **kwargs)

    trainer._get_num_items_in_batch = count
    evaluator = current_evaluator()
    if evaluator is not None:
        evaluator.counts_first_labels = True


def _correct_sft_tokens(trainer: Any) -> None:
    """Correct TRL's `num_tokens`, which TRL reads from an attention mask that shards do not have."""
    original = trainer.training_step

    def training_step(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        batch, before = inputs.get(METADATA_KEY), trainer._total_train_tokens
        num_rows = inputs["input_ids"].shape[0]
        loss = original(model, inputs, *args, **kwargs)
        if isinstance(batch, ContextParallelMetadata) and trainer._total_train_tokens != before:
            trainer._total_train_tokens = before + _sum_over_replicas(
                trainer, count_tokens(batch, num_rows, with_padding=False), batch
            )
            trainer._metrics["train"]["num_tokens"] = [trainer._total_train_tokens]
        return loss

    trainer.training_step = training_step


def _sum_over_replicas(trainer: Trainer, num_tokens: int, batch: ContextParallelMetadata) -> int:
    """Return the sum over replicas: of the ranks that share a batch, only the first contributes its tokens."""
    contribution = num_tokens if batch.rank == 0 else 0
    gathered = trainer.accelerator.gather(torch.tensor(contribution, device=trainer.args.device, dtype=torch.int64))
    return int(gathered.sum())
