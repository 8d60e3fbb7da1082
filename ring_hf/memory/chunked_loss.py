"""Cross entropy over blocks of tokens, from hidden states: the logits of a block at a time, and never kept.

Gradients are computed where the logits are, in the forward pass, and scaled when the backward pass arrives, as in
Liger's fused linear cross entropy and in PyTorch's `linear_cross_entropy` (whose memory is the same, and which takes a
plain weight: no soft cap, no scale, no LoRA). That is three products with the head's weight where recomputing would
take four; it holds the gradient of the hidden states instead of the hidden states, and the gradient of the weight from
the forward pass on. A frozen head costs nothing more.

The sum is over logits in at least fp32. Transformers goes down to fp32 for models in fp64; this does not.

Letters: B rows, S tokens, T = B * S, D hidden size, V words.
"""

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from .chunked import Autocast, Sums, gradients_of, refuse_second_derivatives, spans
from .lazy_logits import LazyLogits
from .sharded_weights import GradientHandover, gathered

SMALLEST = 256  # tokens of an automatic block
Loss = Callable[..., Tensor]
_stock: "weakref.WeakKeyDictionary[Loss, Loss]" = weakref.WeakKeyDictionary()


def stock_of(function: Loss) -> Loss:
    """The loss that one in blocks stands for; any other is its own."""
    return _stock.get(function, function)


def blockwise(stock: Loss, called: Callable[[], None] = lambda: None) -> Loss:
    """The loss function of a model, which takes deferred logits too; stock for all others."""

    @functools.wraps(stock)
    def loss_function(
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        called()
        if loss_weights is None and not isinstance(logits, LazyLogits):
            more = {"ignore_index": ignore_index, "shift_labels": shift_labels, **kwargs}
            return stock(logits, labels, vocab_size, num_items_in_batch, **more)
        if shift_labels is None:  # token t predicts token t + 1
            shift_labels = pad(labels, (0, 1), value=ignore_index)[..., 1:]
            loss_weights = None if loss_weights is None else pad(loss_weights, (0, 1))[..., 1:]
        return _mean(logits, shift_labels, loss_weights, num_items_in_batch, ignore_index)

    _stock[loss_function] = stock
    return loss_function


def automatic_block(num_tokens: int, hidden_size: int, num_words: int) -> int:
    """Tokens whose logits are as many numbers as the hidden states of all tokens (Liger's rule), a power of two."""
    block = max(num_tokens * hidden_size // num_words, 1)
    return max(SMALLEST, 1 << (block - 1).bit_length())


def _mean(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    num_items_in_batch: Tensor | int | None,
    ignore_index: int,
) -> Tensor:
    labels_T = labels.reshape(-1).to(logits.device)
    weights_T = None if weights is None else weights.reshape(-1).to(logits.device)
    for name, given_T in (("labels", labels_T), ("loss_weights", weights_T)):
        if given_T is not None and len(given_T) != logits.shape[:-1].numel():
            raise ValueError(
                f"{logits.shape[:-1].numel()} tokens have logits, but {len(given_T)} have {name}: they would be taken "
                "for those of other tokens. Pass as many, and leave logits_to_keep out where a loss is asked for."
            )
    if isinstance(logits, LazyLogits):
        total = _in_blocks(logits, labels_T, weights_T, ignore_index)
    else:  # fewer tokens than a block
        total = _sum(logits.flatten(0, -2), labels_T, weights_T, ignore_index)
    if num_items_in_batch is not None:
        return total / (
            num_items_in_batch.to(total.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch
        )
    counted = labels_T != ignore_index
    return total / (counted.sum() if weights_T is None else (weights_T * counted).sum())


def _sum(logits: Tensor, labels_T: Tensor, weights_T: Tensor | None, ignore_index: int) -> Tensor:
    """Over all tokens, from their logits `[T, V]`, in at least fp32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    how = "sum" if weights_T is None else "none"
    loss = cross_entropy(logits, labels_T, ignore_index=ignore_index, reduction=how)
    return loss if weights_T is None else (loss * weights_T).sum()


def _in_blocks(logits: LazyLogits, labels_T: Tensor, weights_T: Tensor | None, ignore_index: int) -> Tensor:
    hidden_TD, block = logits.hidden.flatten(0, -2), logits.block
    if block == "auto":
        block = automatic_block(hidden_TD.shape[0], hidden_TD.shape[1], logits.shape[-1])
    assert isinstance(block, int)
    with gathered(logits.head):
        trained = [p for p in logits.head.parameters() if p.requires_grad]
        return summed_loss(logits.of, hidden_TD, labels_T, weights_T, trained, block, ignore_index, logits.handover)


def summed_loss(
    logits_of: Callable[[Tensor], Tensor],
    hidden_TD: Tensor,
    labels_T: Tensor,
    weights_T: Tensor | None,
    parameters: Sequence[Tensor],
    block: int,
    ignore_index: int = -100,
    handover: GradientHandover | None = None,
) -> Tensor:
    """Sum of `weight * cross entropy` over the tokens whose label is not ignored.

    Args:
        logits_of: the logits `[1, b, V]` of hidden states `[1, b, D]`.
        parameters: what gets a gradient besides the hidden states.
        handover: who takes their gradients to the engine that shards them. Default: this function's backward pass
            returns them.
    """
    if not torch.is_grad_enabled():  # a Function is told what needs gradients in general, and not now
        hidden_TD, parameters, handover = hidden_TD.detach(), (), None
    returned = parameters if handover is None else ()
    return _SummedLoss.apply(logits_of, labels_T, weights_T, block, ignore_index, handover, hidden_TD, *returned)


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_of: Callable[[Tensor], Tensor],
        labels_T: Tensor,
        weights_T: Tensor | None,
        block: int,
        ignore_index: int,
        handover: GradientHandover | None,
        hidden_TD: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[6:]
        trained: Sequence[Tensor] = [p for p, need in zip(parameters, wanted[1:], strict=True) if need]
        if handover is not None:
            trained, wanted = handover.parameters, (*wanted, *(True for _ in handover.parameters))
        sums = Sums(trained)
        dhidden_TD = torch.zeros_like(hidden_TD) if wanted[0] else None
        total = hidden_TD.new_zeros((), dtype=torch.promote_types(hidden_TD.dtype, torch.float32))
        autocast, places = Autocast(hidden_TD.device.type), spans(hidden_TD.shape[0], block)
        counted = torch.stack([(labels_T[start:stop] != ignore_index).any() for start, stop in places]).tolist()
        for (start, stop), any_label in zip(places, counted, strict=True):
            if not any_label:
                continue
            leaf = hidden_TD[start:stop].detach().requires_grad_(wanted[0])
            with torch.set_grad_enabled(any(wanted)), autocast():
                weights_b = None if weights_T is None else weights_T[start:stop]
                loss = _sum(logits_of(leaf[None])[0], labels_T[start:stop], weights_b, ignore_index)
            total += loss.detach()
            if any(wanted):
                gradients = iter(
                    gradients_of([(loss, torch.ones_like(loss))], [*([leaf] if wanted[0] else []), *trained])
                )
                if dhidden_TD is not None:
                    gradient = next(gradients)
                    assert gradient is not None, "the head does not look at the hidden states"
                    dhidden_TD[start:stop] = gradient
                sums.add(list(gradients))
        # Zeros where no block had a label: DDP waits for every gradient.
        taken = iter(torch.zeros_like(p) if x is None else x for p, x in zip(trained, sums.take(), strict=True))
        ctx.save_for_backward(dhidden_TD, *(next(taken) if need else None for need in wanted[1:]))
        ctx.used, ctx.handover = False, handover
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        if ctx.used:
            raise ValueError(
                "The gradients of a loss in blocks were used already: a step with loss_block (memory.apply) has one "
                "backward pass. Do not use retain_graph=True, or set loss_block=None."
            )
        ctx.used = True
        # In place: they are as large as the hidden states and the weight, and nobody else has them. Expanded, the
        # factor stays in fp32; a scalar would be rounded to bf16 first, off by up to 0.4 % and everywhere the same.
        dhidden_TD, *of_parameters = (None if x is None else x.mul_(gradient.expand_as(x)) for x in ctx.saved_tensors)
        if ctx.handover is not None:
            ctx.handover.gradients, of_parameters = of_parameters, []
        return (None,) * 6 + (dhidden_TD, *of_parameters)
