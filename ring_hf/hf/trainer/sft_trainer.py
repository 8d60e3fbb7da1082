"""TRL's SFTTrainer as it is: the collator that it builds for itself is sharded without a change of the script.

A Trainer of Transformers gets its collator from the user. SFTTrainer builds its own, from its settings, and refuses a
collator for packed and padding-free rows, so nobody could pass a `ContextParallelCollator` around it. The callback
puts one there when the Trainer is made. TRL's collator still makes the whole batch. Only TRL's own class is known to
do nothing else: a subclass or any other collator stays as the user passed it.
"""

from typing import Any

from transformers import PreTrainedModel, Trainer

from ..collate.collator import ContextParallelCollator

OWN_COLLATOR = ("trl.trainer.sft_trainer", "DataCollatorForLanguageModeling")
WEIGHTS_COLUMN = "loss_weights"


def is_sft_trainer(trainer_class: type) -> bool:
    """Return whether a class is TRL's SFTTrainer or derives from it.

    Its `compute_loss` gathers sums over tokens: how many count, their entropy, how many were predicted correctly.
    """
    return any(
        base.__name__ == "SFTTrainer" and base.__module__.split(".")[0] == "trl" for base in trainer_class.__mro__
    )


def shard_own_collator(trainer: Trainer, model: PreTrainedModel) -> None:
    """Put a `ContextParallelCollator` around the collator that an SFTTrainer built for itself. Idempotent.

    Args:
        trainer: any Trainer; all but SFTTrainers with a collator of TRL are left alone.
        model: the Transformers model that is trained; its attention implementation selects the layout.
    """
    collator: Any = trainer.data_collator
    if not is_sft_trainer(type(trainer)) or (type(collator).__module__, type(collator).__name__) != OWN_COLLATOR:
        return
    trainer.data_collator = ContextParallelCollator(model, inner=collator)
    original = getattr(trainer, "_reject_skip_prepare_without_labels", None)
    if original is not None:  # it knows columns that a collator of this class ignores

        def reject(datasets: Any, data_collator: Any) -> None:
            original(datasets, getattr(data_collator, "inner", data_collator))

        trainer._reject_skip_prepare_without_labels = reject


def check_sft_columns(trainer: Trainer) -> str | None:
    """Return an error message if an SFTTrainer would ignore weights of its datasets, else None."""
    if not is_sft_trainer(type(trainer)):
        return None
    datasets = {"train_dataset": trainer.train_dataset}
    evaluation = trainer.eval_dataset
    datasets |= evaluation if isinstance(evaluation, dict) else {"eval_dataset": evaluation}
    for name, dataset in datasets.items():
        if WEIGHTS_COLUMN in (getattr(dataset, "column_names", None) or ()):
            return (
                f"{name} has a column {WEIGHTS_COLUMN}, which the loss of {type(trainer).__name__} ignores. Train "
                "with Transformers' Trainer and ring_hf.memory.apply(model, loss_block='auto'), or remove the column."
            )
    return None
