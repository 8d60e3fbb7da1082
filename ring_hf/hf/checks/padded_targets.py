"""Targets that padding would have to predict, as `padding="max_length"` with `labels = input_ids.copy()` makes them.

Under `sdpa` a padded query attends to the real tokens before it. The ring backends leave padding out, or let it attend
to other padding: nothing that counts depends on it. Where a label asks a padded token for a prediction, the loss
would differ, so that is refused, with context parallelism and without.

Shapes: B rows, S tokens.
"""

from typing import Any

import torch

from ..attn_names import BACKENDS, attention_name
from ..batch_metadata import IGNORE_INDEX
from ..documents import shift_left


def check(shift_labels_BS: torch.Tensor, attention_mask_BS: torch.Tensor) -> str | None:
    """Return the message for a batch whose padding has targets."""
    count = int(((attention_mask_BS == 0) & (shift_labels_BS != IGNORE_INDEX)).sum())
    if count == 0:
        return None
    return (
        f"{count} targets are to be predicted by padding (attention_mask 0), which attends to nothing under the ring "
        f"backends. Set the labels of padding to {IGNORE_INDEX}, for example "
        f"labels[attention_mask == 0] = {IGNORE_INDEX}."
    )


def refuse(model: Any, kwargs: dict[str, Any]) -> None:
    """Raise if a whole batch, in a process that shares no sequences, has such targets."""
    labels, mask = kwargs.get("labels"), kwargs.get("attention_mask")
    if labels is None or mask is None or mask.shape != labels.shape or attention_name(model.config) not in BACKENDS:
        return
    shift_labels = kwargs.get("shift_labels")
    error = check(shift_left(labels) if shift_labels is None else shift_labels, mask)
    if error is not None:
        raise ValueError(error)
