"""`use_liger_kernel=True`: Liger's forward pass takes the place of a model's own when training begins, loss included.

A fused loss that shifted the labels of a shard by itself, or took the mean over them, would be wrong in silence, and
whether Liger's forward pass takes `shift_labels` and `num_items_in_batch` differs from model to model and release to
release. So it is tried on the model that is about to be trained, against the loss of its own logits.
"""

from typing import Any

from torch.nn.functional import cross_entropy

from ring_hf.memory import applied_to, token_wise

from ..batch_metadata import IGNORE_INDEX
from .model_rules import text_config

TOLERANCE = 1e-2  # relative: labels that are shifted anew, or a mean, differ by far more
_ITEMS = 5  # not the number of targets: a mean is told from a share


def check_liger(args: Any, model: Any, applied: bool) -> str | None:
    """Why this model cannot be trained with Liger's kernels, or None.

    Args:
        applied: whether the Trainer has put them in; then the loss is tried, in a pass of a few tokens.
    """
    if not args.use_liger_kernel:
        return None
    levers = applied_to(model)
    if levers is not None and (levers.config.ffn_block, levers.config.loss_block) != (None, None):
        return (
            "use_liger_kernel=True takes the place of the loss and of feed-forward layers, so that memory.apply(ffn_"
            f"block={levers.config.ffn_block!r}, loss_block={levers.config.loss_block!r}) would be ignored. Set both "
            "to None, or use_liger_kernel=False."
        )
    if getattr(text_config(model), "output_router_logits", False):
        return (
            "use_liger_kernel=True with output_router_logits=True: the auxiliary loss would be that of one shard. Set "
            "one of them to False."
        )
    return _try(model) if applied else None


def _try(model: Any) -> str | None:
    tokens = token_wise.tokens(model)
    targets = tokens.new_full(tokens.shape, IGNORE_INDEX)
    targets[:, 1::4] = tokens[:, ::4]
    labels = {"labels": tokens, "shift_labels": targets, "num_items_in_batch": targets.new_tensor(_ITEMS)}
    with token_wise.undisturbed(model):
        logits = model(input_ids=tokens, use_cache=False).logits
        total = cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        # In evaluation only those who ask get the fused loss, which training always takes.
        found = float(model(input_ids=tokens, use_cache=False, skip_logits=True, **labels).loss)
    wanted = float(total) / _ITEMS
    if abs(found - wanted) <= TOLERANCE * abs(wanted):
        return None
    return (
        f"use_liger_kernel=True gives {type(model).__name__} a loss that does not take the labels of a shard as they "
        f"are (shift_labels and num_items_in_batch: {found:.6g} instead of {wanted:.6g}). Set "
        'liger_kernel_config={"fused_linear_cross_entropy": False}, or use_liger_kernel=False and memory.apply(loss_'
        'block="auto").'
    )
