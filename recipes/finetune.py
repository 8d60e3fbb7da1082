"""Train or fine-tune a causal language model on long sequences, each shared by several processes.

One YAML file describes a run; every value in it can be replaced on the command line:

    accelerate launch --config_file configs/accelerate/cpu_2proc.yaml recipes/finetune.py configs/finetune.yaml \\
        --model <hub id or folder> --data "books/*.txt" --max_length 4096 --rope_theta 100000 --output_dir runs/books

This is the usual script of the Transformers library; ring_hf adds an attention backend, a parallelism configuration
and a collator. Transformers alone loads the final model in output_dir. An interrupted run continues from its last
checkpoint.
"""

import logging
import os

import datasets
import torch
import transformers
from arguments import DataArguments, MemoryArguments, ModelArguments, ParallelArguments, parse
from loading import load_model, load_tokenizer
from refusals import run
from transformers import Trainer, TrainerState, TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType, get_last_checkpoint

import ring_hf
from ring_hf.data.sequences import load_sequences


def main() -> None:
    model_args, data_args, parallel_args, memory_args, training_args = parse(
        (ModelArguments, DataArguments, ParallelArguments, MemoryArguments, TrainingArguments),
        description=str(__doc__),
        use_cpu=not torch.accelerator.is_available(),  # otherwise each process looks for its GPU
        ddp_find_unused_parameters=False,  # a causal language model uses all of them
    )
    log_in_main_process_only(training_args)
    set_seed(training_args.seed)
    if data_args.holds_nothing_out:
        disable_evaluation(training_args)

    if data_args.streaming:
        prepare_for_streaming(training_args)
    tokenizer = load_tokenizer(model_args)
    checkpoint = find_checkpoint(training_args)
    if checkpoint is not None and is_finished(checkpoint, training_args):
        if training_args.process_index == 0:
            print(
                f"{checkpoint} is the end of this run: nothing left to train. Raise max_steps, or change output_dir."
            )
        return
    with training_args.main_process_first(desc="data"):  # the other processes read it from the cache
        train, heldout = load_sequences(data_args, tokenizer)
    model = load_model(model_args, tokenizer, data_args.max_length)
    use_cache, model.config.use_cache = model.config.use_cache, False
    ring_hf.memory.apply(model, memory_args.config())

    training_args.parallelism_config = parallel_args.config()
    keep_shards_of_gradients(training_args)
    trainer = Trainer(
        model,
        training_args,
        data_collator=ring_hf.ContextParallelCollator(model),
        train_dataset=train,
        eval_dataset=heldout,
        processing_class=tokenizer,
    )
    result = trainer.train(resume_from_checkpoint=checkpoint)

    model.config.use_cache = use_cache
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.accelerator.wait_for_everyone()  # if a rank ended while another writes, the launcher would kill that one


def keep_shards_of_gradients(training_args: TrainingArguments) -> None:
    """Under FSDP2, reduce gradients after every micro-batch; else each rank keeps whole ones until the last."""
    settings = training_args.accelerator_config
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true" and settings.gradient_accumulation_kwargs is None:
        settings.gradient_accumulation_kwargs = {"sync_each_batch": True}


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


def find_checkpoint(training_args: TrainingArguments) -> str | None:
    """Return the checkpoint to continue from: that of resume_from_checkpoint (`none`: no one), else the last one."""
    if training_args.resume_from_checkpoint is not None:
        requested = str(training_args.resume_from_checkpoint)
        return None if requested.lower() in ("none", "false") else requested
    return get_last_checkpoint(training_args.output_dir) if os.path.isdir(str(training_args.output_dir)) else None


def is_finished(checkpoint: str, training_args: TrainingArguments) -> bool:
    """Return whether the run of this checkpoint took all its steps and saved its model.

    The Trainer would take one more step each time it is started.
    """
    if not os.path.isfile(os.path.join(str(training_args.output_dir), "config.json")):
        return False
    state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
    if training_args.max_steps > 0:
        return state.global_step >= training_args.max_steps
    return state.global_step >= state.max_steps and training_args.num_train_epochs <= state.num_train_epochs


if __name__ == "__main__":
    run(main)
