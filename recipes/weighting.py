"""Weights of tokens in the loss of a run: the settings they need, so that none is dropped or ignored."""

import dataclasses
from typing import Any

from arguments import MemoryArguments
from datasets import Dataset
from transformers import TrainingArguments

from ring_hf.data.source_spec import MixtureSpec
from ring_hf.data.tokens import WEIGHTS

WEIGHTED_FORMATS = ("tokens", "vision_codes")  # whose rows may have weights


def have_weights(train: Any, mixture: MixtureSpec) -> bool:
    """Return whether the sequences to train on have `loss_weights`; of a stream, whether they may have."""
    if isinstance(train, Dataset):
        return WEIGHTS in train.column_names
    return any(spec.format in WEIGHTED_FORMATS for spec in mixture.sources)


def settings_with_weights(memory_args: MemoryArguments, training_args: TrainingArguments) -> MemoryArguments:
    """Keep the column in the Trainer, and return memory options with a loss that knows it."""
    training_args.remove_unused_columns = False
    return dataclasses.replace(memory_args, loss_block=memory_args.loss_block or "auto")
