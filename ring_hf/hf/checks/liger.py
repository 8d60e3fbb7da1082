"""`use_liger_kernel=True`: when training begins, Liger's forward pass replaces the model's own, loss included.

A fused loss that shifted the labels of a shard itself, or took the mean over them, would silently be wrong. Whether
Liger's forward pass accepts `shift_labels` and `num_items_in_batch` differs between models and releases. So the loss
of the model that is about to be trained is compared with the loss of its own logits.
"""

from typing import Any

from torch.nn.functional import cross_entropy

from ring_hf.memory import applied_to, token_wise

from ..batch_metadata import IGNORE_INDEX
from .model_rules import text_config

TOLERANCE = 1e-2  # relative; shifting labels twice, or taking a mean, changes the loss far more
_NUM_ITEMS = 5  # unequal to the number of targets, so that a mean differs from the sum divided by it


def check_liger(args: Any, model: Any, is_patched: bool) -> str | None:
    """Return an error message if this model cannot be trained with Liger's kernels, or None.

    Args:
        args: the Trainer's arguments.
        model: the model to train.
        is_patched: whether the Trainer has already installed the kernels; then the loss is run on a few tokens.
    """
    if not args.use_liger_kernel:
        return None
    applied = applied_to(model)
    if applied is not None and (applied.config.ffn_block, applied.config.loss_block) != (None, None):
        return (
            "use_liger_kernel=True replaces the loss and the feed-forward layers, so memory.apply("
            f"ffn_block={applied.config.ffn_block!r}, loss_block={applied.config.loss_block!r}) would be ignored. Set "
            "both to None, or use_liger_kernel=False."
        )
    if getattr(text_config(model), "output_router_logits", False):
        return (
            "use_liger_kernel=True with output_router_logits=True: the auxiliary loss would be that of one shard. Set "
            "one of them to False."
        )
    return _check_loss(model) if is_patched else None


def _check_loss(model: Any) -> str | None:
    tokens_BS = token_wise.tokens(model)
    shift_labels_BS = tokens_BS.new_full(tokens_BS.shape, IGNORE_INDEX)
    shift_labels_BS[:, 1::4] = tokens_BS[:, ::4]
    with token_wise.preserved_state(model):
        logits_BSV = model(input_ids=tokens_BS, use_cache=False).logits
        loss_sum = cross_entropy(
            logits_BSV.float().flatten(0, 1), shift_labels_BS.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        output = model(
            input_ids=tokens_BS,
            labels=tokens_BS,
            shift_labels=shift_labels_BS,
            num_items_in_batch=shift_labels_BS.new_tensor(_NUM_ITEMS),
            use_cache=False,
            skip_logits=True,  # in evaluation mode, Liger computes the fused loss of training only if asked
        )
        loss = float(output.loss)
    expected_loss = float(loss_sum) / _NUM_ITEMS
    if abs(loss - expected_loss) <= TOLERANCE * abs(expected_loss):
        return None
    return (
        f"use_liger_kernel=True gives {type(model).__name__} a loss that does not use shift_labels and "
        f"num_items_in_batch as they are ({loss:.6g} instead of {expected_loss:.6g}), so it is wrong on a shard. Set "
        'liger_kernel_config={"fused_linear_cross_entropy": False}, or use_liger_kernel=False and memory.apply('
        'loss_block="auto").'
    )
