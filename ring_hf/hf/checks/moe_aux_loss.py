"""The load-balancing loss of mixture-of-experts models, over whole sequences.

Transformers' models with `output_router_logits=True` add `coefficient * sum_e f_e p_e` to the loss, where f_e is the
share of tokens sent to expert e and p_e its mean router probability (Fedus et al. 2021, "Switch Transformers"). Both
are means over all tokens, and a product of means is not a mean of products: shards must meet before it is taken. So
every rank gathers the router logits of the whole sequence, without padding, before the model computes the loss.

Ranks share the loss by addition: the gradient of the sum of their losses is what one process has. The gathered logits
pass gradients to this rank's own rows only, so the ranks' gradients add up to that of one auxiliary loss. Its value
would be added once per rank; `share` takes back all but one part of it.

Letters: B rows, C tokens of this rank, S of the whole row, T real tokens, E experts.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from ring_hf.parallel import all_gather, join

from ..batch_metadata import METADATA_KEY, ContextParallelMetadata

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def coefficient(model: PreTrainedModel) -> float | None:
    """What the model multiplies its auxiliary loss with; None if it has none."""
    return next((getattr(model, name) for name in COEFFICIENTS if hasattr(model, name)), None)


def router_error(model: PreTrainedModel) -> str | None:
    """The message for a model that adds a loss of the router which is not known to be computed from its logits."""
    if not getattr(model.config.get_text_config(), "output_router_logits", False) or coefficient(model) is not None:
        return None
    return (
        f"output_router_logits=True adds an auxiliary loss to that of {type(model).__name__}, and it is not known how "
        "that is put together from the tokens of several ranks. Set model.config.output_router_logits = False."
    )


def router_output_error(model: PreTrainedModel, kwargs: dict[str, Any]) -> str | None:
    """The message for a call whose auxiliary loss the hooks would not find."""
    wanted = getattr(model.config.get_text_config(), "output_router_logits", False)
    if kwargs.get("output_router_logits") not in (None, wanted):
        return (
            f"output_router_logits={kwargs['output_router_logits']} was passed to the model, but its configuration "
            f"says {wanted}. Set model.config.output_router_logits before training, and do not pass it."
        )
    as_tuple = kwargs.get("return_dict") is False or getattr(model.config, "return_dict", True) is False
    if not (wanted and as_tuple):
        return None
    return (
        "output_router_logits=True with return_dict=False hides the auxiliary loss in a tuple, and it would be added "
        "once per rank. Leave return_dict at True."
    )


def gather_router_logits(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of the inner model: its router logits become those of the whole sequence."""
    batch = kwargs.get(METADATA_KEY)
    logits = getattr(output, "router_logits", None)
    if isinstance(batch, ContextParallelMetadata) and logits is not None:
        output.router_logits = tuple(_whole(layer, batch) for layer in logits)
    return output


def share(model: PreTrainedModel, output: Any, batch: ContextParallelMetadata) -> Any:
    """The rank's loss with its part of the auxiliary loss, so that the losses of all ranks add up."""
    aux_loss = getattr(output, "aux_loss", None)
    if not isinstance(aux_loss, torch.Tensor) or output.loss is None:
        return output.loss
    factor, num_ranks = coefficient(model), batch.sequence.num_ranks
    assert factor is not None, "router_error refuses such models"
    return output.loss - factor * (1 - 1 / num_ranks) * aux_loss.detach().to(output.loss.device)


def _whole(logits: torch.Tensor, batch: ContextParallelMetadata) -> torch.Tensor:
    """[B * C, E] of this rank to [T, E] of all ranks."""
    num_experts, sequence = logits.shape[-1], batch.sequence
    gathered = (logits,) if sequence.num_ranks == 1 else _Gather.apply(logits.contiguous(), batch.group, batch.rank)
    shards_BCE = [shard.reshape(-1, sequence.shard_length, num_experts) for shard in gathered]
    whole_BSE = join(shards_BCE, [sequence.segments(rank) for rank in range(sequence.num_ranks)], 1)
    if sequence.num_tokens is None:
        return whole_BSE.flatten(0, 1)
    return torch.cat([row[:count] for row, count in zip(whole_BSE, sequence.num_tokens, strict=True)])


class _Gather(torch.autograd.Function):
    """The tensors of all ranks, in rank order; a gradient goes to this rank's own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str, rank: int) -> tuple[torch.Tensor, ...]:
        ctx.rank = rank
        return tuple(all_gather(x, group))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[ctx.rank], None, None
