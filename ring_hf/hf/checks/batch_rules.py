"""What is refused of one batch, at every forward pass: arguments that do not belong beside a shard.

These are checks of what this rank can see by itself. What ranks must compare is in `pass_message.py`.
"""

from typing import Any

import torch
from accelerate.state import GradientState
from transformers import PreTrainedModel

from .. import context as process
from ..attention.backend import MISSING_METADATA_ERROR
from ..batch_metadata import METADATA_KEY, ContextParallelMetadata, InvalidBatch
from ..degrees import resolve_degrees
from .argument_rules import check_loader, check_weights
from .moe_aux_loss import router_output_error


def find_batch_error(
    model: PreTrainedModel, args: tuple, kwargs: dict[str, Any], context: process.ProcessContext
) -> str | None:
    """Return what is wrong with the arguments of a forward pass of sharded sequences, as far as this rank can see."""
    batch = kwargs.get(METADATA_KEY)
    if isinstance(batch, InvalidBatch):
        return batch.message
    if not isinstance(batch, ContextParallelMetadata):
        return MISSING_METADATA_ERROR
    if args:
        return "Tokens were passed by position. Call the model with the batch as keyword arguments: model(**batch)."
    if model.training and kwargs.get("shift_labels") is not None and kwargs.get("labels") is None:
        return (
            "The batch has shift_labels but its labels were taken out before the forward pass (as "
            "label_smoothing_factor and compute_loss_func do): a loss outside the model would see one shard. Let the "
            "model compute the loss."
        )
    if kwargs.get("loss_weights") is not None and (weights_error := check_weights(model)) is not None:
        return weights_error
    weights_BC = kwargs.get("loss_weights")
    if weights_BC is not None and weights_BC.dtype in (torch.bfloat16, torch.float16):
        return (
            f"loss_weights are {weights_BC.dtype}, which rounds them: under DeepSpeed in half precision, the Trainer "
            "casts all numbers of a batch. Use FSDP2 or DDP, which keep them in fp32."
        )
    loader_error = check_loader(GradientState().active_dataloader)
    if loader_error is not None:
        return loader_error
    for name, why in (
        ("attention_mask", "padding and documents travel in the batch that ContextParallelCollator made"),
        ("past_key_values", "a KV cache cannot be combined with sharded sequences"),
        ("inputs_embeds", "only token ids can be sharded"),
    ):
        if kwargs.get(name) is not None:
            return f"{name} was passed beside a sharded batch, but {why}. Leave it out."
    if kwargs.get("output_attentions"):
        return "output_attentions=True needs the attention matrix, which ring attention never builds. Set it to False."
    error = router_output_error(model, kwargs) or _find_other_degrees(model, batch, context)
    if error is not None:
        return error
    num_tokens, sequence = kwargs["input_ids"].shape[1], batch.sequence
    if num_tokens != batch.shard_length:
        return (
            f"This rank got {num_tokens} tokens, but its {sequence.layout} shard of {sequence.length} tokens has "
            f"{batch.shard_length}. Do not cut or pad the batch after ContextParallelCollator."
        )
    if kwargs["input_ids"].device.type not in ("cpu", "cuda"):
        return f"Device {kwargs['input_ids'].device} is not supported by ring attention. Use a CPU or CUDA device."
    return None


def _find_other_degrees(
    model: PreTrainedModel, batch: ContextParallelMetadata, context: process.ProcessContext
) -> str | None:
    """The collator resolved the split from the model it was given: is it still that of the model that runs?"""
    try:
        degrees = resolve_degrees(model.config, context)
    except ValueError as error:
        return str(error)
    sequence = batch.sequence
    if (degrees.layout, degrees.size, degrees.options) == (sequence.layout, sequence.num_ranks, batch.options):
        return None
    more = (
        f", {sequence.num_ranks} ranks with ulysses_size={sequence.ulysses}, not for {degrees}"
        if degrees.layout == sequence.layout
        else ""
    )
    return (
        f"The model attends with {degrees.backend!r}, but the batch was sharded for layout {sequence.layout!r}{more}. "
        "Build the collator from the model that is trained, after its last set_attn_implementation call."
    )
