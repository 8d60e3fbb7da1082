"""The parts of a case: models, rows, arguments, and the record of a rank.

Every case is a function of a `Setting`, written like the script of a user. Its `mode` is how the script runs:

    reference   one process, `sdpa`
    alone       one process, `ring_zigzag`
    shared      two processes that share each sequence, `ring_zigzag`

All modes use the same global batch, so `per_device_train_batch_size` is the same in all of them.
"""

import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from ring_hf import ContextParallelCollator, ContextParallelConfig

VOCABULARY = 64
LENGTH = 48
STEPS = 20
BATCH = 4  # rows per optimizer step
LEARNING_RATE = 3e-4
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # large enough for attention to be far from uniform from the first step on
}


@dataclass
class Record:
    """The results of one rank: losses and grad norms of all optimizer steps, evaluation losses, and how it ended.

    Attributes:
        outputs: other numbers that must equal those of one process.
        error: type and message of the error.
        raised_by: file and function that raised it.
        stage: "construction", then "training", then "afterwards".
        seconds: from the start of train() to its end or to the error.
    """

    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    eval_loss: list[float] = field(default_factory=list)
    outputs: list[float] = field(default_factory=list)
    error: str | None = None
    raised_by: str | None = None
    stage: str = "construction"
    seconds: float | None = None
    start_time: float | None = None

    def start(self) -> None:
        """Mark the start of training. A custom loop calls this itself."""
        self.stage = "training"
        self.start_time = time.perf_counter()

    def stop(self) -> None:
        self.seconds = None if self.start_time is None else round(time.perf_counter() - self.start_time, 2)
        self.stage = "afterwards"

    def fail(self, error: BaseException) -> None:
        if self.stage == "training" and self.start_time is not None:
            self.seconds = round(time.perf_counter() - self.start_time, 2)
        self.error = f"{type(error).__name__}: {error}"
        frame = traceback.extract_tb(error.__traceback__)[-1]
        self.raised_by = f"{'/'.join(Path(frame.filename).parts[-3:])}:{frame.name}"

    def write(self, path: Path) -> None:
        fields = {key: value for key, value in vars(self).items() if key != "start_time"}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(fields))
        partial.rename(path)


class _Recorder(TrainerCallback):
    def __init__(self, record: Record) -> None:
        self.record = record

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "grad_norm" in logs:
            self.record.loss.append(logs["loss"])
            self.record.grad_norm.append(logs["grad_norm"])
        self.record.eval_loss.extend(value for key, value in logs.items() if key == "eval_loss")


@dataclass
class Setting:
    """One run of a case on this rank."""

    mode: str
    folder: Path
    record: Record = field(default_factory=Record)

    @property
    def attention(self) -> str:
        return "sdpa" if self.mode == "reference" else "ring_zigzag"

    def config(self) -> ContextParallelConfig | None:
        return ContextParallelConfig(context_parallel_size=2) if self.mode == "shared" else None

    def llama(self, model_class: Callable[[LlamaConfig], Any] = LlamaForCausalLM, **changes: Any) -> Any:
        """Return a random two-layer model with the same weights in every mode."""
        torch.manual_seed(0)
        return model_class(LlamaConfig(**{**SIZES, **changes}, attn_implementation=self.attention))

    def arguments(self, arguments_class: Callable[..., Any] = TrainingArguments, **changes: Any) -> Any:
        settings: dict[str, Any] = {
            "output_dir": str(self.folder / "output"),
            "max_steps": STEPS,
            "per_device_train_batch_size": BATCH,
            "per_device_eval_batch_size": BATCH,
            "learning_rate": LEARNING_RATE,
            "logging_steps": 1,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
        }
        if "parallelism_config" not in changes:
            settings["parallelism_config"] = self.config()
        return arguments_class(**{**settings, **changes})

    def trainer(
        self,
        model: Any = None,
        rows: Any = None,
        collator: Any = None,
        trainer_class: Callable[..., Any] = Trainer,
        callbacks: Sequence[TrainerCallback] = (),
        eval_rows: Any = None,
        args: Any = None,
        trainer_kwargs: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Any:
        """Return a Trainer as README builds it, with the changes of a case.

        Args:
            trainer_kwargs: further arguments of the Trainer.
            changes: changed `TrainingArguments`.
        """
        model = self.llama() if model is None else model
        if eval_rows is not None:
            changes = {"eval_strategy": "steps", "eval_steps": STEPS // 2, **changes}
        return trainer_class(
            model=model,
            args=self.arguments(**changes) if args is None else args,
            train_dataset=examples(BATCH * STEPS) if rows is None else rows,
            eval_dataset=eval_rows,
            data_collator=ContextParallelCollator(model) if collator is None else collator,
            callbacks=list(callbacks),
            **(trainer_kwargs or {}),
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Build a Trainer, run it, and return it."""
        return self.run(self.trainer(*args, **kwargs))

    def run(self, trainer: Any) -> Any:
        trainer.add_callback(_Recorder(self.record))
        self.record.start()
        trainer.train()
        self.record.stop()
        return trainer


def examples(num_rows: int, length: int | None = None, seed: int = 1) -> list[dict[str, list[int]]]:
    """Return rows of repeated tokens, so that attending far back helps.

    Each row begins with a prompt of at least one token without labels, so that shards hold unequal numbers of targets.

    Args:
        length: tokens of each row; by default, lengths differ.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(num_rows):
        num_tokens = length or LENGTH - (row * 11) % 23
        tokens = torch.randint(1, VOCABULARY, (9 + row % 8,), generator=generator).repeat(num_tokens)[:num_tokens]
        labels = tokens.clone()
        labels[: 1 + (row * 13) % (num_tokens * 3 // 4)] = -100
        rows.append({"input_ids": tokens.tolist(), "labels": labels.tolist()})
    return rows
