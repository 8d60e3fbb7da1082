"""Fine-tune a chat model on conversations, each shared by several processes, with TRL's SFTTrainer.

    accelerate launch --config_file configs/accelerate/cpu_2proc.yaml recipes/sft.py configs/sft.yaml \\
        --model <hub id or folder> --data conversations.jsonl --max_length 4096 --output_dir runs/sft

Rows hold `messages` (with tool calls, and the column `tools`) or `prompt` and `completion`. All arguments of TRL's
SFTConfig are keys: packing, packing_strategy, padding_free, assistant_only_loss, completion_only_loss, loss_type and
those of the Trainer. Plain Transformers loads the result: a model in output_dir, or an adapter, and with merge_adapter
a model in output_dir/merged. An interrupted run continues from its last checkpoint.
"""

import dataclasses
from typing import Any

from adapters import add_adapter, check_merging, quantization_of, save_merged
from arguments import MemoryArguments, ModelArguments, ParallelArguments, RunArguments
from checkpoints import find_checkpoint, has_nothing_left
from conversation_data import load_examples
from loading import load_model, load_tokenizer
from refusals import run
from sft_arguments import AdapterArguments, ConversationArguments
from training import add_callbacks, disable_evaluation, parse_run, set_batch, train_and_save
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

import ring_hf
from ring_hf.data import pack_documents

ARGUMENTS = (
    ModelArguments,
    ConversationArguments,
    AdapterArguments,
    ParallelArguments,
    MemoryArguments,
    RunArguments,
    SFTConfig,
)


def main() -> None:
    arguments = parse_run(ARGUMENTS, str(__doc__))
    model_args, data_args, adapter_args, parallel_args, memory_args, run_args, training_args = arguments
    memory_args = check_arguments(arguments)
    if data_args.holds_nothing_out:
        disable_evaluation(training_args)
    batch = set_batch(run_args, parallel_args, training_args, training_args.max_length)
    tokenizer = load_tokenizer(model_args)
    checkpoint = find_checkpoint(training_args)
    if has_nothing_left(checkpoint, training_args):
        return
    with training_args.main_process_first(desc="data"):  # the other processes read it from the cache
        train, heldout = load_examples(data_args, training_args, tokenizer)
    quantization = quantization_of(adapter_args, model_args.dtype)
    model = load_model(model_args, tokenizer, training_args.max_length, quantization_config=quantization)
    model.config.use_cache = False
    checkpoints_layers = training_args.gradient_checkpointing or memory_args.memory_attention != "none"
    model = add_adapter(model, adapter_args, checkpoints_layers)
    ring_hf.memory.apply(model, memory_args.config())

    weighs_examples = data_args.loss_weighting == "examples"
    build = build_weighted_trainer if weighs_examples else build_sft_trainer
    trainer = build(model, training_args, tokenizer, train, heldout)
    check_merging(adapter_args)
    add_callbacks(trainer, run_args, batch)
    train_and_save(trainer, checkpoint, arguments)
    if adapter_args.merge_adapter:
        save_merged(trainer, tokenizer)


def check_arguments(arguments: tuple[Any, ...]) -> MemoryArguments:
    """Return the memory options of a run; stages ask it before the first of them starts.

    Args:
        arguments: an instance of each of `ARGUMENTS`.

    Raises:
        ValueError: if arguments do not go together.
    """
    model_args, data_args, adapter_args, _, memory_args, run_args, training_args = arguments
    if run_args.perplexity_lengths:
        raise ValueError(
            f"perplexity_lengths={run_args.perplexity_lengths} are windows of plain text, which this recipe does not "
            "read. Set perplexity_lengths: [], or measure with recipes/perplexity.py."
        )
    adapter_args.check_model(model_args)
    return check_weighting(data_args, memory_args, training_args)


def build_sft_trainer(model: Any, args: SFTConfig, tokenizer: Any, train: Any, heldout: Any) -> Trainer:
    """Return TRL's trainer, which packs examples and takes the mean over tokens."""
    is_packed = args.packing or bool(args.eval_packing)
    settings = {"assistant_only_loss": False, "chat_template_path": None}  # the labels exist already
    for name, value in {**settings, "max_length": args.max_length if is_packed else None}.items():
        setattr(args, name, value)
    return SFTTrainer(model, args, train_dataset=train, eval_dataset=heldout, processing_class=tokenizer)


def build_weighted_trainer(model: Any, args: SFTConfig, tokenizer: Any, train: Any, heldout: Any) -> Trainer:
    """Return a Trainer that takes the mean over examples; TRL's loss knows no weights."""

    def packed(examples: Any, is_packed: bool) -> Any:
        assert args.max_length is not None
        return examples if examples is None or not is_packed else pack_documents(examples, args.max_length)

    packs_heldout = args.packing if args.eval_packing is None else args.eval_packing
    args.remove_unused_columns = False
    trainer = Trainer(
        model,
        args,
        data_collator=ring_hf.ContextParallelCollator(model, packing=args.padding_free),
        train_dataset=packed(train, args.packing),
        eval_dataset=packed(heldout, packs_heldout),
        processing_class=tokenizer,
    )
    ring_hf.count_loss_weights(trainer)
    return trainer


def check_weighting(
    data_args: ConversationArguments, memory_args: MemoryArguments, args: SFTConfig
) -> MemoryArguments:
    """Return the memory options that the weighting of the loss needs.

    Raises:
        ValueError: if another setting belongs to TRL's loss, or TRL would ignore a memory option.
    """
    if data_args.loss_weighting == "tokens":
        if memory_args.loss_block is not None:
            raise ValueError(
                f"loss_block={memory_args.loss_block}: TRL's SFTTrainer takes the loss in tiles by itself. Leave it "
                "out; loss_weighting=examples, which another Trainer computes, has it."
            )
        return memory_args
    if args.loss_type != "nll":
        raise ValueError(f"loss_weighting=examples with loss_type={args.loss_type!r}: weights are for nll only.")
    if args.packing and args.packing_strategy != "bfd":
        raise ValueError(
            f"loss_weighting=examples with packing_strategy={args.packing_strategy!r}: examples stay whole only with "
            "bfd."
        )
    return dataclasses.replace(memory_args, loss_block=memory_args.loss_block or "auto")


if __name__ == "__main__":
    run(main)
