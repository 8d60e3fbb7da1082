"""Additions of users around a model and its Trainer: adapters, streams, callbacks, skipped positions, loss terms.

One frozen `WrapperCase` per training run. Each is trained by one process with `sdpa` and by two processes that share
every sequence. A case names its `control`, the same run without the feature, since a feature that changes nothing
proves nothing.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from ring_hf.hf.collate.default_collator import PadOrPackCollator
from tests.trainer.cases import VOCABULARY, Rows

STEPS = 20
ROWS_PER_STEP = 8  # in two micro-batches
MIDDLE = 8  # the step whose checkpoint is resumed from
LONG = MIDDLE + STEPS  # steps of a run that is resumed from there
NEW_TOKENS = 6
LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}

Wrap = Callable[[nn.Module], nn.Module]
Features = list[dict[str, Any]]


# Models


def keep_unchanged(model: nn.Module) -> nn.Module:
    return model


def add_adapter(kind: str, **settings: Any) -> Wrap:
    """Return a function that adds an adapter of PEFT, for example kind="IA3"."""

    def wrap(model: Any) -> nn.Module:
        import peft  # here, since collecting the tests needs the names of the cases only

        return peft.get_peft_model(model, getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", **settings))

    return wrap


def freeze_lower_layers(model: Any) -> nn.Module:
    """Train only the last layer and the head."""
    model.get_input_embeddings().requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    return model


def resize_vocabulary(model: Any) -> nn.Module:
    """Add tokens to the vocabulary, and train and save the whole embeddings and head in addition to LoRA."""
    model.resize_token_embeddings(VOCABULARY + NEW_TOKENS)
    return add_adapter("Lora", **LORA, modules_to_save=["embed_tokens", "lm_head"])(model)


# Data


def rows(steps: int = STEPS) -> Rows:
    return Rows(ROWS_PER_STEP * steps, "uneven")


def rows_for_long_run() -> Rows:
    return rows(LONG)


def rows_with_new_tokens() -> Rows:
    """Return rows in which the tokens of `resize_vocabulary` occur in prompts and as targets."""
    data = rows()
    for row in data.rows:
        for key in ("input_ids", "labels"):
            row[key] = [token + VOCABULARY if 0 <= token < NEW_TOKENS else token for token in row[key]]
    return data


def skip_positions(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with positions as in PoSE (Zhu et al. 2023, "Efficient Context Window Extension of LLMs via
    Positional Skip-wise Training"): its second part has the positions of a longer row. Random numbers come from its
    tokens, so that every rank draws the same. Without a mask, a skipped position would begin a document."""
    length, number = len(row["input_ids"]), sum(row["input_ids"])
    skip_start, skip = 5 + number % (length - 10), number % 150
    positions = [position + skip * (position >= skip_start) for position in range(length)]
    return {**row, "position_ids": positions, "attention_mask": [1] * length}


def rows_that_skip() -> list[dict[str, Any]]:
    return [skip_positions(row) for row in rows().rows]


def stream() -> Any:
    """Return a stream whose shards are shuffled in each epoch, and rows in a buffer. 28 steps take 2.3 epochs."""
    from datasets import Dataset

    return Dataset.from_list(rows(12).rows).to_iterable_dataset(num_shards=4).shuffle(seed=7, buffer_size=16)


def eval_rows() -> Any:
    return Rows(7, "uneven", seed=2)  # leaves a ragged last batch


def near_and_far() -> dict[str, Any]:
    """Half of the targets of `far` are a token that no training row holds: its loss falls at first, then rises."""
    far = []
    for row in eval_rows().rows:
        labels = [0 if index % 10 < 5 and label >= 0 else label for index, label in enumerate(row["labels"])]
        far.append({**row, "labels": labels})
    return {"near": eval_rows(), "far": far}


def several_sets() -> dict[str, Any]:
    return {f"set{seed}": Rows(7, "uneven", seed=seed) for seed in range(2, 8)}


# Inner collators, called before the batch is sharded


def collate_with_skips(features: Features) -> Mapping[str, torch.Tensor]:
    return PadOrPackCollator()([skip_positions(row) for row in features])


def collate_without_skips(features: Features) -> Mapping[str, torch.Tensor]:
    return PadOrPackCollator()([{key: row[key] for key in ("input_ids", "labels")} for row in features])


# Trainers and callbacks


class PenaltyTrainer(Trainer):
    """Adds a penalty on weights to the model's loss."""

    coefficient = 2e-3

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        penalty = self.coefficient * sum(parameter.square().sum() for parameter in model.parameters())
        return (loss[0] + penalty, loss[1]) if return_outputs else loss + penalty


class DoublePenaltyTrainer(PenaltyTrainer):
    """Adds the sum of the penalties of two ranks."""

    coefficient = 2 * PenaltyTrainer.coefficient


class MovingAverage(TrainerCallback):
    """Keeps a copy of the model with an exponential moving average (EMA) of its weights. Each evaluation of the model
    also evaluates the copy: on the batches of the Trainer's loader, and on a whole row that is not sharded."""

    def __init__(self) -> None:
        self.average: Any = None
        self.losses: dict[str, list[float]] = {"on batches of the loader": [], "on a whole row": []}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.average = copy.deepcopy(model).eval()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        with torch.no_grad():
            for average, parameter in zip(self.average.parameters(), model.parameters(), strict=True):
                average.lerp_(parameter, 0.1)

    def on_evaluate(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any) -> None:
        row = torch.tensor([eval_rows()[0]["input_ids"]])
        with torch.no_grad():
            losses = [self.average(**batch).loss.item() for batch in eval_dataloader]
            self.losses["on batches of the loader"].append(sum(losses) / len(losses))
            self.losses["on a whole row"].append(self.average(input_ids=row, labels=row).loss.item())


class StepCount(TrainerCallback):
    """Counts the steps of this run, without those before the checkpoint, which are in the Trainer's log as well."""

    steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1


def no_callbacks() -> list[TrainerCallback]:
    return []


# Runs


@dataclass(frozen=True)
class WrapperCase:
    """One run of a Trainer with the additions of a user.

    Attributes:
        control: name of the same run without the feature; None if the feature shows after training, or in evaluations.
        inner: inner collator.
        resume_from: launch and name of the run whose checkpoint is resumed from.
        forget_optimizer: whether to resume without the optimizer's state, a deliberate mistake.
    """

    name: str
    control: str | None = None
    wrap: Wrap = keep_unchanged
    data: Callable[[], Any] = rows
    eval_data: Callable[[], Any] = eval_rows
    inner: Callable[[Features], Mapping[str, torch.Tensor]] | None = None
    trainer: type[Trainer] = Trainer
    callbacks: Callable[[], list[TrainerCallback]] = no_callbacks
    steps: int = STEPS
    learning_rate: float = 3e-4
    resume_from: str | None = None
    forget_optimizer: bool = False
    evaluate_first: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steps_before(self) -> int:
        """Return the steps of the run that this one resumes."""
        return 0 if self.resume_from is None else MIDDLE


def _adapter_case(name: str, kind: str, control: str | None = "lora", **settings: Any) -> WrapperCase:
    return WrapperCase(name, control, wrap=add_adapter(kind, **settings), learning_rate=3e-3)


SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": MIDDLE}
EVALUATED: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 10}
CLIPPED: dict[str, Any] = {"max_grad_norm": 0.1, "optim": "sgd"}  # Adam's steps do not depend on a gradient's scale
STREAMED: dict[str, Any] = {"accelerator_config": {"dispatch_batches": False}, **SAVED}
BEST: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_far_loss",
    "greater_is_better": False,
}

PENALTY = WrapperCase("weight-penalty", "plain", trainer=PenaltyTrainer, arguments=EVALUATED)
SKIPS = WrapperCase("pose-of-the-dataset", "plain", data=rows_that_skip)
STREAM = WrapperCase("stream", "plain-long", data=stream, steps=LONG, arguments=STREAMED)
LONGER = WrapperCase("plain-long", data=rows_for_long_run, steps=LONG, arguments=SAVED)
RESUMED = replace(LONGER, name="resumed-from-one-process", resume_from="world1/plain-long")
AVERAGE = WrapperCase("moving-average", callbacks=lambda: [MovingAverage()], arguments=EVALUATED)
EVALUATED_FIRST = WrapperCase("evaluated-first", evaluate_first=True)
BF16 = WrapperCase("bf16-full-eval", eval_data=several_sets, arguments={**EVALUATED, "bf16_full_eval": True})
STOPPED = WrapperCase(
    "early-stopping",
    eval_data=near_and_far,
    callbacks=lambda: [EarlyStoppingCallback(early_stopping_patience=2)],
    learning_rate=1e-3,
    steps=40,
    arguments=BEST,
)

CASES = [
    _adapter_case("dora", "Lora", **LORA, use_dora=True),
    _adapter_case("ia3", "IA3", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    _adapter_case("oft", "OFT", target_modules=["q_proj", "v_proj"], oft_block_size=8),
    _adapter_case("trainable-tokens", "TrainableTokens", token_indices=[3, 9, 27], target_modules=["embed_tokens"]),
    _adapter_case("trainable-tokens-lora", "Lora", **LORA, trainable_token_indices=[3, 9, 27]),
    WrapperCase("resized-embeddings", "lora", wrap=resize_vocabulary, data=rows_with_new_tokens, learning_rate=3e-3),
    WrapperCase("frozen-layers", "plain", wrap=freeze_lower_layers),
    WrapperCase("gradient-clipping", "no-clipping", learning_rate=0.1, arguments=CLIPPED),
    PENALTY,
    SKIPS,
    WrapperCase("pose-of-the-collator", "plain", inner=collate_with_skips),
    STREAM,
    STOPPED,
    AVERAGE,
    BF16,
]
# Only one process runs these: the controls, and the run from whose checkpoint two processes resume.
CONTROLS = [
    WrapperCase("plain"),
    _adapter_case("lora", "Lora", None, **LORA),
    WrapperCase("no-clipping", learning_rate=0.1, arguments={**CLIPPED, "max_grad_norm": 0.0}),
    LONGER,
]
# Only two processes run these. Each key is the name of the run of one process to compare with.
RESUMPTIONS = {"stream": replace(STREAM, name="stream-resumed", resume_from="world2/stream"), "plain-long": RESUMED}
MISTAKES = {
    "pose-of-the-dataset": replace(SKIPS, name="skips-forgotten", inner=collate_without_skips),
    "weight-penalty": replace(PENALTY, name="penalty-summed-over-ranks", trainer=DoublePenaltyTrainer),
    "plain-long": replace(RESUMED, name="resumed-without-optimizer", forget_optimizer=True),
}


def wrapper_cases(world_size: int) -> list[WrapperCase]:
    """Return all runs of the launch with `world_size` processes."""
    only_two = [*RESUMPTIONS.values(), *MISTAKES.values(), EVALUATED_FIRST]
    return [*CASES, *(CONTROLS if world_size == 1 else only_two)]
