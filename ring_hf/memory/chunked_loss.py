"""Cross entropy over blocks of tokens, from hidden states: the logits of one block at a time, and never kept.

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

from .chunked import Autocast, GradientSums, gradients_of, refuse_second_derivatives, spans
from .lazy_logits import LazyLogits
from .sharded_weights import GradientHandover, gathered

SMALLEST = 256  # tokens of an automatic block
Loss = Callable[..., Tensor]
# Called with the loss of each token, its label (shifted) and its weight (None: 1), all `[T]`, without gradients.
LossObserver = Callable[[Tensor, Tensor, Tensor | None], None]
_stock: "weakref.WeakKeyDictionary[Loss, Loss]" = weakref.WeakKeyDictionary()


def stock_of(function: Loss) -> Loss:
    """Return the loss function that `blockwise` was given; of any other function, the function itself."""
    return _stock.get(function, function)


def blockwise(stock: Loss, on_call: Callable[[], None] = lambda: None, observers: Sequence[LossObserver] = ()) -> Loss:
    """Return a loss function that takes `LazyLogits` in blocks, and any other logits as `stock` does.

    Args:
        stock: the loss function of a model, called as `stock(logits, labels, vocab_size, ...)`.
        on_call: called first, at every call.
        observers: called with the losses of tokens in every pass that records gradients. The logits are not computed
            again for them.
    """

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
        on_call()
        observed = observers if torch.is_grad_enabled() else ()
        if loss_weights is None and not isinstance(logits, LazyLogits) and not observed:
            options = {"ignore_index": ignore_index, "shift_labels": shift_labels, **kwargs}
            return stock(logits, labels, vocab_size, num_items_in_batch, **options)
        if shift_labels is None:  # token t predicts token t + 1
            shift_labels = pad(labels, (0, 1), value=ignore_index)[..., 1:]
            loss_weights = None if loss_weights is None else pad(loss_weights, (0, 1))[..., 1:]
        return _mean(logits, shift_labels, loss_weights, num_items_in_batch, ignore_index, observed)

    _stock[loss_function] = stock
    return loss_function


def automatic_block(num_tokens: int, hidden_size: int, num_words: int) -> int:
    """Return the tokens whose logits are as many numbers as all hidden states (Liger's rule), as a power of two."""
    block = max(num_tokens * hidden_size // num_words, 1)
    return max(SMALLEST, 1 << (block - 1).bit_length())


def _mean(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    num_items_in_batch: Tensor | int | None,
    ignore_index: int,
    observers: Sequence[LossObserver],
) -> Tensor:
    labels_T = labels.reshape(-1).to(logits.device)
    weights_T = None if weights is None else weights.reshape(-1).to(logits.device)
    num_tokens = logits.shape[:-1].numel()
    for name, values_T in (("labels", labels_T), ("loss_weights", weights_T)):
        if values_T is not None and len(values_T) != num_tokens:
            raise ValueError(
                f"{num_tokens} tokens have logits, but {len(values_T)} have {name}: they would be taken "
                "for those of other tokens. Pass as many, and leave logits_to_keep out where a loss is asked for."
            )
    at_least_fp32 = torch.promote_types(logits.dtype, torch.float32)
    losses_T = labels_T.new_zeros(num_tokens, dtype=at_least_fp32) if observers else None
    if isinstance(logits, LazyLogits):
        total = _in_blocks(logits, labels_T, weights_T, ignore_index, losses_T)
    else:  # fewer tokens than a block
        total = _sum(logits.flatten(0, -2), labels_T, weights_T, ignore_index, losses_T)
    for observe in observers:
        assert losses_T is not None
        observe(losses_T, labels_T, weights_T)
    if num_items_in_batch is not None:
        return total / (
            num_items_in_batch.to(total.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch
        )
    is_counted = labels_T != ignore_index
    return total / (is_counted.sum() if weights_T is None else (weights_T * is_counted).sum())


def _sum(
    logits: Tensor, labels_T: Tensor, weights_T: Tensor | None, ignore_index: int, losses_T: Tensor | None = None
) -> Tensor:
    """Sum the loss over all tokens, from their logits `[T, V]`, in at least fp32; write that of each to `losses_T`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    reduction = "sum" if weights_T is None and losses_T is None else "none"
    loss = cross_entropy(logits, labels_T, ignore_index=ignore_index, reduction=reduction)
    if losses_T is not None:
        losses_T.copy_(loss.detach())
    return loss.sum() if weights_T is None else (loss * weights_T).sum()


def _in_blocks(
    logits: LazyLogits, labels_T: Tensor, weights_T: Tensor | None, ignore_index: int, losses_T: Tensor | None
) -> Tensor:
    hidden_TD, block = logits.hidden.flatten(0, -2), logits.block
    if block == "auto":
        block = automatic_block(hidden_TD.shape[0], hidden_TD.shape[1], logits.shape[-1])
    assert isinstance(block, int)
    with gathered(logits.head):
        trained = [p for p in logits.head.parameters() if p.requires_grad]
        return summed_loss(
            logits.logits_of, hidden_TD, labels_T, weights_T, trained, block, ignore_index, logits.handover, losses_T
        )


def summed_loss(
    logits_of: Callable[[Tensor], Tensor],
    hidden_TD: Tensor,
    labels_T: Tensor,
    weights_T: Tensor | None,
    parameters: Sequence[Tensor],
    block: int,
    ignore_index: int = -100,
    handover: GradientHandover | None = None,
    losses_T: Tensor | None = None,
) -> Tensor:
    """Sum `weight * cross entropy` over the tokens whose label is not ignored.

    Args:
        logits_of: returns the logits `[1, b, V]` of hidden states `[1, b, D]`.
        hidden_TD: hidden states.
        labels_T: int64 numbers of words, already shifted.
        weights_T: a weight for each token. Default: 1.
        parameters: tensors that get a gradient besides the hidden states.
        block: tokens at a time.
        ignore_index: label of tokens without a loss.
        handover: takes the gradients of parameters to the engine that shards them. Default: this function's backward
            pass returns them.
        losses_T: the loss of each token is written here.

    Returns:
        A scalar in at least fp32, in nats.
    """
    if not torch.is_grad_enabled():  # needs_input_grad says what needs gradients in general, and not now
        hidden_TD, parameters, handover = hidden_TD.detach(), (), None
    returned = parameters if handover is None else ()
    options = (block, ignore_index, handover, losses_T)
    return _SummedLoss.apply(logits_of, labels_T, weights_T, *options, hidden_TD, *returned)


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
        losses_T: Tensor | None,
        hidden_TD: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        needs_grad = ctx.needs_input_grad[7:]
        trained: Sequence[Tensor] = [p for p, need in zip(parameters, needs_grad[1:], strict=True) if need]
        if handover is not None:
            trained, needs_grad = handover.parameters, (*needs_grad, *(True for _ in handover.parameters))
        sums = GradientSums(trained)
        dhidden_TD = torch.zeros_like(hidden_TD) if needs_grad[0] else None
        total = hidden_TD.new_zeros((), dtype=torch.promote_types(hidden_TD.dtype, torch.float32))
        autocast = Autocast(hidden_TD.device.type)
        blocks = spans(hidden_TD.shape[0], block)
        has_labels = torch.stack([(labels_T[start:stop] != ignore_index).any() for start, stop in blocks]).tolist()
        for (start, stop), has_label in zip(blocks, has_labels, strict=True):
            if not has_label:
                continue
            leaf = hidden_TD[start:stop].detach().requires_grad_(needs_grad[0])
            with torch.set_grad_enabled(any(needs_grad)), autocast():
                weights_b = None if weights_T is None else weights_T[start:stop]
                losses_b = None if losses_T is None else losses_T[start:stop]
                loss = _sum(logits_of(leaf[None])[0], labels_T[start:stop], weights_b, ignore_index, losses_b)
            total += loss.detach()
            if any(needs_grad):
                leaves = [leaf] if needs_grad[0] else []
                gradients = iter(gradients_of([(loss, torch.ones_like(loss))], [*leaves, *trained]))
                if dhidden_TD is not None:
                    gradient = next(gradients)
                    assert gradient is not None, "the head does not read the hidden states"
                    dhidden_TD[start:stop] = gradient
                sums.add(list(gradients))
        # Zeros where no block had a label: DDP waits for every gradient.
        pairs = zip(trained, sums.totals(), strict=True)
        totals = iter(torch.zeros_like(p) if gradient is None else gradient for p, gradient in pairs)
        ctx.save_for_backward(dhidden_TD, *(next(totals) if need else None for need in needs_grad[1:]))
        ctx.is_used, ctx.handover = False, handover
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        if ctx.is_used:
            raise ValueError(
                "The gradients of a loss in blocks were used already: a step with loss_block (memory.apply) has one "
                "backward pass. Do not use retain_graph=True, or set loss_block=None."
            )
        ctx.is_used = True
        # In place: they are as large as the hidden states and the weight, and nobody else has them. Expanded, the
        # factor stays in fp32; a scalar would be rounded to bf16 first, off by up to 0.4 % and everywhere the same.
        dhidden_TD, *parameter_gradients = (
            None if x is None else x.mul_(gradient.expand_as(x)) for x in ctx.saved_tensors
        )
        if ctx.handover is not None:
            ctx.handover.gradients, parameter_gradients = parameter_gradients, []
        return (None,) * 7 + (dhidden_TD, *parameter_gradients)
