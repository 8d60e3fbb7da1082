"""A token-wise function over blocks of tokens: one block's intermediates at a time, forward and backward.

The idea is that of Blockwise Parallel Transformers (Liu and Abbeel 2023, arXiv 2305.19370): what treats each token by
itself need not hold all tokens' intermediates at once. Forward keeps the inputs alone; backward recomputes block by
block. Parameter gradients are summed over blocks here, at least in fp32, and returned once, so that the hooks of DDP
fire once per parameter.

The inputs are saved by a node of their own, *before* the function runs. Under activation checkpointing of the layer
around it, PyTorch stops recomputing at the last tensor that backward asked for: that is then the input of the
feed-forward layer, and not its output. So each block runs twice in a step, and not three times as with nested
checkpoints (or where the layer goes on with something that keeps that output, as the last norm of Gemma 2 does).

Letters: T tokens, n blocks.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]


def in_blocks(
    function: Function, tensors: Sequence[Tensor], parameters: Sequence[Tensor], block: int
) -> tuple[Tensor, ...]:
    """`function(*tensors)`, computed over blocks of their first dim.

    Args:
        function: token-wise: row t of its results depends on row t of its arguments alone; nothing random in it.
        tensors: `[T, ...]` each.
        parameters: what else of its inputs gets a gradient.
        block: tokens at a time.
    """
    num_tokens = tensors[0].shape[0]
    assert num_tokens > 0 and all(x.shape[0] == num_tokens for x in tensors)
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, *parameters))
    if not grad:
        return _forward(function, tensors, block)
    keeper = _Keep.apply(torch.zeros(0, requires_grad=True), *tensors)
    results = _Blocks.apply(function, block, len(tensors), keeper, *tensors, *parameters)
    return results if isinstance(results, tuple) else (results,)


def spans(num_tokens: int, block: int) -> list[tuple[int, int]]:
    return [(start, min(start + block, num_tokens)) for start in range(0, num_tokens, block)]


def refuse_second_derivatives() -> None:
    """In a backward pass, gradients are recorded only with create_graph=True."""
    if torch.is_grad_enabled():
        raise ValueError(
            "create_graph=True: what memory.apply computes in blocks has no second derivatives. Set ffn_block=None "
            "and loss_block=None."
        )


class Autocast:
    """The automatic mixed precision of now, for later; without its cache, which must not mix passes with and without
    gradients."""

    def __init__(self, device: str) -> None:
        self.device, self.enabled = device, torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device)

    def __call__(self) -> Any:
        return torch.autocast(self.device, self.dtype, self.enabled, cache_enabled=False)


class Sums:
    """Gradients of parameters summed over blocks, at least in fp32."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._sums: list[Tensor | None] = [None] * len(parameters)

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        for n, gradient in enumerate(gradients):
            total = self._sums[n]
            if gradient is None:
                continue
            if total is None:
                self._sums[n] = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            else:
                total += gradient

    def take(self) -> list[Tensor | None]:
        """In the dtype of the parameters; None where no block had any."""
        found = zip(self._sums, self._parameters, strict=True)
        return [None if total is None else total.to(p.dtype) for total, p in found]


def _forward(function: Function, tensors: Sequence[Tensor], block: int) -> tuple[Tensor, ...]:
    num_tokens = tensors[0].shape[0]
    results: list[Tensor] = []
    for start, stop in spans(num_tokens, block):
        parts = function(*(x[start:stop] for x in tensors))
        if not results:
            results = [part.new_empty(num_tokens, *part.shape[1:]) for part in parts]
        for result, part in zip(results, parts, strict=True):
            result[start:stop] = part
    return tuple(results)


class _Keep(torch.autograd.Function):
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
    def forward(ctx: Any, function: Function, block: int, count: int, keeper: Tensor, *tensors: Tensor) -> Any:
        ctx.function, ctx.block, ctx.keeper = function, block, keeper.grad_fn
        ctx.parameters, ctx.autocast = tensors[count:], Autocast(tensors[0].device.type)
        with ctx.autocast():
            results = _forward(function, [x.detach() for x in tensors[:count]], block)
        ctx.mark_non_differentiable(*(x for x in results if not x.is_floating_point()))
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        tensors, needed = ctx.keeper.saved_tensors, ctx.needs_input_grad[4:]
        trained = [p for p, need in zip(ctx.parameters, needed[len(tensors) :], strict=True) if need]
        sums = Sums(trained)
        results = [torch.empty_like(x) if need else None for x, need in zip(tensors, needed, strict=False)]
        for start, stop in spans(tensors[0].shape[0], ctx.block):
            leaves = [x[start:stop].detach().requires_grad_(need) for x, need in zip(tensors, needed, strict=False)]
            with torch.enable_grad(), ctx.autocast():
                outs = ctx.function(*leaves)
            pairs = [(out, g[start:stop]) for out, g in zip(outs, gradients, strict=True) if out.requires_grad]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            found = iter(gradients_of(pairs, [*wanted, *trained]))
            for result in results:
                if result is not None:
                    part = next(found)
                    result[start:stop] = 0 if part is None else part
            sums.add(list(found))
        taken = iter(sums.take())
        of_parameters = [next(taken) if need else None for need in needed[len(tensors) :]]
        return (None, None, None, torch.empty(0), *results, *of_parameters)


def gradients_of(pairs: list[tuple[Tensor, Tensor]], inputs: list[Tensor]) -> tuple[Tensor | None, ...]:
    outs, gradients = [out for out, _ in pairs], [gradient for _, gradient in pairs]
    return torch.autograd.grad(outs, inputs, gradients, allow_unused=True) if outs else (None,) * len(inputs)
