"""How a trial step computes gradients: one function for each way of holding weights.

If every rank holds whole weights, `torch.autograd.grad` changes no state. FSDP2 sets `parameter.grad` in hooks of the
backward pass: reduced over all ranks, and only for this rank's shard. There the trial runs `backward()`, reads the
gradients and removes them again. ZeRO-3 has a hook that reduces the gradients of modules gathered as one unit. The
hook does not support `torch.autograd.grad` and is disabled during the trial.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# (loss, parameters) -> the gradient of each parameter, or None for a parameter without one.
ComputeGradients = Callable[[Tensor, Sequence[nn.Parameter]], list[Tensor | None]]


@dataclass(frozen=True)
class GradientMethod:
    """One way to compute gradients.

    Attributes:
        prepare: returns a context for the forward and backward passes of a model's trial step, which yields a
            `ComputeGradients`.
        are_reduced: whether gradients of DTensors are this rank's shards of means over all ranks already.
    """

    prepare: Callable[[nn.Module], contextlib.AbstractContextManager[ComputeGradients]]
    are_reduced: bool = False


def _compute_by_autograd(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, parameters, allow_unused=True))


@contextlib.contextmanager
def _prepare_autograd(model: nn.Module) -> Iterator[ComputeGradients]:
    yield _compute_by_autograd


@contextlib.contextmanager
def _prepare_fsdp2(model: nn.Module) -> Iterator[ComputeGradients]:
    shards = list(model.parameters())  # between forward and backward pass, some parameters are whole
    previous_gradients = [shard.grad for shard in shards]

    def set_gradients(gradients: Sequence[Tensor | None]) -> None:
        for shard, gradient in zip(shards, gradients, strict=True):
            shard.grad = gradient

    def compute(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
        set_gradients([None] * len(shards))
        with _gradient_sync(model), _without_gradient_hooks(shards):
            loss.backward()
        gradients = [None if shard.grad is None else to_local(shard.grad).clone() for shard in parameters]
        set_gradients([None] * len(shards))
        return gradients

    try:
        yield compute
    finally:
        set_gradients(previous_gradients)


@contextlib.contextmanager
def _without_gradient_hooks(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Disable post-accumulate hooks of parameters: in some micro-batches, Transformers uses them to average gradients
    of parameters that FSDP2 does not hold (an adapter on a model that was sharded while it was loaded)."""
    with contextlib.ExitStack() as stack:
        for parameter in parameters:
            hooks = parameter._post_accumulate_grad_hooks
            if hooks:
                stack.callback(hooks.update, dict(hooks))
                hooks.clear()
        yield


@contextlib.contextmanager
def _prepare_zero3(model: nn.Module) -> Iterator[ComputeGradients]:
    removed = [
        (module._backward_hooks, key, hook)
        for module in model.modules()
        for key, hook in module._backward_hooks.items()
        if getattr(hook, "__module__", "") == "deepspeed.runtime.zero.stage3"
    ]
    for hooks, key, _ in removed:
        del hooks[key]
    try:
        yield _compute_by_autograd
    finally:
        for hooks, key, hook in removed:
            hooks[key] = hook


@contextlib.contextmanager
def _gradient_sync(model: nn.Module) -> Iterator[None]:
    """Have FSDP2 reduce gradients, also in a micro-batch for which Accelerate has switched that off."""
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "set_requires_gradient_sync")]
    previous = [_is_reducing(module) for module in modules]
    for module in modules:
        module.set_requires_gradient_sync(True, recurse=False)
    try:
        yield
    finally:
        for module, was_reducing in zip(modules, previous, strict=True):
            module.set_requires_gradient_sync(was_reducing, recurse=False)


def _is_reducing(module: Any) -> bool:
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    return all(group.reduce_grads for group in groups if group is not None)


def to_local(x: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor (in the shape of the shard), or any other tensor itself."""
    return x.to_local() if hasattr(x, "to_local") else x


def compute_dtype(model: Any) -> torch.dtype:
    """Return the dtype in which a model computes without autocast: that of its weights, or FSDP2's `param_dtype`."""
    policies = (part._get_fsdp_state()._mp_policy for part in model.modules() if hasattr(part, "_get_fsdp_state"))
    return next((policy.param_dtype for policy in policies if policy.param_dtype is not None), model.dtype)


AUTOGRAD_GRADIENTS = GradientMethod(_prepare_autograd)
ZERO3_GRADIENTS = GradientMethod(_prepare_zero3)
FSDP2_GRADIENTS = GradientMethod(_prepare_fsdp2, are_reduced=True)
