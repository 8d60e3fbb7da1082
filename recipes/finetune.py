"""Train or fine-tune a causal language model on long sequences, each shared by several processes.

One YAML file describes a run; every value in it can be replaced on the command line:

    accelerate launch --config_file configs/accelerate/cpu_2proc.yaml recipes/finetune.py configs/finetune.yaml \\
        --model <hub id or folder> --data "books/*.txt" --max_length 4096 --rope_theta 100000 --output_dir runs/books

This is the usual script of the Transformers library; ring_hf adds an attention backend, a parallelism configuration
and a collator. Transformers alone loads the final model in output_dir. An interrupted run continues from its last
checkpoint.
"""

from typing import Any

from arguments import DataArguments, MemoryArguments, ModelArguments, ParallelArguments, RunArguments
from checkpoints import find_checkpoint, has_nothing_left
from loading import load_tokenizer, load_windows
from refusals import run
from training import (
    add_callbacks,
    disable_evaluation,
    evaluation_sets,
    load_training_model,
    parse_run,
    prepare_for_streaming,
    set_batch,
    train_and_save,
)
from transformers import Trainer, TrainingArguments
from weighting import have_weights, settings_with_weights

import ring_hf
from ring_hf.data import load_sequences, split_modalities

ARGUMENTS = (ModelArguments, DataArguments, ParallelArguments, MemoryArguments, RunArguments, TrainingArguments)


def main() -> None:
    finetune(parse_run(ARGUMENTS, str(__doc__)))


def finetune(arguments: tuple[Any, ...]) -> None:
    """Train one run, or continue it.

    Args:
        arguments: an instance of each of `ARGUMENTS`.
    """
    model_args, data_args, parallel_args, memory_args, run_args, training_args = arguments
    if data_args.holds_nothing_out:
        disable_evaluation(training_args)
    batch = set_batch(run_args, parallel_args, training_args, data_args.max_length)
    if data_args.streaming and not run_args.evaluate_only:
        prepare_for_streaming(training_args)
    tokenizer = load_tokenizer(model_args)
    checkpoint = find_checkpoint(training_args)
    if has_nothing_left(checkpoint, training_args):
        return
    with training_args.main_process_first(desc="data"):  # the other processes read it from the cache
        windows = load_windows(data_args, tokenizer, run_args.perplexity_lengths, run_args.perplexity_windows)
        shortest = windows[min(windows)] if run_args.evaluate_only else None
        train, heldout = (shortest, None) if run_args.evaluate_only else load_sequences(data_args, tokenizer)
    is_weighted = have_weights(train, data_args.mixture())
    if is_weighted or model_args.vision_vocabulary:
        memory_args = settings_with_weights(memory_args, training_args)
    model = load_training_model(model_args, memory_args, tokenizer, data_args.max_length)
    if model_args.vision_vocabulary and heldout is not None:
        heldout = split_modalities(heldout, model.config.vision_offset)  # eval_text_loss and eval_vision_loss
    trainer = Trainer(
        model,
        training_args,
        data_collator=ring_hf.ContextParallelCollator(model),
        train_dataset=train,
        eval_dataset=evaluation_sets(run_args, heldout, windows),
        processing_class=tokenizer,
    )
    if is_weighted:
        ring_hf.count_loss_weights(trainer)
    if model_args.vision_vocabulary:
        ring_hf.log_modality_losses(trainer, model.config.vision_offset)  # text_loss and vision_loss
    add_callbacks(trainer, run_args, batch)
    train_and_save(trainer, checkpoint, arguments, windows)


if __name__ == "__main__":
    run(main)
