"""The sharded batches that a guard has checked: attention layers accept no other batch.

A guard consists of hooks of a model (`model_guard.py`). A wrapper that calls `model.forward` bypasses them, and a
second model (a teacher, a reference) has none: nothing would compare the batch between ranks, count its targets, or
sum its loss. So the guard announces a batch to the layers of its model, and attention raises an error for a batch that
was not announced. Recomputed layers (activation checkpointing) see the announcement of their forward pass.
"""

import weakref

from torch import nn

from ..batch_metadata import ContextParallelMetadata

_models: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
_model_of: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]]" = weakref.WeakKeyDictionary()
# By model: the batches announced to it that are still in use, by identity (they compare by value).
_batches: "weakref.WeakKeyDictionary[nn.Module, dict[int, weakref.ref]]" = weakref.WeakKeyDictionary()


def register(model: nn.Module) -> None:
    """Register the modules of a guarded model. Idempotent."""
    _models.add(model)
    for module in model.modules():
        _model_of[module] = weakref.ref(model)


def announce(model: nn.Module, batch: ContextParallelMetadata) -> None:
    """Let the layers of a guarded model attend with a batch."""
    batches = _batches.setdefault(model, {})
    for key in [key for key, reference in batches.items() if reference() is None]:
        del batches[key]
    batches[id(batch)] = weakref.ref(batch)


def is_guarded(module: nn.Module) -> bool:
    """Return whether a module belongs to a guarded model."""
    return _find_model(module) is not None


def is_announced(module: nn.Module, batch: ContextParallelMetadata) -> bool:
    """Return whether the guard of the module's model has announced this batch."""
    model = _find_model(module)
    reference = None if model is None else _batches.get(model, {}).get(id(batch))
    return reference is not None and reference() is batch


def _find_model(module: nn.Module) -> nn.Module | None:
    known = _model_of.get(module)
    if known is not None and known() is not None:
        return known()
    for model in _models:  # a module that was added to a model after its guard
        if any(part is module for part in model.modules()):
            _model_of[module] = weakref.ref(model)
            return model
    return None
