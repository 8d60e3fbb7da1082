"""Shared by the training recipes: the command line, the settings of every run, the model, and the run itself.

A recipe parses its arguments with `parse_run`, builds its datasets, its model with `load_training_model` and a Trainer
of its choice, and hands that to `train_and_save`.
"""

import logging
import os
from typing import Any

import datasets
import torch
import transformers
from arguments import MemoryArguments, ModelArguments, parse
from loading import load_model
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

import ring_hf


def parse_run(dataclass_types: tuple[Any, ...], description: str, argv: list[str] | None = None) -> tuple[Any, ...]:
    """Parse the command line of a training run, and apply the settings that all runs share.

    Args:
        dataclass_types: their fields are the keys; the last one is `TrainingArguments` or a subclass.
        description (`str`): shown by --help.
        argv (*optional*): instead of the command line.

    Returns:
        One instance per dataclass. Random numbers are seeded.

    Raises:
        ValueError: if a key does not exist or a value is not allowed.
    """
    arguments = parse(
        dataclass_types,
        description,
        argv,
        use_cpu=not torch.accelerator.is_available(),  # otherwise each process looks for its GPU
        ddp_find_unused_parameters=False,  # a causal language model uses all of them
    )
    training_args = arguments[-1]
    log_in_main_process_only(training_args)
    keep_shards_of_gradients(training_args)
    set_seed(training_args.seed)
    return arguments


def load_training_model(
    model_args: ModelArguments, memory_args: MemoryArguments, tokenizer: Any, max_length: int
) -> Any:
    """Return the model with its positions set for `max_length` tokens and the memory options applied."""
    model = load_model(model_args, tokenizer, max_length)
    model.config.use_cache = False
    ring_hf.memory.apply(model, memory_args.config())
    return model


def train_and_save(trainer: Trainer, checkpoint: str | None) -> None:
    """Train, from a checkpoint if there is one, and write model, metrics and state to output_dir.

    `trainer_state.json` is written last: a run that has one is complete (see `checkpoints.is_finished`).
    """
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.model.config.use_cache = True  # it was off for training
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    trainer.accelerator.wait_for_everyone()  # if a rank ended while another writes, the launcher would kill that one


def keep_shards_of_gradients(training_args: TrainingArguments) -> None:
    """Under FSDP2, reduce gradients after every micro-batch; else each rank keeps whole ones until the last."""
    settings = training_args.accelerator_config
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true" and settings.gradient_accumulation_kwargs is None:
        settings.gradient_accumulation_kwargs = {"sync_each_batch": True}


def log_in_main_process_only(training_args: TrainingArguments) -> None:
    """Log warnings and progress in the first process only, and errors in all."""
    if training_args.process_index > 0:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        datasets.logging.set_verbosity_error()
        datasets.disable_progress_bars()
        logging.getLogger("ring_hf").setLevel(logging.ERROR)


def disable_evaluation(training_args: TrainingArguments) -> None:
    """Switch evaluation off, for `heldout_fraction=0`.

    Raises:
        ValueError: if another argument needs an evaluation.
    """
    needs = {
        "load_best_model_at_end=True": training_args.load_best_model_at_end,
        "save_strategy='best'": training_args.save_strategy == SaveStrategy.BEST,
        "lr_scheduler_type='reduce_lr_on_plateau'": training_args.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU,
    }
    dependents = [name for name, needed in needs.items() if needed]
    if dependents:
        raise ValueError(
            f"heldout_fraction=0 leaves nothing to evaluate on, which {' and '.join(dependents)} would choose by. "
            "Leave that out, or hold something out: heldout_fraction=0.1, or a source of its own as heldout_data."
        )
    if training_args.eval_strategy != IntervalStrategy.NO and training_args.process_index == 0:
        print(f"heldout_fraction=0: eval_strategy={training_args.eval_strategy.value} is left out.")
    training_args.eval_strategy = IntervalStrategy.NO
    training_args.do_eval = training_args.eval_on_start = False


def prepare_for_streaming(training_args: TrainingArguments) -> None:
    """Let every process read the stream itself, and take its own rows of it.

    Raises:
        ValueError: if no number of steps ends the run.
    """
    if training_args.max_steps <= 0:
        raise ValueError(
            f"streaming=True with max_steps={training_args.max_steps}: a stream has no end. Set max_steps, or "
            "streaming=False to train for num_train_epochs."
        )
    if training_args.accelerator_config.dispatch_batches is None:
        training_args.accelerator_config.dispatch_batches = False
