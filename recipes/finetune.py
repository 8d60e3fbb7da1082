"""Train or fine-tune a causal language model on long sequences, each shared by several processes.

One YAML file describes a run; every value in it can be replaced on the command line:

    accelerate launch --config_file configs/accelerate/cpu_2proc.yaml recipes/finetune.py configs/finetune.yaml \\
        --model <hub id or folder> --data "books/*.txt" --max_length 4096 --rope_theta 100000 --output_dir runs/books

This is the usual script of the Transformers library; ring_hf adds an attention backend, a parallelism configuration
and a collator. Transformers alone loads the final model in output_dir. An interrupted run continues from its last
checkpoint.
"""

from arguments import DataArguments, MemoryArguments, ModelArguments, ParallelArguments
from checkpoints import find_checkpoint, is_finished
from loading import load_tokenizer
from refusals import run
from training import disable_evaluation, load_training_model, parse_run, prepare_for_streaming, train_and_save
from transformers import Trainer, TrainingArguments
from weighting import have_weights, settings_with_weights

import ring_hf
from ring_hf.data import load_sequences, split_modalities

ARGUMENTS = (ModelArguments, DataArguments, ParallelArguments, MemoryArguments, TrainingArguments)


def main() -> None:
    model_args, data_args, parallel_args, memory_args, training_args = parse_run(ARGUMENTS, str(__doc__))
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
    is_weighted = have_weights(train, data_args.mixture())
    if is_weighted:
        memory_args = settings_with_weights(memory_args, training_args)
    model = load_training_model(model_args, memory_args, tokenizer, data_args.max_length)
    if model_args.vision_vocabulary and heldout is not None:
        heldout = split_modalities(heldout, model.config.vision_offset)  # eval_text_loss and eval_vision_loss
    training_args.parallelism_config = parallel_args.config()
    trainer = Trainer(
        model,
        training_args,
        data_collator=ring_hf.ContextParallelCollator(model),
        train_dataset=train,
        eval_dataset=heldout,
        processing_class=tokenizer,
    )
    if is_weighted:
        ring_hf.count_loss_weights(trainer)
    train_and_save(trainer, checkpoint)


if __name__ == "__main__":
    run(main)
