"""Leave no trace of a trial step: random numbers, buffers and counters are afterwards what they were before."""

import contextlib
import copy
import random
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import nn

MAX_BUFFERS = 2**24  # elements that are kept aside
PLAIN = (bool, int, float, str, type(None))


@contextlib.contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """Within, a model that Accelerate prepared for mixed precision computes in the dtype of its weights."""
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
def preserved(model: nn.Module, owner: Any = None) -> Iterator[None]:
    """Within, a model may be run and its `owner` (a Trainer) may count; mixed precision and reentrant activation
    checkpointing, which knows no `torch.autograd.grad`, are off.
    """
    outermost = model if owner is None else owner.model
    checkpointed = [module for module in model.modules() if _is_reentrant(module)]
    modes = {module: module.training for module in model.modules()}
    buffers = [buffer for buffer in model.buffers() if buffer.numel()]
    kept = [buffer.clone() for buffer in buffers] if sum(b.numel() for b in buffers) <= MAX_BUFFERS else None
    plain = {} if owner is None else {key: value for key, value in vars(owner).items() if _is_plain(value)}
    attributes = {key: _copied(value) for key, value in plain.items()}
    for module in checkpointed:
        setattr(module, "gradient_checkpointing", False)  # noqa: B010 (nn.Module types its attributes as modules)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    python, numpys = random.getstate(), numpy.random.get_state()
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # fp32 is what is compared, not TF32
    try:
        with torch.random.fork_rng(devices=devices), _without_autocast(outermost):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        random.setstate(python)
        numpy.random.set_state(numpys)
        for module in checkpointed:
            setattr(module, "gradient_checkpointing", True)  # noqa: B010
        for module, mode in modes.items():
            module.training = mode
        for buffer, value in zip(buffers, kept or (), strict=kept is not None):
            with torch.no_grad():
                buffer.copy_(value)
        for key, value in attributes.items():
            _restore(owner, key, value)


def _is_reentrant(module: nn.Module) -> bool:
    if getattr(module, "gradient_checkpointing", False) is not True:
        return False
    function = getattr(module, "_gradient_checkpointing_func", None)
    return getattr(function, "keywords", {}).get("use_reentrant", True) is not False


def _is_plain(value: Any) -> bool:
    """Whether a value is a number, a text, or a container of those: what is counted and logged is kept in them."""
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple | set | deque):
        return all(map(_is_plain, value))
    return isinstance(value, PLAIN)


def _copied(value: Any) -> Any:
    return value if isinstance(value, PLAIN) else copy.deepcopy(value)


def _restore(owner: Any, key: str, value: Any) -> None:
    """Put a value back, into the container that others may hold."""
    now = vars(owner).get(key)
    if isinstance(now, dict) and type(now) is type(value):
        now.clear()
        now.update(value)
    elif isinstance(now, list | deque) and type(now) is type(value):
        now.clear()
        now.extend(value)
    else:
        setattr(owner, key, value)
