"""One optimizer step of an unmodified Trainer, with all results that must equal those of one process.

The Trainer is Transformers' own. A callback records the results, with a hook that is registered after ring_hf has
checked the model for hooks. A step has two micro-batches with different numbers of targets, spread unevenly over rows,
so that a mean of means differs from the mean over all targets.

Shapes: B rows, C tokens of this rank, S tokens of the whole row, V tokens of the vocabulary.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ring_hf.hf import ContextParallelCollator, ContextParallelConfig
from ring_hf.hf.batch_metadata import METADATA_KEY, ContextParallelMetadata

MICRO_BATCHES = 2
LENGTHS = (40, 33, 29, 36)  # of the rows, two in each micro-batch
# Tokens at the start of each row that are not targets. For models without a `loss_type`, the Trainer also counts the
# first label of a row, which is never predicted.
PROMPT_LENGTHS = (0, 21, 0, 12)
PROCESS_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class ForwardPass:
    """One micro-batch.

    Attributes:
        logits_BCV: of this rank's tokens.
        attention_mask: [B, S] as the model got it, or None.
        metadata: of the batch; None if the sequence is not sharded.
        is_counted: whether the Trainer passed the number of targets to the model.
        aux_loss: of the routers, if the model has one.
    """

    logits_BCV: torch.Tensor
    attention_mask: torch.Tensor | None
    metadata: ContextParallelMetadata | None
    is_counted: bool
    aux_loss: float | None


@dataclass
class Step:
    """The logged loss, the gradients of the optimizer step by parameter, and the forward passes."""

    loss: float = float("nan")
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    passes: list[ForwardPass] = field(default_factory=list)


class Recorder(TrainerCallback):
    """Records a `Step`. Its hook runs after those of ring_hf and gets the output that the Trainer gets."""

    def __init__(self) -> None:
        self.step = Step()
        self._hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._hook = model.register_forward_hook(self._after_forward, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hook.remove()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for name, parameter in model.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            self.step.gradients[name] = gradient.detach().clone()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.step.loss = logs.get("loss", self.step.loss)

    def _after_forward(self, model: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        aux_loss = getattr(output, "aux_loss", None)
        self.step.passes.append(
            ForwardPass(
                logits_BCV=output.logits.detach(),
                attention_mask=kwargs.get("attention_mask"),
                metadata=kwargs.get(METADATA_KEY),
                is_counted=kwargs.get("num_items_in_batch") is not None,
                aux_loss=None if aux_loss is None else aux_loss.item(),
            )
        )


def make_examples(vocab_size: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    examples = []
    for length, num_ignored in zip(LENGTHS, PROMPT_LENGTHS, strict=True):
        tokens = torch.randint(3, vocab_size, (length,), generator=generator).tolist()
        examples.append({"input_ids": tokens, "labels": [-100] * num_ignored + tokens[num_ignored:]})
    return examples


def train_one_step(model: PreTrainedModel, num_ranks: int | None, packing: bool = False) -> Step:
    """Train for one optimizer step and return its results.

    Args:
        model: the model to train.
        num_ranks: ranks that share each sequence; None: no `ContextParallelConfig` at all.
        packing: concatenate the rows of a micro-batch, as documents of one row.
    """
    config = None if num_ranks is None else ContextParallelConfig(context_parallel_size=num_ranks)
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # nothing is saved
        max_steps=1,
        per_device_train_batch_size=len(LENGTHS) // MICRO_BATCHES,
        gradient_accumulation_steps=MICRO_BATCHES,
        train_sampling_strategy="sequential",
        optim="sgd",
        max_grad_norm=0.0,  # no clipping
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        save_strategy="no",
        parallelism_config=config,
    )
    recorder = Recorder()
    trainer = Trainer(
        model,
        arguments,
        train_dataset=make_examples(model.config.get_text_config().vocab_size),
        data_collator=ContextParallelCollator(model, packing=packing),
        callbacks=[recorder],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return recorder.step


@contextmanager
def one_process() -> Iterator[None]:
    """Make this process look to Accelerate as if it had been started alone."""
    variables = {name: os.environ.pop(name) for name in PROCESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(variables)
        AcceleratorState._reset_state(reset_partial_state=True)
