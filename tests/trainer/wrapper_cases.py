"""What users put around a model and its Trainer: adapters, streams, callbacks, positions that skip, terms of the loss.

One frozen `WrapperCase` per training run. Each is trained by one process with `sdpa` and by two processes that share
every sequence. A case names its `control`, the same run without the feature: a feature that changes nothing would
prove nothing.
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
LONG = MIDDLE + STEPS
NEW_TOKENS = 6
LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}

Wrap = Callable[[nn.Module], nn.Module]
Features = list[dict[str, Any]]


# Models


def as_it_is(model: nn.Module) -> nn.Module:
    return model


def adapter(kind: str, **settings: Any) -> Wrap:
    """The model with an adapter of PEFT, for example kind="IA3"."""

    def wrap(model: Any) -> nn.Module:
        import peft  # here, since whoever collects the tests needs only the names of the cases

        return peft.get_peft_model(model, getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", **settings))

    return wrap


def frozen(model: Any) -> nn.Module:
    """Only the last layer and the head are trained."""
    model.get_input_embeddings().requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    return model


def resized(model: Any) -> nn.Module:
    """A larger vocabulary, whose embeddings and head are trained and saved whole beside LoRA."""
    model.resize_token_embeddings(VOCABULARY + NEW_TOKENS)
    return adapter("Lora", **LORA, modules_to_save=["embed_tokens", "lm_head"])(model)


# Data


def rows(steps: int = STEPS) -> Rows:
    return Rows(ROWS_PER_STEP * steps, "uneven")


def rows_for_long() -> Rows:
    return rows(LONG)


def rows_with_new_tokens() -> Rows:
    """The tokens that `resized` adds occur in prompts and as targets."""
    data = rows()
    for row in data.rows:
        for key in ("input_ids", "labels"):
            row[key] = [token + VOCABULARY if 0 <= token < NEW_TOKENS else token for token in row[key]]
    return data


def with_skips(row: dict[str, Any]) -> dict[str, Any]:
    """The row with positions as in PoSE (Zhu et al. 2023, "Efficient Context Window Extension of LLMs via Positional
    Skip-wise Training"): its second part lies where that of a longer row would. Its tokens are the random numbers, so
    that every rank draws the same. Without a mask, a position that skips would begin a document."""
    length, number = len(row["input_ids"]), sum(row["input_ids"])
    begin, skip = 5 + number % (length - 10), number % 150
    positions = [position + skip * (position >= begin) for position in range(length)]
    return {**row, "position_ids": positions, "attention_mask": [1] * length}


def rows_that_skip() -> list[dict[str, Any]]:
    return [with_skips(row) for row in rows().rows]


def stream() -> Any:
    """28 steps are two epochs and part of a third. Each is shuffled anew: the order of the parts, and in a buffer."""
    from datasets import Dataset

    return Dataset.from_list(rows(12).rows).to_iterable_dataset(num_shards=4).shuffle(seed=7, buffer_size=16)


def eval_rows() -> Any:
    return Rows(7, "uneven", seed=2)  # leaves a ragged last batch


def near_and_far() -> dict[str, Any]:
    """Every other target of `far` is a token that no training row holds: its loss falls for some steps, then rises."""
    far = []
    for row in eval_rows().rows:
        labels = [0 if index % 10 < 5 and label >= 0 else label for index, label in enumerate(row["labels"])]
        far.append({**row, "labels": labels})
    return {"near": eval_rows(), "far": far}


def several_sets() -> dict[str, Any]:
    return {f"set{seed}": Rows(7, "uneven", seed=seed) for seed in range(2, 8)}


# Collators, called before the batch is cut into shards


def collate_with_skips(features: Features) -> Mapping[str, torch.Tensor]:
    return PadOrPackCollator()([with_skips(row) for row in features])


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
    """Adds what the penalties of two ranks would sum up to."""

    coefficient = 2 * PenaltyTrainer.coefficient


class MovingAverage(TrainerCallback):
    """A copy of the model whose weights are an exponential moving average (EMA) of those that are trained. Whenever
    the model is evaluated, so is the copy: on the batches of the Trainer's loader, and on a whole row without them."""

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
    """The steps of this run alone: the Trainer's log also holds those before the checkpoint that is resumed from."""

    steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1


def no_callbacks() -> list[TrainerCallback]:
    return []


# Runs


@dataclass(frozen=True)
class WrapperCase:
    """One run of a Trainer with what its user added."""

    name: str
    control: str | None = None  # None if the feature shows after training, or in evaluations
    wrap: Wrap = as_it_is
    data: Callable[[], Any] = rows
    eval_data: Callable[[], Any] = eval_rows
    inner: Callable[[Features], Mapping[str, torch.Tensor]] | None = None
    trainer: type[Trainer] = Trainer
    callbacks: Callable[[], list[TrainerCallback]] = no_callbacks
    steps: int = STEPS
    learning_rate: float = 3e-4
    resume_from: str | None = None  # launch and name of the run whose checkpoint is resumed from
    forget_optimizer: bool = False
    evaluate_first: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steps_before(self) -> int:
        """Steps of the run that this one resumes."""
        return 0 if self.resume_from is None else MIDDLE


def _adapted(name: str, kind: str, control: str | None = "lora", **settings: Any) -> WrapperCase:
    return WrapperCase(name, control, wrap=adapter(kind, **settings), learning_rate=3e-3)


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
LONGER = WrapperCase("plain-long", data=rows_for_long, steps=LONG, arguments=SAVED)
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
    _adapted("dora", "Lora", **LORA, use_dora=True),
    _adapted("ia3", "IA3", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    _adapted("oft", "OFT", target_modules=["q_proj", "v_proj"], oft_block_size=8),
    _adapted("trainable-tokens", "TrainableTokens", token_indices=[3, 9, 27], target_modules=["embed_tokens"]),
    _adapted("trainable-tokens-lora", "Lora", **LORA, trainable_token_indices=[3, 9, 27]),
    WrapperCase("resized-embeddings", "lora", wrap=resized, data=rows_with_new_tokens, learning_rate=3e-3),
    WrapperCase("frozen-layers", "plain", wrap=frozen),
    WrapperCase("gradient-clipping", "no-clipping", learning_rate=0.1, arguments=CLIPPED),
    PENALTY,
    SKIPS,
    WrapperCase("pose-of-the-collator", "plain", inner=collate_with_skips),
    STREAM,
    STOPPED,
    AVERAGE,
    BF16,
]
# Only one process runs these: what the features are held against, and the run whose checkpoint two processes take.
CONTROLS = [
    WrapperCase("plain"),
    _adapted("lora", "Lora", None, **LORA),
    WrapperCase("no-clipping", learning_rate=0.1, arguments={**CLIPPED, "max_grad_norm": 0.0}),
    LONGER,
]
# Only two processes run these; each is compared with the run of one process that is named.
RESUMPTIONS = {"stream": replace(STREAM, name="stream-resumed", resume_from="world2/stream"), "plain-long": RESUMED}
MISTAKES = {
    "pose-of-the-dataset": replace(SKIPS, name="skips-forgotten", inner=collate_without_skips),
    "weight-penalty": replace(PENALTY, name="penalty-summed-over-ranks", trainer=DoublePenaltyTrainer),
    "plain-long": replace(RESUMED, name="resumed-without-optimizer", forget_optimizer=True),
}


def wrapper_cases(world_size: int) -> list[WrapperCase]:
    """All runs of the launch with `world_size` processes."""
    two = [*RESUMPTIONS.values(), *MISTAKES.values(), EVALUATED_FIRST]
    return [*CASES, *(CONTROLS if world_size == 1 else two)]
