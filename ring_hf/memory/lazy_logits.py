"""Logits that are not computed until an operator needs them.

The LM head returns a `LazyLogits`: the hidden states, the head, and the recorded operators that the model then applies
to its logits with scalars (soft caps, scales). The loss takes it apart and works over blocks of tokens; any other use
as a tensor computes the logits then, with gradients. So no code of a model is replaced, and its logits can still be
read.

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
# These are recorded: functions of one element and a scalar (or one number per word).
POINTWISE = {
    *(_TENSOR.mul, _TENSOR.div, _TENSOR.true_divide, _TENSOR.add, _TENSOR.sub, _TENSOR.__mul__, _TENSOR.__truediv__),
    *(_TENSOR.__rmul__, _TENSOR.__add__, _TENSOR.__radd__, _TENSOR.__sub__, torch.mul, torch.div, torch.true_divide),
    *(torch.add, torch.sub, torch.tanh, _TENSOR.tanh, _TENSOR.float, _TENSOR.double, _TENSOR.half, _TENSOR.bfloat16),
    *(_TENSOR.to, _TENSOR.type, _TENSOR.clone, torch.clone, _TENSOR.contiguous),
}


class LazyLogits(torch.Tensor):
    """Logits `pointwise_ops(head(hidden))`, of shape [..., V].

    Attributes:
        hidden: hidden states [..., D].
        head: the LM head.
        sample: the logits [1, V] of one token, which have the dtype of all.
        pointwise_ops: functions that are applied to the logits, in order.
        block: tokens that the loss takes at a time, or "auto".
        handover: where the loss leaves the gradients of the head's weights, if an engine shards them.
        is_grad_wanted: whether gradients were recorded when the head was called.
        on_compute: applied to the logits when they are computed for another use than the loss.
    """

    hidden: Tensor
    head: torch.nn.Module
    sample: Tensor
    pointwise_ops: tuple[Callable[[Tensor], Tensor], ...]
    block: int | str
    handover: GradientHandover | None
    is_grad_wanted: bool
    on_compute: Callable[[Tensor], Tensor] | None

    @staticmethod
    def __new__(
        cls,
        hidden: Tensor,
        head: torch.nn.Module,
        sample: Tensor,
        pointwise_ops: tuple,
        block: int | str,
        handover: GradientHandover | None = None,
    ) -> "LazyLogits":
        shape = (*hidden.shape[:-1], sample.shape[-1])
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=sample.dtype, device=sample.device)
        self.hidden, self.head, self.sample = hidden, head, sample
        self.pointwise_ops, self.block, self.handover = pointwise_ops, block, handover
        self.is_grad_wanted = torch.is_grad_enabled()
        self.on_compute = None
        return self

    def __init__(self, *args: Any) -> None:
        super().__init__()

    def compute(self) -> Tensor:
        """Return the logits of all tokens. A collective call where an engine shards the head."""
        with gathered(self.head), torch.set_grad_enabled(torch.is_grad_enabled() and self.is_grad_wanted):
            logits = _compute(self.head, self.pointwise_ops, self.hidden)
        return logits if self.on_compute is None else self.on_compute(logits)

    def without_gradient(self) -> "LazyLogits":
        """Return the same logits, detached and not computed: engines pass a model's outputs through functions."""
        with torch.no_grad():
            return LazyLogits(self.hidden.detach(), self.head, self.sample, self.pointwise_ops, self.block)

    def logits_of(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., V] of other hidden states [..., D]."""
        return _compute(self.head, self.pointwise_ops, hidden)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"LazyLogits({tuple(self.shape)}, {len(self.pointwise_ops)} pointwise operators)"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        lazy_args = [x for x in args if isinstance(x, LazyLogits)]
        if func in POINTWISE and len(lazy_args) == 1 and _others_are_scalars(args, kwargs, lazy_args[0]):
            return _record(func, args, kwargs, lazy_args[0])
        if func is _TENSOR.detach:
            return lazy_args[0].without_gradient()
        name = getattr(func, "__name__", "")
        if lazy_args and args and args[0] is lazy_args[0] and _is_in_place(name):
            raise ValueError(
                f"{name} would change logits in place that are not computed yet (loss_block). Use the form that "
                "returns a new tensor, or set loss_block=None."
            )
        computed = torch.utils._pytree.tree_map_only(LazyLogits, LazyLogits.compute, (args, kwargs))
        return func(*computed[0], **computed[1])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore
        """Compute the logits for a call that Python does not see: only without gradients, which would be lost here."""

        def compute(logits: LazyLogits) -> Tensor:
            if logits.is_grad_wanted and logits.hidden.requires_grad and func is not torch.ops.aten.detach.default:
                raise ValueError(
                    f"{func} was called on logits that are not computed yet (loss_block), past where gradients are "
                    "recorded. Call it on logits + 0, or set loss_block=None."
                )
            return logits.compute().detach()

        args, kwargs = torch.utils._pytree.tree_map_only(LazyLogits, compute, (args, kwargs or {}))
        return func(*args, **kwargs)


def _record(func: Any, args: tuple, kwargs: dict, logits: LazyLogits) -> LazyLogits:
    """Return logits that `func` is applied to as well, once they are computed."""
    index = next(n for n, x in enumerate(args) if x is logits)
    before, after = args[:index], args[index + 1 :]  # not the logits, which would be kept alive

    def operator(x: Tensor) -> Tensor:
        return func(*before, x, *after, **kwargs)

    with torch.no_grad():
        sample = operator(logits.sample)
    pointwise_ops = (*logits.pointwise_ops, operator)
    result = LazyLogits(logits.hidden, logits.head, sample, pointwise_ops, logits.block, logits.handover)
    result.on_compute = logits.on_compute
    return result


def _compute(head: torch.nn.Module, pointwise_ops: tuple, hidden: Tensor) -> Tensor:
    # Past the override of its forward; with its hooks, unless they are an engine's.
    block = head.__dict__.get(FLAG)
    head.__dict__[FLAG] = None
    try:
        logits = call_past_hooks(head, hidden)
    finally:
        head.__dict__[FLAG] = block
    for operator in pointwise_ops:
        logits = operator(logits)
    return logits


def _others_are_scalars(args: tuple, kwargs: dict, logits: LazyLogits) -> bool:
    """Return whether every argument but the logits is a number, a dtype, or a constant per word."""

    def is_scalar(x: Any) -> bool:
        if not isinstance(x, torch.Tensor):
            return x is None or isinstance(x, (int, float, bool, torch.dtype, torch.device, torch.memory_format))
        return not x.requires_grad and (x.numel() == 1 or tuple(x.shape) == (logits.shape[-1],))

    return all(x is logits or is_scalar(x) for x in (*args, *kwargs.values()))


def _is_in_place(name: str) -> bool:
    is_dunder = name.startswith("__") and name.endswith("__")
    return (
        name == "__setitem__"
        or (is_dunder and name.startswith("__i") and name != "__invert__")
        or (not is_dunder and name.endswith("_"))
    )


def _forward(self: torch.nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    block = self.__dict__.get(FLAG)
    own_forward = type(self).forward
    managed = is_managed(self)  # then every rank defers, whatever the length of its rows: it costs collectives
    fits_a_block = hidden.shape[:-1].numel() <= (block if isinstance(block, int) else 1)
    if block is None or args or kwargs or (not managed and fits_a_block):
        return own_forward(self, hidden, *args, **kwargs)
    with torch.no_grad():
        sample = _compute(self, (), hidden.detach().reshape(-1, hidden.shape[-1])[:1])
    if not managed:
        return LazyLogits(hidden, self, sample, (), block)
    handover = GradientHandover(self)
    self.__dict__[SAMPLE] = sample, handover
    return handover(hidden)


def _defer(self: torch.nn.Module, args: tuple, output: Any) -> Any:
    """Return the logits of a managed head, which to the engine, whose hooks came before, has returned its input.

    The last forward hook of the head.
    """
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
