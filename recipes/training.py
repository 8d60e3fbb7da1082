"""Shared by the training recipes: the command line, the settings of every run, the model, and the run itself.

A recipe parses its arguments with `parse_run`, sets batch and budget with `set_batch`, builds its datasets, its model
with `load_training_model` and a Trainer of its choice, adds the callbacks of `add_callbacks`, and hands that to
`train_and_save`.
"""

import json
import logging
import math
import os
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from arguments import MemoryArguments, ModelArguments, ParallelArguments, RunArguments, parse
from budget import Batch, count_replicas, count_steps, make_batch
from datasets import Dataset
from loading import load_model
from model_card import install_model_card
from processes import end_with_parent
from run_log import RunLog, flops_per_token, peak_flops
from run_start import AllStepsTaken, RunStart, StopAtPerplexity
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

import ring_hf
from ring_hf.verify import verify_first_steps, verify_trainer


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
    end_with_parent()
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


def set_batch(
    run_args: RunArguments, parallel_args: ParallelArguments, training_args: TrainingArguments, max_length: int
) -> Batch:
    """Set gradient_accumulation_steps and max_steps from numbers of tokens, if those are given.

    Raises:
        ValueError: if a number of tokens is no whole number of batches, or given besides the setting it replaces.
    """
    training_args.parallelism_config = parallel_args.config()
    size = training_args.parallelism_config.context_parallel_size
    accumulation = training_args.gradient_accumulation_steps
    for tokens, setting, is_set in (
        ("tokens_per_batch", "gradient_accumulation_steps", accumulation != 1),
        ("max_tokens", "max_steps", training_args.max_steps > 0),
    ):
        if getattr(run_args, tokens) is not None and is_set:
            raise ValueError(
                f"{tokens}={getattr(run_args, tokens)} sets {setting}, which is "
                f"{getattr(training_args, setting)} already. Give one of them."
            )
    replicas = count_replicas(training_args.world_size, size)
    rows = training_args.per_device_train_batch_size
    batch = make_batch(run_args.tokens_per_batch, max_length, rows, replicas, accumulation)
    training_args.gradient_accumulation_steps = batch.accumulation
    if run_args.evaluate_only:
        training_args.eval_strategy, training_args.eval_on_start = IntervalStrategy.NO, False
    if run_args.max_tokens is not None:
        training_args.max_steps = count_steps(run_args.max_tokens, batch)
    return batch


def evaluation_sets(run_args: RunArguments, heldout: Any, windows: dict[int, Dataset]) -> Any:
    """Return the `eval_dataset` of a Trainer: with until_perplexity, also the windows of the shortest length.

    Evaluations are then named: eval_heldout_loss and, for 512 tokens, eval_at_512_loss.
    """
    if run_args.until_perplexity is None:
        return heldout
    shortest = min(windows)
    sets = heldout if isinstance(heldout, dict) else {"heldout": heldout}
    return {**sets, f"at_{shortest}": windows[shortest]}


def add_callbacks(trainer: Trainer, run_args: RunArguments, batch: Batch) -> None:
    """Add the log, the start and the early end of a run to a Trainer.

    Raises:
        ValueError: if until_perplexity is set and nothing evaluates.
    """
    args = trainer.args
    if run_args.until_perplexity is not None:
        if args.eval_strategy == IntervalStrategy.NO and not run_args.evaluate_only:
            raise ValueError(
                f"until_perplexity={run_args.until_perplexity} is compared at every evaluation, and "
                "eval_strategy=no has none. Set eval_strategy: steps and eval_steps."
            )
        metric = f"eval_at_{min(run_args.perplexity_lengths)}_loss"
        trainer.add_callback(StopAtPerplexity(run_args.until_perplexity, metric))
    if run_args.verify_steps and not run_args.verify_only:
        verify_first_steps(trainer, run_args.verify_steps, run_args.verify_length)
    start = RunStart(run_args.optimizer_from, run_args.evaluate_only)
    start.trainer = trainer
    trainer.add_callback(start)
    flops = flops_per_token(trainer.model.config, batch.max_length)
    log = RunLog(batch.num_tokens, flops, peak_flops(args.device, run_args.peak_tflops), args.world_size)
    # Before the callbacks of trackers, which report what it adds, and after that of ring_hf, which measures memory.
    callbacks = trainer.callback_handler.callbacks
    index = max(i for i, callback in enumerate(callbacks) if "ring_hf" in type(callback).__module__)
    callbacks.insert(index + 1, log)


def train_and_save(
    trainer: Trainer,
    checkpoint: str | None,
    arguments: tuple[Any, ...] = (),
    windows: dict[int, Dataset] | None = None,
) -> None:
    """Train, from a checkpoint if there is one, and write model, model card, metrics and state to output_dir.

    `trainer_state.json` is written last: a run that has one is complete (see `checkpoints.is_finished`).

    Args:
        arguments: all dataclasses of the run, for the card; without them there is none.
        windows: the result of `loading.load_windows`; the perplexity on them is measured at the end.
    """
    run_args = next((values for values in arguments if isinstance(values, RunArguments)), RunArguments())
    if run_args.verify_only:
        verify_only(trainer, run_args)
        return
    evaluates_only = run_args.evaluate_only
    metrics = None
    try:
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    except AllStepsTaken:
        trainer.is_in_train = False
        trainer.control = trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
    steps_left = trainer.state.max_steps - trainer.state.global_step
    if trainer.args.enable_jit_checkpoint and metrics is not None and steps_left > 0:
        return  # SIGTERM ended it with a checkpoint, from which the same command continues
    if windows:
        write_perplexity(trainer, windows)
    if not evaluates_only:
        if arguments:
            install_model_card(trainer, arguments)  # not earlier: ring_hf tests a Trainer whose methods were replaced
            trainer.create_model_card()
        trainer.model.config.use_cache = True  # it was off for training
        trainer.save_model()  # and push it to the hub, if asked
        if metrics is not None:
            trainer.log_metrics("train", metrics)
            trainer.save_metrics("train", metrics)
        trainer.save_state()
    trainer.accelerator.wait_for_everyone()  # if a rank ended while another writes, the launcher would kill that one


def verify_only(trainer: Trainer, run_args: RunArguments) -> None:
    """Compare the first batches with one process, print the report and write it to output_dir/verification.json.

    Raises:
        SystemExit: with 1, on every rank, if the model on shards is not that of one process.
    """
    result = verify_trainer(trainer, run_args.verify_steps, run_args.verify_length)
    if trainer.is_world_process_zero():
        folder = Path(str(trainer.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "verification.json").write_text(json.dumps(result.to_json(), indent=1) + "\n")
        print(result.report())
    trainer.accelerator.wait_for_everyone()
    if not result.is_exact:
        sys.exit(1)


def write_perplexity(trainer: Trainer, windows: dict[int, Dataset]) -> None:
    """Measure perplexity at each length by the Trainer's own evaluation; write perplexity.json to output_dir.

    A length is evaluated in batches of as many tokens as training has, but at least one sequence.
    """
    args = trainer.args
    rows, rows_in_training = args.per_device_eval_batch_size, args.per_device_train_batch_size
    longest, results = max(windows), []
    for length, dataset in windows.items():
        args.per_device_eval_batch_size = max(1, min(len(dataset), rows_in_training * longest // length))
        loss = trainer.evaluate(dataset, metric_key_prefix=f"eval_at_{length}")[f"eval_at_{length}_loss"]
        perplexity = math.exp(min(loss, 700.0))
        num_tokens = len(dataset) * (length - 1)
        results.append({"length": length, "num_tokens": num_tokens, "loss": loss, "perplexity": perplexity})
    args.per_device_eval_batch_size = rows
    if trainer.is_world_process_zero():
        path = Path(str(args.output_dir)) / "perplexity.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=1) + "\n")
        temporary.replace(path)


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
