"""A token-wise function over blocks of tokens: one block's intermediates at a time, forward and backward.

The idea is that of Blockwise Parallel Transformers (Liu and Abbeel 2023, arXiv 2305.19370): a function of single
tokens need not hold the intermediates of all tokens at once. Forward keeps the inputs alone; backward recomputes block
by block. Parameter gradients are summed over blocks here, at least in fp32, and returned once, so that the hooks of
DDP fire once per parameter.

The inputs are saved by a node of their own, *before* the function runs. Under activation checkpointing of the layer
around it, PyTorch stops recomputing at the last tensor that backward asked for: that is then the input of the
feed-forward layer, and not its output. So each block runs twice in a step, and not three times as with nested
checkpoints (or where the layer goes on with an operator that keeps that output, as the last norm of Gemma 2 does).

Letters: T tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]


def in_blocks(
    function: Function, tensors: Sequence[Tensor], parameters: Sequence[Tensor], block: int
) -> tuple[Tensor, ...]:
    """Compute `function(*tensors)` over blocks of their first dim.

    Args:
        function: token-wise: row t of its results depends on row t of its arguments alone; nothing random in it.
        tensors: `[T, ...]` each.
        parameters: its other inputs that get a gradient.
        block: tokens at a time.

    Returns:
        The results of the function, `[T, ...]` each.
    """
    num_tokens = tensors[0].shape[0]
    assert num_tokens > 0 and all(x.shape[0] == num_tokens for x in tensors)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, *parameters))
    if not needs_grad:
        return _forward(function, tensors, block)
    saved_inputs = _SaveInputs.apply(torch.zeros(0, requires_grad=True), *tensors)
    results = _Blocks.apply(function, block, len(tensors), saved_inputs, *tensors, *parameters)
    return results if isinstance(results, tuple) else (results,)


def spans(num_tokens: int, block: int) -> list[tuple[int, int]]:
    """Return the (start, stop) of every block; the last may be shorter."""
    return [(start, min(start + block, num_tokens)) for start in range(0, num_tokens, block)]


def refuse_second_derivatives() -> None:
    """Raise in a backward pass whose gradients are recorded, which happens only with create_graph=True.

    Raises:
        ValueError: if they are.
    """
    if torch.is_grad_enabled():
        raise ValueError(
            "create_graph=True: what memory.apply computes in blocks has no second derivatives. Set ffn_block=None "
            "and loss_block=None."
        )


class Autocast:
    """The automatic mixed precision at the time of its creation, for a later pass.

    Its cache is off: the cache must not mix passes with and without gradients.
    """

    def __init__(self, device: str) -> None:
        self.device, self.enabled = device, torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device)

    def __call__(self) -> Any:
        return torch.autocast(self.device, self.dtype, self.enabled, cache_enabled=False)


class GradientSums:
    """Gradients of parameters summed over blocks, at least in fp32."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._sums: list[Tensor | None] = [None] * len(parameters)

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add the gradients of one block, one for each parameter; None counts as zero."""
        for n, gradient in enumerate(gradients):
            total = self._sums[n]
            if gradient is None:
                continue
            if total is None:
                self._sums[n] = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            else:
                total += gradient

    def totals(self) -> list[Tensor | None]:
        """Return the sums in the dtype of the parameters, and None where no block had a gradient."""
        pairs = zip(self._sums, self._parameters, strict=True)
        return [None if total is None else total.to(p.dtype) for total, p in pairs]


def _forward(function: Function, tensors: Sequence[Tensor], block: int) -> tuple[Tensor, ...]:
    num_tokens = tensors[0].shape[0]
    results: list[Tensor] = []
    for start, stop in spans(num_tokens, block):
        block_results = function(*(x[start:stop] for x in tensors))
        if not results:
            results = [x.new_empty(num_tokens, *x.shape[1:]) for x in block_results]
        for result, block_result in zip(results, block_results, strict=True):
            result[start:stop] = block_result
    return tuple(results)


class _SaveInputs(torch.autograd.Function):
    """Saves tensors; its empty result leads to them."""

    @staticmethod
    def forward(ctx: Any, empty: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Function, block: int, num_tensors: int, saved_inputs: Tensor, *inputs: Tensor
    ) -> Any:
        tensors = inputs[:num_tensors]
        ctx.function, ctx.block, ctx.inputs_node = function, block, saved_inputs.grad_fn
        ctx.parameters, ctx.autocast = inputs[num_tensors:], Autocast(tensors[0].device.type)
        with ctx.autocast():
            results = _forward(function, [x.detach() for x in tensors], block)
        ctx.mark_non_differentiable(*(x for x in results if not x.is_floating_point()))
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        tensors = ctx.inputs_node.saved_tensors
        needs_grad = ctx.needs_input_grad[4:]
        tensors_need_grad, parameters_need_grad = needs_grad[: len(tensors)], needs_grad[len(tensors) :]
        trained = [p for p, need in zip(ctx.parameters, parameters_need_grad, strict=True) if need]
        sums = GradientSums(trained)
        results = [torch.empty_like(x) if need else None for x, need in zip(tensors, tensors_need_grad, strict=True)]
        for start, stop in spans(tensors[0].shape[0], ctx.block):
            pairs = zip(tensors, tensors_need_grad, strict=True)
            leaves = [x[start:stop].detach().requires_grad_(need) for x, need in pairs]
            with torch.enable_grad(), ctx.autocast():
                outs = ctx.function(*leaves)
            outs_and_gradients = [
                (out, gradient[start:stop]) for out, gradient in zip(outs, gradients, strict=True) if out.requires_grad
            ]
            trained_leaves = [leaf for leaf in leaves if leaf.requires_grad]
            block_gradients = iter(gradients_of(outs_and_gradients, [*trained_leaves, *trained]))
            for result in results:
                if result is not None:
                    gradient = next(block_gradients)
                    result[start:stop] = 0 if gradient is None else gradient
            sums.add(list(block_gradients))
        totals = iter(sums.totals())
        parameter_gradients = [next(totals) if need else None for need in parameters_need_grad]
        return (None, None, None, torch.empty(0), *results, *parameter_gradients)


def gradients_of(pairs: list[tuple[Tensor, Tensor]], inputs: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Return the gradients of inputs.

    Args:
        pairs: outputs and their gradients.
        inputs: leaves and parameters.
    """
    outs, gradients = [out for out, _ in pairs], [gradient for _, gradient in pairs]
    return torch.autograd.grad(outs, inputs, gradients, allow_unused=True) if outs else (None,) * len(inputs)
