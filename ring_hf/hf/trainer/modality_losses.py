"""The loss of each modality in the training log: text, and vision codes.

The loss in blocks (`ring_hf.memory.apply`) has the loss of every token where it computes the logits. Their sums by
modality are kept while training and added up over ranks when the Trainer logs, in one message of four numbers. The
loss of a model itself is one number, from which they cannot be told apart; so it is refused.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from ring_hf.memory import applied_to

from ..batch_metadata import IGNORE_INDEX
from ..runtime.runtime_state import runtime_state
from .callback import add_to_logs

MODALITIES = ("text", "vision")


def log_modality_losses(trainer: Trainer, vision_offset: int) -> None:
    """Add `text_loss` and `vision_loss` to the training logs of a Trainer.

    Each is the mean over the targets of that modality since the last log, over micro-batches and ranks, by
    `loss_weights` where a batch has them. A modality without a target is left out.

    Args:
        trainer: a Trainer, before `train()`. Its model takes the loss in blocks.
        vision_offset (`int`): the token of vision code 0; text is below.

    Raises:
        ValueError: if the model takes its loss in another way.
    """
    applied = applied_to(trainer.model)
    if applied is None or applied.head is None:
        raise ValueError(
            f"{type(trainer.model).__name__} computes one loss for all tokens, so text and vision cannot be told "
            "apart. Call ring_hf.memory.apply(model, loss_block='auto') before the Trainer is made."
        )
    losses = ModalityLosses(trainer, vision_offset)
    applied.observers.append(losses.observe)
    trainer.callback_handler.callbacks.insert(0, losses)  # before those that report what it adds


class ModalityLosses(TrainerCallback):
    """Sums of losses and of weights by modality, since the last log.

    Attributes:
        sums: fp64 `[2, 2]`: for text and for vision, the sum of `weight * loss` and that of `weight`.
    """

    def __init__(self, trainer: Trainer, vision_offset: int):
        self.accelerator = trainer.accelerator
        self.vision_offset = vision_offset
        self.sums = self._zeros()

    def _zeros(self) -> Tensor:
        return torch.zeros(2, 2, dtype=torch.float64, device=self.accelerator.device)

    def observe(self, losses_T: Tensor, labels_T: Tensor, weights_T: Tensor | None) -> None:
        if runtime_state.captured_losses is not None:
            return  # a trial step, which trains nothing
        weights_T = torch.ones_like(losses_T) if weights_T is None else weights_T
        is_vision_T = labels_T >= self.vision_offset
        for row, is_counted_T in zip(self.sums, (~is_vision_T & (labels_T != IGNORE_INDEX), is_vision_T), strict=True):
            counted_T = (weights_T * is_counted_T).double()
            row += torch.stack([(counted_T * losses_T).sum(), counted_T.sum()])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sums = self._zeros()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        sums = self.accelerator.reduce(self.sums, reduction="sum").tolist()
        self.sums = self._zeros()
        means = {
            f"{name}_loss": loss / weight for name, (loss, weight) in zip(MODALITIES, sums, strict=True) if weight
        }
        add_to_logs(means, logs, state)
