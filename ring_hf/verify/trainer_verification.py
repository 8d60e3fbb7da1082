"""Verify a model, or the first batches of a Trainer, against one process: `verify_model` and `verify_trainer`.

Both run in processes that `accelerate launch` (or torchrun) started, one call on every rank. The Trainer prepares
model, engine and batches as for training; its first training steps are compared (`step_comparison.py`), and no
optimizer step is taken. `verify_first_steps` compares them in a training that then goes on.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import ring_hf

from ..hf import context as process
from ..hf.batch_metadata import METADATA_KEY, ContextParallelMetadata
from ..hf.collate.collator import ContextParallelCollator
from ..hf.refusal import raise_on_all_ranks, record_refusals
from ..hf.trainer.callback import enable_logging
from ..hf.trainer.model_guard import base_model, guard_model
from ..hf.trainer.parallelism_config import ContextParallelConfig
from ..parallel import num_processes
from .batch_restoration import restore_batch
from .model_verification import ModelVerification, combine
from .step_comparison import StepComparison

logger = logging.getLogger("ring_hf")

REFERENCES = ("auto", "sdpa", "eager", "own")
_OWN_FOLDER = Path(ring_hf.__file__).resolve().parent


class _VerificationEnded(Exception):
    """Ends `trainer.train()` after the last comparison."""


class VerifyFirstSteps(TrainerCallback):
    """Compares the first training steps of a Trainer with one process.

    Args:
        trainer: whose steps to compare.
        num_steps: training steps (micro-batches), each a batch of its own.
        max_length: tokens of a row that are compared; None: all.
        reference: attention of whole sequences, see `verify_model`.
        trains: whether training goes on afterwards; otherwise it ends before the first optimizer step.

    Raises:
        ValueError: in the training step, on every rank, if training is to go on and a step is not exact.
    """

    def __init__(self, trainer: Trainer, num_steps: int, max_length: int | None, reference: str, trains: bool) -> None:
        if num_steps < 1:
            raise ValueError(f"{num_steps} steps to verify: give at least 1.")
        if reference not in REFERENCES:
            raise ValueError(f"reference={reference!r} is not known. Choose from {', '.join(REFERENCES)}.")
        self.trainer, self.num_steps, self.max_length = trainer, num_steps, max_length
        self.reference, self.trains = reference, trains
        self.results: list[ModelVerification] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Replace the Trainer's training step until all comparisons are done."""
        if process.current() is None:
            raise ValueError(
                "One process holds the whole sequences, so there is nothing to compare. Start several processes that "
                "share each sequence (context_parallel_size), or leave the verification out."
            )
        trainer = self.trainer
        first_step = trainer.training_step  # begins with a trial step, if one is due
        own_step = first_step.__wrapped__ if hasattr(first_step, "begins_with_trial") else first_step
        replaced = vars(trainer).get("training_step")

        @functools.wraps(first_step)
        def training_step(wrapped: Any, inputs: Any, num_items_in_batch: Any = None, **more: Any) -> Any:
            nonlocal replaced
            self.results.append(self._compare(own_step, inputs, num_items_in_batch))
            is_last = len(self.results) >= self.num_steps or not self.results[-1].is_exact
            if not self.trains and not is_last:
                return torch.zeros((), device=trainer.args.device)
            if replaced is None:
                del trainer.training_step
            else:
                trainer.training_step = replaced
            if not self.trains:
                raise _VerificationEnded
            self._report(self.results[-1])
            loss = trainer.training_step(wrapped, inputs, num_items_in_batch, **more)
            if not is_last:
                replaced = vars(trainer).get("training_step")
                trainer.training_step = training_step
            return loss

        trainer.training_step = training_step

    def _compare(self, own_step: Any, inputs: Any, num_items_in_batch: Any) -> ModelVerification:
        context, trainer = process.current(), self.trainer
        assert context is not None
        model = base_model(trainer.model)
        inputs = trainer._prepare_inputs(inputs)
        metadata = inputs.get(METADATA_KEY)
        is_sharded = isinstance(metadata, ContextParallelMetadata)
        error = None if is_sharded else getattr(metadata, "message", "The batch comes from another collator.")
        raise_on_all_ranks(error, {}, context)
        batch = restore_batch(inputs, self.max_length, model)
        comparison = StepComparison(
            trainer, own_step, model, guard_model(model), self.reference, num_items_in_batch is not None
        )
        return comparison.compare(batch)

    def _report(self, result: ModelVerification) -> None:
        if result.is_exact:
            if self.trainer.is_world_process_zero():
                enable_logging()
                logger.info("verified batch %d of %d\n%s", len(self.results), self.num_steps, result.report())
            return
        raise ValueError(f"the model on shards is not that of one process:\n{result.report()}")


def verify_first_steps(trainer: Trainer, num_steps: int = 1, max_length: int | None = None) -> None:
    """Have a Trainer compare its first training steps with one process before it takes them.

    Each rank also computes the whole sequences of the step, so it needs the memory of one process at that length, and
    memory for the gradients of all trained parameters, twice.

    Args:
        trainer: with a `ContextParallelConfig`, before `train()`.
        num_steps: training steps (micro-batches) to compare.
        max_length: tokens of a row that are compared; None: all.

    Raises:
        ValueError: if an argument is wrong; `trainer.train()` raises it with the report if a step is not exact.
    """
    trainer.add_callback(VerifyFirstSteps(trainer, num_steps, max_length, "auto", trains=True))


def verify_trainer(
    trainer: Trainer, num_steps: int = 1, max_length: int | None = None, reference: str = "auto"
) -> ModelVerification:
    """Compare the first training steps of a Trainer with one process, and train nothing. A collective call.

    Args:
        trainer: with a `ContextParallelConfig`. It cannot be used afterwards.
        num_steps: training steps (micro-batches) to compare.
        max_length: tokens of a row that are compared; None: all.
        reference: attention of whole sequences, see `verify_model`.

    Returns:
        The verdict, the same on every rank.
    """
    callback = VerifyFirstSteps(trainer, num_steps, max_length, reference, trains=False)
    trainer.add_callback(callback)
    trainer.args.gradient_accumulation_steps = num_steps  # no optimizer step between the comparisons
    try:
        trainer.train()
    except _VerificationEnded:
        return combine(callback.results)
    except ValueError as error:
        if not is_refusal(error):
            raise
        return ModelVerification("refused", str(error))
    return combine(callback.results)


def verify_model(
    model: PreTrainedModel,
    examples: Sequence[dict[str, Any]],
    arguments: TrainingArguments | None = None,
    *,
    collator: Any = None,
    reference: str = "auto",
    past_refusals: bool = False,
) -> ModelVerification:
    """Compare a model and a batch through one process with the same through the ranks of a sequence.

    A collective call. Loss, logits by position, gradients of all trained parameters and the grad norm are compared. If
    one differs by more than rounding, the result names the first module, tensor and tokens that differ, and what
    usually causes that.

    Args:
        model: with a ring backend as its attention.
        examples: rows as the collator takes them, `input_ids` and optionally labels and others.
        arguments: with a `ContextParallelConfig`. Default: all processes share each row, and one batch has all
            examples.
        collator: the default is `ContextParallelCollator(model)`.
        reference: attention of whole sequences: "sdpa" or "eager" of Transformers, "own" for that of the backend in
            one process, or "auto" for the one of Transformers that computes what the model asks for ("own" where
            weights are in half precision).
        past_refusals: compare a model although a rule refuses it, and report the rule's message.

    Returns:
        The verdict, the same on every rank: "exact", "different", "refused" or "failed".
    """
    with contextlib.ExitStack() as stack:
        if arguments is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            arguments = default_arguments(folder, len(examples), use_cpu=model.device.type == "cpu")
        refusals = stack.enter_context(record_refusals()) if past_refusals else []
        try:
            trainer = Trainer(
                model,
                arguments,
                train_dataset=list(examples),
                data_collator=collator or ContextParallelCollator(model),
            )
            for callback in (PrinterCallback, ProgressCallback):
                trainer.remove_callback(callback)
            result = verify_trainer(trainer, reference=reference)
        except ValueError as error:
            if not is_refusal(error):
                raise
            result = ModelVerification("refused", str(error))
        return dataclasses.replace(result, refusals=tuple(refusals))


def default_arguments(folder: str, num_rows: int, use_cpu: bool, **settings: Any) -> TrainingArguments:
    """Return arguments under which all processes share each row, and nothing is logged, evaluated or saved.

    Args:
        folder: that nothing is written to.
        num_rows: of a batch.
        use_cpu: whether the processes compute on the CPU.
        settings: of `TrainingArguments`, which replace these.
    """
    defaults: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": 1,
        "per_device_train_batch_size": num_rows,
        "train_sampling_strategy": "sequential",
        "use_cpu": use_cpu,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "ddp_find_unused_parameters": False,
    }
    if "parallelism_config" not in settings:
        num_ranks = int(os.environ.get("WORLD_SIZE", num_processes()))
        defaults["parallelism_config"] = ContextParallelConfig(context_parallel_size=num_ranks)
    return TrainingArguments(**{**defaults, **settings})


def is_refusal(error: ValueError) -> bool:
    """Return whether a statement of ring_hf raised an error, and not an operation that failed."""
    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename).resolve().is_relative_to(_OWN_FOLDER)
