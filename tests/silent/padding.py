"""Items 7, 8, 10 and 12: targets at padded positions, a missing config, pad tokens that do not exist, short rows."""

import os
from typing import Any

import torch
from transformers import Trainer, default_data_collator

import ring_hf
from ring_hf import ContextParallelCollator, ContextParallelConfig

from .counts import loop
from .setting import BATCH, LENGTH, STEPS, Setting, examples

# Item 7


def make_padded_rows(num_rows: int = BATCH * STEPS, targets: bool = True, seed: int = 1) -> list[dict[str, Any]]:
    """Return rows as from `tokenizer(..., padding="max_length")`, with `labels = input_ids.copy()`.

    Args:
        targets: whether padding is a target.
    """
    rows = []
    for row in examples(num_rows, seed=seed):
        num_padding = LENGTH - len(row["input_ids"])
        tokens = row["input_ids"] + [0] * num_padding
        mask = [1] * len(row["input_ids"]) + [0] * num_padding
        rows.append({"input_ids": tokens, "attention_mask": mask, "labels": list(tokens)})
        if not targets:
            rows[-1]["labels"] = row["input_ids"] + [-100] * num_padding
    return rows


def _train_with_inner(setting: Setting, rows: Any, inner: Any = default_data_collator, **changes: Any) -> None:
    model = setting.llama()
    setting.train(model, rows, ContextParallelCollator(model, inner=inner), **changes)


def padded_to_max_length(setting: Setting) -> None:
    _train_with_inner(setting, make_padded_rows())


def labels_filled_with_the_pad_token(setting: Setting) -> None:
    """A user's collator that pads inputs and labels with the same token."""

    def fill(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        tokens = [torch.tensor(feature["input_ids"]) for feature in features]
        lengths = torch.tensor([len(row) for row in tokens])
        padded_tokens = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        mask = torch.arange(padded_tokens.shape[1]) < lengths[:, None]
        return {"input_ids": padded_tokens, "labels": padded_tokens.clone(), "attention_mask": mask.long()}

    _train_with_inner(setting, examples(BATCH * STEPS), fill)


def two_ends_of_text(setting: Setting) -> None:
    """Every row ends with three end tokens that are targets, but not in the mask."""
    rows = []
    for row in examples(BATCH * STEPS):
        tokens, mask = row["input_ids"] + [2, 2, 2], [1] * len(row["input_ids"]) + [0] * 3
        rows.append({"input_ids": tokens, "attention_mask": mask, "labels": row["labels"] + [2, 2, 2]})
    model = setting.llama()
    setting.train(model, rows, ContextParallelCollator(model))


def padded_in_evaluation(setting: Setting) -> None:
    """Clean rows in training, padded targets in evaluation."""
    _train_with_inner(setting, make_padded_rows(targets=False), eval_rows=make_padded_rows(6, seed=2))


def first_padding_is_a_target(setting: Setting) -> None:
    """A real token predicts the target at the first padded position, which is exact."""
    rows = make_padded_rows(targets=False)
    for row in rows:
        num_real = sum(row["attention_mask"])
        if num_real < LENGTH:
            row["labels"][num_real] = 2
    _train_with_inner(setting, rows)


def padded_without_a_mask(setting: Setting) -> None:
    """Without a mask, padding is ordinary text, which is exact."""
    _train_with_inner(setting, [{key: row[key] for key in ("input_ids", "labels")} for row in make_padded_rows()])


def padded_but_ignored(setting: Setting) -> None:
    """Padding as from `DataCollatorForLanguageModeling`, which is exact."""
    _train_with_inner(setting, make_padded_rows(targets=False))


# Item 8


def forgotten_config(setting: Setting) -> None:
    setting.train(parallelism_config=None)


def config_from_an_empty_environment(setting: Setting) -> None:
    """`ContextParallelConfig()` reads its size from a variable that is not set."""
    config = None if setting.mode == "reference" else ContextParallelConfig()
    setting.train(parallelism_config=config)


def environment_without_a_config(setting: Setting) -> None:
    """The variable is set, but the script creates no config that reads it."""
    os.environ["RING_HF_CONTEXT_PARALLEL_SIZE"] = "2"
    setting.train(parallelism_config=None)


def forgotten_config_and_plain_collator(setting: Setting) -> None:
    setting.train(collator=DataCollatorWithLabels(), parallelism_config=None)


class DataCollatorWithLabels:
    """A user's collator, which does not shard."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(feature["input_ids"]) for feature in features)
        fill = {"input_ids": 0, "labels": -100}
        batch = {key: [f[key] + [fill[key]] * (length - len(f[key])) for f in features] for key in fill}
        return {key: torch.tensor(rows) for key, rows in batch.items()}


def config_left_in_another_arguments_object(setting: Setting) -> None:
    """Arguments are created again from a dictionary of the first ones, which does not hold the config."""
    first = setting.arguments(parallelism_config=setting.config())
    settings = {key: getattr(first, key) for key in ("output_dir", "max_steps", "learning_rate", "logging_steps")}
    args = setting.arguments(**settings, parallelism_config=None)
    model = setting.llama()
    setting.run(setting.trainer(model, args=args))


def forgotten_config_in_a_loop(setting: Setting) -> None:
    loop(_WithoutConfig(setting.mode, setting.folder, setting.record), guard=False)


def forgotten_config_in_a_guarded_loop(setting: Setting) -> None:
    loop(_WithoutConfig(setting.mode, setting.folder, setting.record), guard=True)


class _WithoutConfig(Setting):
    def config(self) -> None:
        return None


def size_of_one(setting: Setting) -> None:
    """Intended plain data parallelism."""
    config = None if setting.mode == "reference" else ContextParallelConfig(context_parallel_size=1)
    per_rank = BATCH if setting.mode != "shared" else BATCH // 2
    setting.train(parallelism_config=config, per_device_train_batch_size=per_rank)


# Item 10


def pad_token_of_minus_one(setting: Setting) -> None:
    _train_with_pad_token(setting, -1)


def pad_token_beyond_the_vocabulary(setting: Setting) -> None:
    _train_with_pad_token(setting, 64)


def _train_with_pad_token(setting: Setting, pad_token_id: int) -> None:
    """Rows of the same odd length, which only the layout pads."""
    model = setting.llama()
    model.config.pad_token_id = pad_token_id
    setting.train(model, examples(BATCH * STEPS, 45))


def pad_token_of_the_collator(setting: Setting) -> None:
    model = setting.llama()
    setting.train(model, examples(BATCH * STEPS, 45), ContextParallelCollator(model, pad_token_id=1000))


def pad_token_in_blocks(setting: Setting) -> None:
    """The same with the loss in blocks."""
    model = setting.llama(pad_token_id=None)
    model.config.pad_token_id = -1
    ring_hf.memory.apply(model, loss_block=16)
    setting.train(model, examples(BATCH * STEPS, 45))


# Item 12


def short_batch(setting: Setting) -> None:
    """In the middle of the run, a batch shorter than 2 x 2 tokens."""
    rows = examples(BATCH * STEPS)
    for i in range(10 * BATCH, 11 * BATCH):
        rows[i] = {key: value[-3:] for key, value in rows[i].items()}
    setting.train(rows=rows, trainer_class=InOrder)


class InOrder(Trainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def short_batch_in_evaluation(setting: Setting) -> None:
    short = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 6
    setting.train(eval_rows=short)


def packed_empty_example(setting: Setting) -> None:
    rows = examples(BATCH * STEPS)
    rows[4 * BATCH + 1] = {"input_ids": [], "labels": []}
    model = setting.llama()
    setting.train(model, rows, ContextParallelCollator(model, packing=True), InOrder)
