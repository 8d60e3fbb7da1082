"""How a trial step takes gradients: a function for each way of holding weights.

Where every rank has whole weights, `torch.autograd.grad` leaves no trace. FSDP2 gives a parameter its gradient in
hooks of the backward pass: reduced over all ranks, and of this rank's shard of the parameter. So there the backward
pass is run, and its gradients are taken away again. ZeRO-3 reduces gradients of modules that it gathers as one unit
in a hook of theirs, which does not know `torch.autograd.grad` and is off meanwhile.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# (loss, parameters) -> the gradient of each, or None where it gets none.
Take = Callable[[Tensor, Sequence[nn.Parameter]], list[Tensor | None]]


@dataclass(frozen=True)
class GradientMethod:
    """One way to take gradients.

    Attributes:
        opened: for a model, a context around the forward and backward passes of a trial step, which gives `Take`.
        are_reduced: whether gradients of DTensors are means over all ranks already, and of this rank's shard.
    """

    opened: Callable[[nn.Module], contextlib.AbstractContextManager[Take]]
    are_reduced: bool = False


def _take_by_autograd(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, parameters, allow_unused=True))


@contextlib.contextmanager
def _by_autograd(model: nn.Module) -> Iterator[Take]:
    yield _take_by_autograd


@contextlib.contextmanager
def _from_fsdp(model: nn.Module) -> Iterator[Take]:
    shards = list(model.parameters())  # between forward and backward pass, some are whole
    before = [shard.grad for shard in shards]

    def set_gradients(gradients: Sequence[Tensor | None]) -> None:
        for shard, gradient in zip(shards, gradients, strict=True):
            shard.grad = gradient

    def take(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
        set_gradients([None] * len(shards))
        with _reducing(model), _without_hooks_of_gradients(shards):
            loss.backward()
        taken = [None if shard.grad is None else local(shard.grad).clone() for shard in parameters]
        set_gradients([None] * len(shards))
        return taken

    try:
        yield take
    finally:
        set_gradients(before)


@contextlib.contextmanager
def _without_hooks_of_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within, nobody is called when a parameter has its gradient: Transformers averages there what FSDP2 does not hold
    (an adapter on a model that was sharded while it was loaded), in some micro-batches."""
    with contextlib.ExitStack() as stack:
        for parameter in parameters:
            hooks = parameter._post_accumulate_grad_hooks
            if hooks:
                stack.callback(hooks.update, dict(hooks))
                hooks.clear()
        yield


@contextlib.contextmanager
def _from_zero3(model: nn.Module) -> Iterator[Take]:
    removed = [
        (module._backward_hooks, key, hook)
        for module in model.modules()
        for key, hook in module._backward_hooks.items()
        if getattr(hook, "__module__", "") == "deepspeed.runtime.zero.stage3"
    ]
    for hooks, key, _ in removed:
        del hooks[key]
    try:
        yield _take_by_autograd
    finally:
        for hooks, key, hook in removed:
            hooks[key] = hook


@contextlib.contextmanager
def _reducing(model: nn.Module) -> Iterator[None]:
    """Within, FSDP2 reduces gradients, also in a micro-batch for which Accelerate has switched that off."""
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "set_requires_gradient_sync")]
    were_reducing = [_is_reducing(module) for module in modules]
    for module in modules:
        module.set_requires_gradient_sync(True, recurse=False)
    try:
        yield
    finally:
        for module, was_reducing in zip(modules, were_reducing, strict=True):
            module.set_requires_gradient_sync(was_reducing, recurse=False)


def _is_reducing(module: Any) -> bool:
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    return all(group.reduce_grads for group in groups if group is not None)


def local(x: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor; any other tensor is its own."""
    return x.to_local() if hasattr(x, "to_local") else x


def compute_dtype(model: Any) -> torch.dtype:
    """Return the dtype in which a model computes without autocast: of its weights, or what FSDP2 casts them to."""
    policies = (part._get_fsdp_state()._mp_policy for part in model.modules() if hasattr(part, "_get_fsdp_state"))
    return next((policy.param_dtype for policy in policies if policy.param_dtype is not None), model.dtype)


BY_AUTOGRAD = GradientMethod(_by_autograd)
FROM_ZERO3 = GradientMethod(_from_zero3)
FROM_FSDP = GradientMethod(_from_fsdp, are_reduced=True)
