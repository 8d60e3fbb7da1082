"""The load-balancing loss of mixture-of-experts models, over whole sequences.

Transformers' models with `output_router_logits=True` add `coefficient * sum_e f_e p_e` to the loss, where f_e is the
share of tokens sent to expert e and p_e its mean router probability (Fedus et al. 2021, "Switch Transformers"). Both
are means over all tokens, and the product of the means of shards is not the product of the means of the sequence. So
every rank gathers the router logits of the whole sequence, without padding, before the model computes the loss.

The losses of ranks add up: the gradient of their sum is that of one process. The gathered logits pass gradients to
this rank's own rows only, so the gradients of all ranks add up to the gradient of one auxiliary loss. The value of the
auxiliary loss would be added once per rank; `rescale_aux_loss` removes all but this rank's share of it.

Shapes: B rows, C tokens of this rank, S tokens of the whole row, T real tokens, E experts.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from ring_hf.parallel import all_gather, join

from ..batch_metadata import METADATA_KEY, ContextParallelMetadata

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def aux_loss_coefficient(model: PreTrainedModel) -> float | None:
    """Return the factor of the auxiliary loss in the model's loss, or None if the model has none."""
    for name in COEFFICIENTS:
        if hasattr(model, name):
            return getattr(model, name)
    return None


def check_aux_loss(model: PreTrainedModel) -> str | None:
    """Return an error message for a model whose auxiliary loss cannot be split over ranks, or None."""
    if not getattr(model.config.get_text_config(), "output_router_logits", False):
        return None
    if aux_loss_coefficient(model) is not None:
        return None
    return (
        f"output_router_logits=True adds an auxiliary loss to that of {type(model).__name__}, but the model has no "
        f"{' or '.join(COEFFICIENTS)} by which to split it over ranks. Set model.config.output_router_logits = False."
    )


def check_router_output(model: PreTrainedModel, kwargs: dict[str, Any]) -> str | None:
    """Return an error message for a call whose auxiliary loss the hooks would miss, or None."""
    configured = getattr(model.config.get_text_config(), "output_router_logits", False)
    if kwargs.get("output_router_logits") not in (None, configured):
        return (
            f"output_router_logits={kwargs['output_router_logits']} was passed to the model, but its config has "
            f"{configured}. Set model.config.output_router_logits before training, and do not pass it."
        )
    returns_tuple = kwargs.get("return_dict") is False or getattr(model.config, "return_dict", True) is False
    if not (configured and returns_tuple):
        return None
    return (
        "output_router_logits=True with return_dict=False hides the auxiliary loss in a tuple, so it would be added "
        "once per rank. Leave return_dict at True."
    )


def gather_router_logits(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of the inner model: replace its router logits by those of the whole sequence.

    `output.router_logits` is [B * C, E] per layer before, [T, E] after.
    """
    metadata = kwargs.get(METADATA_KEY)
    router_logits = getattr(output, "router_logits", None)
    if isinstance(metadata, ContextParallelMetadata) and router_logits is not None:
        output.router_logits = tuple(_gather_sequence(logits, metadata) for logits in router_logits)
    return output


def rescale_aux_loss(model: PreTrainedModel, output: Any, metadata: ContextParallelMetadata) -> Any:
    """Return the rank's loss with its share of the auxiliary loss, so that the losses of all ranks add up.

    Args:
        model: the model that computed the output.
        output: of the model; `loss` and `aux_loss` are scalars, or None.
        metadata: of the batch.
    """
    aux_loss = getattr(output, "aux_loss", None)
    if not isinstance(aux_loss, torch.Tensor) or output.loss is None:
        return output.loss
    coefficient, num_ranks = aux_loss_coefficient(model), metadata.sequence.num_ranks
    assert coefficient is not None, "check_aux_loss refuses these models"
    return output.loss - coefficient * (1 - 1 / num_ranks) * aux_loss.detach().to(output.loss.device)


def _gather_sequence(logits: torch.Tensor, metadata: ContextParallelMetadata) -> torch.Tensor:
    """Gather [B * C, E] of this rank to [T, E] of all ranks."""
    num_experts, sequence = logits.shape[-1], metadata.sequence
    gathered: tuple[torch.Tensor, ...] = (logits,)
    if sequence.num_ranks > 1:
        gathered = _AllGather.apply(logits.contiguous(), metadata.group, metadata.rank)
    shards_BCE = [shard.reshape(-1, sequence.shard_length, num_experts) for shard in gathered]
    logits_BSE = join(shards_BCE, [sequence.segments(rank) for rank in range(sequence.num_ranks)], 1)
    if sequence.num_tokens is None:
        return logits_BSE.flatten(0, 1)
    return torch.cat([row[:count] for row, count in zip(logits_BSE, sequence.num_tokens, strict=True)])


class _AllGather(torch.autograd.Function):
    """The tensors of all ranks, in rank order. Backward returns the gradient of this rank's own tensor only."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str, rank: int) -> tuple[torch.Tensor, ...]:
        ctx.rank = rank
        return tuple(all_gather(x, group))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[ctx.rank], None, None
