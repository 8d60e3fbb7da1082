"""Adapters of PEFT for a run: their configuration, the weights they are put on, and how they are merged."""

from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from sft_arguments import AdapterArguments
from transformers import BitsAndBytesConfig, Trainer


def quantization_of(args: AdapterArguments, dtype: str) -> BitsAndBytesConfig | None:
    """Return how the weights are quantised when they are loaded, or None."""
    if args.quantization_config:
        return BitsAndBytesConfig(**args.quantization_config)  # type: ignore[arg-type]
    if not args.load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        bnb_4bit_quant_type=args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=args.use_bnb_nested_quant,
    )


def add_adapter(model: Any, args: AdapterArguments, checkpoints_layers: bool) -> Any:
    """Return the model with a new adapter, or as it is.

    Args:
        model: a causal language model.
        args (`AdapterArguments`): its settings.
        checkpoints_layers (`bool`): whether layers are recomputed in the backward pass, which needs inputs that have
            gradients although the embeddings are frozen.
    """
    if not args.use_peft:
        return model
    targets = args.lora_target_modules
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=0.0,  # refused under context parallelism: it would differ from one process
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        modules_to_save=args.lora_modules_to_save or None,
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    if checkpoints_layers:
        adapted.enable_input_require_grads()
    return adapted


def check_merging(args: AdapterArguments) -> None:
    """Raise `ValueError` if no process will have whole weights to merge an adapter into."""
    if not args.merge_adapter:
        return
    engine = AcceleratorState().distributed_type
    if engine in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"merge_adapter=True under {engine.value}, which shards weights. Merge the saved adapter afterwards in "
            "one process, with peft's merge_and_unload."
        )


def save_merged(trainer: Trainer, tokenizer: Any) -> None:
    """Write the trained model with its adapter merged into it to output_dir/merged."""
    if trainer.is_world_process_zero():
        folder = Path(str(trainer.args.output_dir)) / "merged"
        merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    trainer.accelerator.wait_for_everyone()
