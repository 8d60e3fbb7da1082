"""Logits that are not computed until somebody looks at them.

The LM head returns a `LazyLogits`: hidden states, the head, and what the model then does to the logits with
scalars (soft caps, scales), recorded. The loss takes it apart and works over blocks of tokens; whoever else uses it as
a tensor gets the logits, computed then, with gradients. So nothing of a model's own code is replaced, and logits are
there for those who ask.

Shapes: [..., V] logits of [..., D] hidden states.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from .sharded_weights import GradientHandover, call_past_hooks, gathered, is_managed, refuse_composite

FLAG = "_ring_hf_loss_block"
SAMPLE = "_ring_hf_sample"  # logits of one token, and the handover of gradients, from a managed head to its last hook
LAST_HOOK = "_ring_hf_last_hook"

_TENSOR = torch.Tensor
METADATA = {
    *(getattr(_TENSOR, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "grad_fn")),
    *(
        getattr(_TENSOR, name).__get__
        for name in ("is_leaf", "layout", "is_cuda", "is_sparse", "is_meta", "is_nested")
    ),
    *(_TENSOR.size, _TENSOR.dim, _TENSOR.numel, _TENSOR.is_floating_point, _TENSOR.is_complex, _TENSOR.element_size),
    *(torch.is_floating_point, torch.numel, torch.is_complex, _TENSOR.__len__, _TENSOR.stride, _TENSOR.get_device),
    *(_TENSOR.is_contiguous,),
}
# What is recorded: functions of one element and a scalar (or one number per word).
POINTWISE = {
    *(_TENSOR.mul, _TENSOR.div, _TENSOR.true_divide, _TENSOR.add, _TENSOR.sub, _TENSOR.__mul__, _TENSOR.__truediv__),
    *(_TENSOR.__rmul__, _TENSOR.__add__, _TENSOR.__radd__, _TENSOR.__sub__, torch.mul, torch.div, torch.true_divide),
    *(torch.add, torch.sub, torch.tanh, _TENSOR.tanh, _TENSOR.float, _TENSOR.double, _TENSOR.half, _TENSOR.bfloat16),
    *(_TENSOR.to, _TENSOR.type, _TENSOR.clone, torch.clone, _TENSOR.contiguous),
}


class LazyLogits(torch.Tensor):
    """Logits `steps(head(hidden))`.

    Attributes:
        sample: the logits of one token, which have the shape and dtype of all.
        block: how many tokens the loss takes at a time.
        handover: where the loss leaves the gradients of the head's weights, if an engine shards them.
        on_compute: what those get who ask for the logits.
    """

    hidden: Tensor
    head: torch.nn.Module
    sample: Tensor
    steps: tuple[Callable[[Tensor], Tensor], ...]
    block: int | str
    handover: GradientHandover | None
    grad_wanted: bool
    on_compute: Callable[[Tensor], Tensor] | None

    @staticmethod
    def __new__(
        cls,
        hidden: Tensor,
        head: torch.nn.Module,
        sample: Tensor,
        steps: tuple,
        block: int | str,
        handover: GradientHandover | None = None,
    ) -> "LazyLogits":
        shape = (*hidden.shape[:-1], sample.shape[-1])
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=sample.dtype, device=sample.device)
        self.hidden, self.head, self.sample, self.steps, self.block = hidden, head, sample, steps, block
        self.handover, self.grad_wanted, self.on_compute = handover, torch.is_grad_enabled(), None
        return self

    def __init__(self, *args: Any) -> None:
        super().__init__()

    def compute(self) -> Tensor:
        """Return the logits of all tokens. A collective call where an engine shards the head."""
        with gathered(self.head), torch.set_grad_enabled(torch.is_grad_enabled() and self.grad_wanted):
            logits = _compute(self.head, self.steps, self.hidden)
        return logits if self.on_compute is None else self.on_compute(logits)

    def without_gradient(self) -> "LazyLogits":
        """Return the same logits, still deferred, detached: engines pass what a model returns through functions."""
        with torch.no_grad():
            return LazyLogits(self.hidden.detach(), self.head, self.sample, self.steps, self.block)

    def of(self, hidden: Tensor) -> Tensor:
        """The logits of other hidden states."""
        return _compute(self.head, self.steps, hidden)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"DeferredLogits({tuple(self.shape)}, {len(self.steps)} steps)"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handles = [x for x in args if isinstance(x, LazyLogits)]
        if func in POINTWISE and len(handles) == 1 and _scalars(args, kwargs, handles[0]):
            handle = handles[0]
            place = next(n for n, x in enumerate(args) if x is handle)
            before, after = args[:place], args[place + 1 :]  # not the handle, which would be kept alive
            step = lambda logits: func(*before, logits, *after, **kwargs)
            with torch.no_grad():
                sample = step(handle.sample)
            steps = (*handle.steps, step)
            result = LazyLogits(handle.hidden, handle.head, sample, steps, handle.block, handle.handover)
            result.on_compute = handle.on_compute
            return result
        if func is _TENSOR.detach:
            return handles[0].without_gradient()
        name = getattr(func, "__name__", "")
        if handles and args and args[0] is handles[0] and _in_place(name):
            raise ValueError(
                f"{name} would change logits in place that are not computed yet (loss_block). Use the form that "
                "returns a new tensor, or set loss_block=None."
            )
        computed = torch.utils._pytree.tree_map_only(LazyLogits, LazyLogits.compute, (args, kwargs))
        return func(*computed[0], **computed[1])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore
        """Where Python does not see the call: only without gradients, which would be lost here."""

        def compute(handle: LazyLogits) -> Tensor:
            if handle.grad_wanted and handle.hidden.requires_grad and func is not torch.ops.aten.detach.default:
                raise ValueError(
                    f"{func} was called on logits that are not computed yet (loss_block), past where gradients are "
                    "recorded. Call it on logits + 0, or set loss_block=None."
                )
            return handle.compute().detach()

        args, kwargs = torch.utils._pytree.tree_map_only(LazyLogits, compute, (args, kwargs or {}))
        return func(*args, **kwargs)


def _compute(head: torch.nn.Module, steps: tuple, hidden: Tensor) -> Tensor:
    # Past the override of its forward; with its hooks, unless they are an engine's.
    block, head.__dict__[FLAG] = head.__dict__.get(FLAG), None
    try:
        logits = call_past_hooks(head, hidden)
    finally:
        head.__dict__[FLAG] = block
    for step in steps:
        logits = step(logits)
    return logits


def _scalars(args: tuple, kwargs: dict, handle: LazyLogits) -> bool:
    """Whether everything but the handle is a number, a dtype, or a constant per word."""

    def fine(x: Any) -> bool:
        if not isinstance(x, torch.Tensor):
            return x is None or isinstance(x, (int, float, bool, torch.dtype, torch.device, torch.memory_format))
        return not x.requires_grad and (x.numel() == 1 or tuple(x.shape) == (handle.shape[-1],))

    return all(x is handle or fine(x) for x in (*args, *kwargs.values()))


def _in_place(name: str) -> bool:
    dunder = name.startswith("__") and name.endswith("__")
    return (
        name == "__setitem__"
        or (dunder and name.startswith("__i") and name != "__invert__")
        or (not dunder and name.endswith("_"))
    )


def _forward(self: torch.nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    block = self.__dict__.get(FLAG)
    own = type(self).forward
    managed = is_managed(self)  # then every rank defers, whatever the length of its rows: it costs collectives
    few = block if isinstance(block, int) else 1
    if block is None or args or kwargs or (not managed and hidden.shape[:-1].numel() <= few):
        return own(self, hidden, *args, **kwargs)
    with torch.no_grad():
        sample = _compute(self, (), hidden.detach().reshape(-1, hidden.shape[-1])[:1])
    if not managed:
        return LazyLogits(hidden, self, sample, (), block)
    handover = GradientHandover(self)
    self.__dict__[SAMPLE] = sample, handover
    return handover(hidden)


def _defer(self: torch.nn.Module, args: tuple, output: Any) -> Any:
    """The last forward hook of a managed head: to the engine, whose hooks came before, it returned its input."""
    sample, handover = self.__dict__.pop(SAMPLE, (None, None))
    return None if sample is None else LazyLogits(output, self, sample, (), self.__dict__[FLAG], handover)


def enable(head: torch.nn.Module, block: int | str | None) -> None:
    """Have an LM head return `LazyLogits` from now on.

    Args:
        block: tokens that the loss takes at a time, or "auto".

    Raises:
        ValueError: if the head is one whose parts ZeRO-3 would gather at each block.
    """
    disable(head)
    head.__dict__[FLAG] = block
    if is_managed(head):
        refuse_composite(head)
        head.__dict__[LAST_HOOK] = head.register_forward_hook(_defer)


def disable(head: torch.nn.Module) -> None:
    """Have an LM head return its logits again. Its forward stays replaced, for the next `enable`."""
    if "forward" not in head.__dict__:
        head.forward = MethodType(_forward, head)
    head.__dict__[FLAG] = None
    if LAST_HOOK in head.__dict__:
        head.__dict__.pop(LAST_HOOK).remove()


def remove(head: torch.nn.Module) -> None:
    """Undo `enable` and leave no trace of it on the head."""
    disable(head)
    del head.forward, head.__dict__[FLAG]
