"""Losses and weights that are NaN or infinite: an error on every rank that names where they began.

Ring attention brings the keys of one rank to all, and the engine sums gradients over all ranks, so one step later
every rank has NaN everywhere. The Trainer would train on, leave those losses out of its log
(`logging_nan_inf_filter`), and write a checkpoint from which nothing can go on.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ring_hf.parallel import gather_numbers

from ..attention.backend import key_sums
from .pass_message import PassMessage

_NOWHERE = 2**31  # number of a layer that does not exist


def raise_if_not_finite(messages: Sequence[PassMessage], device: torch.device, prefix: str = "") -> None:
    """Raise if the last loss was not finite on any rank. A collective call of all processes in that case.

    Args:
        messages: of all processes, ordered by rank.
        device: of the tensors that are exchanged.
        prefix: of the error.

    Raises:
        ValueError: on every rank, with the ranks, and the first layer whose keys were not finite.
    """
    ranks = [rank for rank, message in enumerate(messages) if not message.is_finite]
    if not ranks:
        return
    first = key_sums.find_first_nonfinite()
    layers = [numbers[0] for numbers in gather_numbers([_NOWHERE if first is None else first], device)]
    earliest = min(layers)
    if earliest == _NOWHERE:
        origin = "The keys of all attention layers were finite, so it came up after the last of them"
    else:
        origins = [rank for rank, layer in enumerate(layers) if layer == earliest]
        origin = f"It came up on rank {_listed(origins)}, before the attention of layer {earliest} (counted from 0)"
    raise ValueError(
        f"{prefix}The loss of the last backward pass is NaN or infinite on rank {_listed(ranks)}. {origin}. Look at "
        "the batch and the learning rate; torch.autograd.set_detect_anomaly(True) names the operation. Start again "
        "from the last checkpoint, which is from before."
    )


def find_nonfinite_weights(parameters: Iterable[torch.nn.Parameter]) -> str | None:
    """Return an error message if a trained weight that this rank holds is NaN or infinite, else None.

    Args:
        parameters: whole ones, or shards of FSDP2 or ZeRO-3.
    """
    sums = [_local(parameter).sum(dtype=torch.float32) for parameter in parameters if parameter.requires_grad]
    if not sums or bool(torch.stack([total.to(sums[0].device) for total in sums]).isfinite().all()):
        return None
    return (
        "The weights are NaN or infinite, so no checkpoint is written. Start again from the last checkpoint, with a "
        "lower learning rate or max_grad_norm, or without the batch that did it."
    )


def _local(parameter: Any) -> torch.Tensor:
    """Return the elements of a parameter that this rank holds."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.detach()
    return parameter.to_local().detach() if hasattr(parameter, "to_local") else parameter.detach()


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
