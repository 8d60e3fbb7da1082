"""Restore everything that a trial step changes: random number generators, buffers, modes and counters."""

import contextlib
import copy
import random
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import nn

MAX_BUFFER_ELEMENTS = 2**24  # copied; the buffers of a model with more elements are not restored
SCALAR_TYPES = (bool, int, float, str, type(None))


@contextlib.contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """Run a model that Accelerate prepared for mixed precision in the dtype of its weights."""
    prepared = [module for module in model.modules() if "_original_forward" in vars(module)]
    device_type = next(model.parameters()).device.type
    forwards = [vars(module)["forward"] for module in prepared]
    for module in prepared:
        module.forward = vars(module)["_original_forward"]
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for module, forward in zip(prepared, forwards, strict=True):
            module.forward = forward


@contextlib.contextmanager
def preserve_state(model: nn.Module, trainer: Any = None) -> Iterator[None]:
    """Context in which a model may run and a Trainer may count, after which their state is as before.

    Mixed precision, TF32, and reentrant activation checkpointing (which does not support `torch.autograd.grad`) are
    off inside.
    """
    outermost = model if trainer is None else trainer.model
    checkpointed = [module for module in model.modules() if _is_reentrant(module)]
    modes = {module: module.training for module in model.modules()}
    buffers = [buffer for buffer in model.buffers() if buffer.numel()]
    if sum(buffer.numel() for buffer in buffers) > MAX_BUFFER_ELEMENTS:
        buffers = []
    saved_buffers = [buffer.clone() for buffer in buffers]
    attributes = {} if trainer is None else {k: _copy(v) for k, v in vars(trainer).items() if _is_plain(v)}
    for module in checkpointed:
        setattr(module, "gradient_checkpointing", False)  # noqa: B010 (nn.Module types its attributes as modules)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # compare in fp32, not TF32
    try:
        with torch.random.fork_rng(devices=devices), _without_autocast(outermost):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        for module in checkpointed:
            setattr(module, "gradient_checkpointing", True)  # noqa: B010
        for module, mode in modes.items():
            module.training = mode
        for buffer, saved in zip(buffers, saved_buffers, strict=True):
            with torch.no_grad():
                buffer.copy_(saved)
        for key, value in attributes.items():
            _restore(trainer, key, value)


def _is_reentrant(module: nn.Module) -> bool:
    if getattr(module, "gradient_checkpointing", False) is not True:
        return False
    function = getattr(module, "_gradient_checkpointing_func", None)
    return getattr(function, "keywords", {}).get("use_reentrant", True) is not False


def _is_plain(value: Any) -> bool:
    """Return whether a value is a number, a text, or a container of those, as counters and logs are."""
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple | set | deque):
        return all(map(_is_plain, value))
    return isinstance(value, SCALAR_TYPES)


def _copy(value: Any) -> Any:
    return value if isinstance(value, SCALAR_TYPES) else copy.deepcopy(value)


def _restore(owner: Any, key: str, value: Any) -> None:
    """Restore an attribute. A container is changed in place, since other objects may refer to it."""
    current = vars(owner).get(key)
    if isinstance(current, dict) and type(current) is type(value):
        current.clear()
        current.update(value)
    elif isinstance(current, list | deque) and type(current) is type(value):
        current.clear()
        current.extend(value)
    else:
        setattr(owner, key, value)
