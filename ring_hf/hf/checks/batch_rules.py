"""Arguments of a forward pass that are refused with a sharded batch, checked before every pass.

Every check needs only what this rank knows. `pass_message.py` compares values between ranks.
"""

from typing import Any

import torch
from accelerate.state import GradientState
from transformers import PreTrainedModel

from .. import context as process
from ..attention import shard_errors
from ..batch_metadata import METADATA_KEY, ContextParallelMetadata, InvalidBatch
from ..degrees import resolve_degrees
from .argument_rules import check_loader, check_loss_weights
from .moe_aux_loss import check_router_output


def check_batch(
    model: PreTrainedModel, args: tuple, kwargs: dict[str, Any], context: process.ProcessContext
) -> str | None:
    """Return an error message for the arguments of a forward pass on sharded sequences, or None.

    Args:
        model: the model that is called.
        args: its positional arguments.
        kwargs: its keyword arguments, `input_ids` [rows, tokens of this rank] among them.
        context: the ranks that share the sequences.
    """
    metadata = kwargs.get(METADATA_KEY)
    if isinstance(metadata, InvalidBatch):
        return metadata.message
    if not isinstance(metadata, ContextParallelMetadata):
        return shard_errors.MISSING_METADATA
    if args:
        return "The model got positional arguments. Pass the batch as keyword arguments: model(**batch)."
    return (
        _check_labels(model, kwargs)
        or _check_loss_weights(model, kwargs)
        or check_loader(GradientState().active_dataloader)
        or _check_unsupported(kwargs)
        or check_router_output(model, kwargs)
        or _check_degrees(model, metadata, context)
        or _check_input_ids(kwargs["input_ids"], metadata)
    )


def _check_labels(model: PreTrainedModel, kwargs: dict[str, Any]) -> str | None:
    if not model.training or kwargs.get("shift_labels") is None or kwargs.get("labels") is not None:
        return None
    return (
        "The batch has shift_labels, but labels were removed before the forward pass (label_smoothing_factor and "
        "compute_loss_func do that): a loss computed outside the model would see only one shard. Let the model "
        "compute the loss."
    )


def _check_loss_weights(model: PreTrainedModel, kwargs: dict[str, Any]) -> str | None:
    weights_BC = kwargs.get("loss_weights")
    if weights_BC is None:
        return None
    error = check_loss_weights(model)
    if error is None and weights_BC.dtype in (torch.bfloat16, torch.float16):
        error = (
            f"loss_weights have dtype {weights_BC.dtype}, which rounds them: with DeepSpeed in half precision, the "
            "Trainer casts all floating-point tensors of a batch. Use FSDP2 or DDP, which keep them in fp32."
        )
    return error


def _check_unsupported(kwargs: dict[str, Any]) -> str | None:
    if kwargs.get("attention_mask") is not None:
        return shard_errors.attention_mask_error("attention_mask")
    for name in ("past_key_values", "cache"):  # the name until Transformers 5.23, and since 5.24
        if kwargs.get(name) is not None:
            return shard_errors.kv_cache_error(f"{name} was passed with a sharded batch")
    if kwargs.get("inputs_embeds") is not None:
        return "inputs_embeds was passed with a sharded batch, but only token ids can be sharded. Leave it out."
    return shard_errors.OUTPUT_ATTENTIONS if kwargs.get("output_attentions") else None


def _check_degrees(
    model: PreTrainedModel, metadata: ContextParallelMetadata, context: process.ProcessContext
) -> str | None:
    """Compare the degrees of the model that runs with those of the model that the collator was built from."""
    try:
        degrees = resolve_degrees(model.config, context)
    except ValueError as error:
        return str(error)
    sequence = metadata.sequence
    if (degrees.layout, degrees.size, degrees.options) == (sequence.layout, sequence.num_ranks, metadata.options):
        return None
    details = ""
    if degrees.layout == sequence.layout:
        details = f", {sequence.num_ranks} ranks with ulysses_size={sequence.ulysses}, not for {degrees}"
    return shard_errors.layout_error(degrees.backend, metadata, details)


def _check_input_ids(input_ids_BC: torch.Tensor, metadata: ContextParallelMetadata) -> str | None:
    if input_ids_BC.shape[1] != metadata.shard_length:
        return shard_errors.shard_length_error(input_ids_BC.shape[1], metadata)
    if input_ids_BC.device.type not in ("cpu", "cuda"):
        return f"Device {input_ids_BC.device} is not supported by ring attention. Use a CPU or CUDA device."
    return None
