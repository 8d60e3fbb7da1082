"""Weights that an engine shards: when they are whole, and how computing in blocks gets whole ones.

An engine gathers the weights of a module before its forward and backward pass and frees them afterwards. A module that
computes in blocks needs whole weights from the first block to the last, hands each gradient over once, and must post
the same collectives on every rank, however many blocks or labels a rank has. Two rules do that:

- A feed-forward layer is gathered as one unit. FSDP2 gathers the decoder layer around it; ZeRO-3 gathers every
  submodule at each call unless the layer is marked as a leaf.
- To the engine, the LM head is a layer that returns its input. It is called once per pass, as engines expect; the loss
  then gathers its weights once, calls it past the engine's hooks, and hands the weights' gradients over in the
  backward pass of that call (`GradientHandover`), where the engine has whole weights and reduces gradients.

Nothing here imports an engine: FSDP2 is recognized by `unshard` and DTensor parameters (Zhao et al. 2023, arXiv
2304.11277; `torch.distributed.fsdp.fully_shard`), ZeRO-3 by `ds_id` and `ds_status` (Rajbhandari et al. 2020, arXiv
1910.02054; `deepspeed.runtime.zero`).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_LEAF = "_z3_leaf"  # DeepSpeed's name


def is_zero3(module: nn.Module) -> bool:
    """Return whether ZeRO-3 holds the weights of a module."""
    return any(hasattr(p, "ds_id") for p in module.parameters())


def is_released(parameter: Tensor) -> bool:
    """Return whether this rank holds only its part of a parameter of ZeRO-3 at present."""
    return hasattr(parameter, "ds_status") and parameter.ds_status.name != "AVAILABLE"


def is_dtensor(parameter: Tensor) -> bool:
    """Return whether this rank holds only its part of a parameter (of FSDP2, or of tensor parallelism) at present."""
    return hasattr(parameter, "full_tensor")


def is_managed(module: nn.Module) -> bool:
    """Return whether an engine gathers and frees the weights of a module around its calls."""
    return is_zero3(module) or hasattr(module, "unshard") or getattr(module, "_is_fsdp_managed_module", False)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module; FSDP2 puts a class of its own in front of it."""
    kind = type(module)
    in_front = kind.__bases__[0].__module__.startswith("torch.distributed.fsdp") and len(kind.__bases__) == 2
    return kind.__bases__[1] if in_front else kind


_WAY_OUT = (
    "Use FSDP2 (fsdp_version: 2) with every decoder layer wrapped, call memory.apply before the Trainer is made, or "
    "set ffn_block=None and loss_block=None."
)


def refuse_shards(module: nn.Module) -> None:
    """Check the weights of a module when it is about to compute blocks: a shard would get the gradient of the whole.

    Raises:
        ValueError: if its parameters are shards now.
    """
    # DTensor; released by ZeRO-3; a view of the flat parameter of FSDP version 1.
    if any(is_dtensor(p) or is_released(p) or not isinstance(p, nn.Parameter) for p in module.parameters()):
        raise ValueError(
            f"Parameters of {type(module).__name__} are shards (of FSDP, or of ZeRO-3 that gathers parts of the layer "
            f"one by one) where memory.apply computes in blocks. {_WAY_OUT}"
        )


def refuse_ungathered(model: nn.Module) -> None:
    """Raise ValueError if a model holds DTensors that FSDP2 does not gather, as tensor parallelism makes them."""
    dtensors = [name for name, p in model.named_parameters() if is_dtensor(p)]
    if dtensors and not any(hasattr(module, "unshard") for module in model.modules()):
        raise ValueError(
            f"{dtensors[0]} is a DTensor that no FSDP2 module gathers (as tensor parallelism makes them), where "
            f"memory.apply computes in blocks. {_WAY_OUT}"
        )


def refuse_inner_shards(module: nn.Module) -> None:
    """Raise ValueError if FSDP2 gathers parts of a module, which computes blocks as a whole, one by one."""
    parts = [part for part in module.modules() if part is not module and hasattr(part, "unshard")]
    if parts:
        raise ValueError(
            f"FSDP2 wraps {original_class(parts[0]).__name__} inside of {original_class(module).__name__}, so that it "
            f"gathers that part alone, where memory.apply computes the whole in blocks. {_WAY_OUT}"
        )


def refuse_released_parts(module: nn.Module) -> None:
    """Check a module that ZeRO-3 does not gather as one unit, once the engine is made.

    Raises:
        ValueError: if ZeRO-3 has released weights of its parts, which it gathers one by one.
    """
    if not module.__dict__.get(_LEAF) and list(module.children()) and any(map(is_released, module.parameters())):
        raise ValueError(
            f"{type(module).__name__} is called several times in a pass, so that ZeRO-3 gathers its parts one by one, "
            f"where memory.apply computes the whole in blocks. {_WAY_OUT}"
        )


def gather_as_unit(module: nn.Module) -> None:
    """Have ZeRO-3 gather all weights of a module around its calls, instead of those of each submodule around its."""
    module.__dict__[_LEAF] = True  # deepspeed.utils.set_z3_leaf_modules sets it for all modules of a class


def refuse_composite(head: nn.Module) -> None:
    """Raise ValueError if ZeRO-3 would gather parts of a head at each call, that is, once per block."""
    if is_zero3(head) and list(head.children()):
        raise ValueError(
            f"The LM head is a {type(head).__name__} made of modules (LoRA, or modules_to_save of PEFT), which ZeRO-3 "
            "would gather once per block of the loss, on some ranks more often than on others. Leave the head out of "
            "PEFT, use FSDP2, or set loss_block=None."
        )


def call_past_hooks(module: nn.Module, *args: Any) -> Any:
    """Call a module, without its hooks if an engine set them: they would gather or reduce at each block."""
    return type(module).forward(module, *args) if is_managed(module) else module(*args)


@contextlib.contextmanager
def without_hooks_of_fsdp(model: nn.Module) -> Iterator[None]:
    """Remove the hooks of FSDP2 for the time of the context, so that a pass runs with the weights that are there."""
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                before = hooks.copy()
                for number, hook in before.items():
                    if str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp"):
                        del hooks[number]
                if len(hooks) < len(before):
                    stack.callback(_restore, hooks, before)
        yield


def _restore(hooks: dict[int, Any], before: dict[int, Any]) -> None:
    """Put all hooks back in their order, which is the one they are called in."""
    hooks.clear()
    hooks.update(before)


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Gather the weights of a module on every rank for the time of the context.

    A collective call unless they are whole already.

    Raises:
        ValueError: if they cannot be gathered.
    """
    parameters = list(module.parameters())
    released: list[Any] = [p for p in parameters if is_released(p)]
    unshard: Any = getattr(module, "unshard", None)
    if unshard is not None and any(map(is_dtensor, parameters)):
        unshard()  # FSDP2; until the module's backward pass or its next forward pass
    if released:
        released[0].all_gather(param_list=released)  # as deepspeed.zero.GatheredParameters does
    try:
        refuse_shards(module)
        yield
    finally:
        if released:
            released[0].partition(param_list=released)


class GradientHandover:
    """Takes the gradients of a module's weights to the backward pass of its call.

    The backward pass of the loss, which comes before, fills `gradients`. Call the handover with the input of the
    module `[..., D]` in its forward pass; it returns an alias of that input.
    """

    def __init__(self, module: nn.Module) -> None:
        self.parameters: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
        self.gradients: list[Tensor | None] = [None] * len(self.parameters)

    def __call__(self, x: Tensor) -> Tensor:
        return _Handover.apply(self, x, *self.parameters) if torch.is_grad_enabled() else x


class _Handover(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, handover: GradientHandover, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.handover = handover
        return x.detach()  # no view, of which FSDP2 would warn

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        handover = ctx.handover
        gradients, handover.gradients = handover.gradients, [None] * len(handover.parameters)
        return (None, gradient, *gradients)
