"""Trainers of TRL, which the development environment lacks: cases import this module only when they run."""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from ring_hf import ContextParallelCollator
from ring_hf.data.byte_level import END_OF_TEXT, PADDING, build_byte_tokenizer

from .setting import BATCH, STEPS, Setting, examples


def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=build_byte_tokenizer(), eos_token=END_OF_TEXT, pad_token=PADDING, padding_side="right"
    )


def sft(setting: Setting, model: Any, evaluate: bool = False, **changes: Any) -> SFTTrainer:
    """Return an SFTTrainer on rows of tokens."""
    rows = Dataset.from_list(examples(BATCH * STEPS))
    args = setting.arguments(
        SFTConfig,
        bf16=False,
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        **({"eval_strategy": "steps", "eval_steps": STEPS // 2} if evaluate else {}),
        **changes,
    )
    return SFTTrainer(
        model,
        args,
        train_dataset=rows,
        eval_dataset=Dataset.from_list(examples(6, seed=2)) if evaluate else None,
        data_collator=ContextParallelCollator(model),
        processing_class=tokenizer(),
    )


def dpo(setting: Setting, model: Any, reference: Any) -> DPOTrainer:
    pairs = [
        {"prompt": f"Question {i}: ", "chosen": "a good answer " * (1 + i % 3), "rejected": "a bad one " * (1 + i % 2)}
        for i in range(BATCH * STEPS)
    ]
    args = setting.arguments(DPOConfig, bf16=False, gradient_checkpointing=False)
    return DPOTrainer(
        model,
        reference,
        args=args,
        train_dataset=Dataset.from_list(pairs),
        data_collator=ContextParallelCollator(model),
        processing_class=tokenizer(),
    )
