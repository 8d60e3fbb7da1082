"""Targets that padding would have to predict, as `padding="max_length"` with `labels = input_ids.copy()` makes them.

Under `sdpa`, a padded query attends to the real tokens before it. The ring backends skip padding, or let it attend to
other padding, because no result depends on it. A label on a padded position would make the loss depend on it, so
these batches are refused, with context parallelism and without.

Shapes: B rows, S tokens.
"""

from typing import Any

import torch

from ..attn_names import BACKENDS, attention_name
from ..batch_metadata import IGNORE_INDEX
from ..documents import shift_left


def check_padded_targets(shift_labels_BS: torch.Tensor, attention_mask_BS: torch.Tensor) -> str | None:
    """Return an error message for a batch with targets on padded positions, or None.

    Args:
        shift_labels_BS: integers, the label of the next token at every position.
        attention_mask_BS: 0 where a position is padding.
    """
    num_targets = int(((attention_mask_BS == 0) & (shift_labels_BS != IGNORE_INDEX)).sum())
    if num_targets == 0:
        return None
    return (
        f"{num_targets} targets would be predicted from padding (attention_mask 0), which attends to nothing under "
        f"the ring backends. Set the labels of padding to {IGNORE_INDEX}, for example "
        f"labels[attention_mask == 0] = {IGNORE_INDEX}."
    )


def refuse_padded_targets(model: Any, kwargs: dict[str, Any]) -> None:
    """Check the arguments of a forward pass on whole sequences, in a process that shares none.

    Raises:
        ValueError: if the model attends with a ring backend and the batch has targets on padded positions.
    """
    labels_BS, mask_BS = kwargs.get("labels"), kwargs.get("attention_mask")
    if labels_BS is None or mask_BS is None or mask_BS.shape != labels_BS.shape:
        return
    if attention_name(model.config) not in BACKENDS:
        return
    shift_labels_BS = kwargs.get("shift_labels")
    if shift_labels_BS is None:
        shift_labels_BS = shift_left(labels_BS)
    error = check_padded_targets(shift_labels_BS, mask_BS)
    if error is not None:
        raise ValueError(error)
