"""Loss weights by which every example counts the same, however many of its tokens have a loss.

Packed into one sequence, a long answer has more targets than a short one, and the mean over targets hears little of
the short one. The Large World Model (Liu et al. 2024, section 4 and its ablation of masked packing) therefore weighs
the loss so that an example counts as it would alone. With a weight of `1 / number of targets` for each target,

    sum(weight * loss) / sum(weight) = mean over examples of the mean loss of an example,

over any sequences, micro-batches and ranks that share an optimizer step. `ring_hf.count_loss_weights` makes a Trainer
divide by that sum; a training loop of its own passes it as `num_items_in_batch`, or leaves it out.
"""

from typing import Any

import numpy as np
from datasets import Dataset, Features

from .tokens import COLUMNS, LABELS, WEIGHTS

_IGNORED = -100
WEIGHTINGS = ("tokens", "examples")


def check_weighting(loss_weighting: str) -> None:
    """Raise `ValueError` if there is no loss weighting of that name."""
    if loss_weighting not in WEIGHTINGS:
        raise ValueError(f"loss_weighting={loss_weighting!r} is unknown. Choose one of {', '.join(WEIGHTINGS)}.")


def weigh_examples(tokens: Dataset, num_proc: int | None = None) -> Dataset:
    """Add (or multiply into) the column `loss_weights`, so that the weights of every example sum to 1.

    Weigh after examples are cut to length and before they are packed.

    Args:
        tokens (`Dataset`): a tokenised dataset, one example in each row. Weights it has, such as those of a modality,
            keep their proportions within an example.
        num_proc (`int`, *optional*): worker processes.

    Raises:
        ValueError: if an example has no target, or only targets of weight 0.
    """
    features = Features({**{name: tokens.features[name] for name in tokens.column_names}, WEIGHTS: COLUMNS[WEIGHTS]})
    return tokens.map(
        _weigh,
        with_indices=True,
        features=features,
        num_proc=num_proc,
        fn_kwargs={"has_labels": LABELS in tokens.column_names, "has_weights": WEIGHTS in tokens.column_names},
        desc="Weighing examples",
    )


def _weigh(row: dict[str, Any], index: int, has_labels: bool, has_weights: bool) -> dict[str, np.ndarray]:
    labels = row[LABELS] if has_labels and row[LABELS] is not None else row["input_ids"]
    is_target = np.asarray(labels) != _IGNORED
    is_target[:1] = False  # no token predicts the first
    weights = np.asarray(row[WEIGHTS]) if has_weights and row[WEIGHTS] is not None else np.ones(len(labels))
    weights = np.where(is_target, weights.astype(np.float64), 0.0)
    total = weights.sum()
    if total == 0:
        raise ValueError(
            f"example {index + 1} has no target with a weight, so it cannot count as much as others. Leave it out: a "
            "row needs a second token with a label."
        )
    return {WEIGHTS: (weights / total).astype(np.float32)}
