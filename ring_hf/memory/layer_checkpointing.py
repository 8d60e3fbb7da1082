"""What decoder layers keep: Transformers' own activation checkpointing, told what to save and where.

Transformers checkpoints its layers through `activation_checkpointing_enable`, with options that reach PyTorch: the
levers are one of them, `context_fn`, and two hooks on the decoder, so no code of a layer is replaced. The layers drop
their KV cache in training then, as with any checkpointing. The hooks see to it that the levers stay on: a step whose
layers did not ask for them is refused.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor

from .offload import CopyBackend, OffloadSession, copy_backend_of
from .options import MemoryConfig
from .selective_checkpoint import CachedMode, CachingMode, SavedResults, resident


class LayerCheckpointing:
    """Checkpointing of one model. Made, it has only looked."""

    def __init__(self, model: Any, config: MemoryConfig) -> None:
        self.model, self.config = model, config
        self.proven = False
        self._trip: OffloadSession | None = None
        self._road: CopyBackend | None = None
        self._shelves: list[SavedResults] | None = None
        self._stack: list[contextlib.ExitStack] = []
        _refuse(model, config.attention == "save")

    def switch_on(self) -> None:
        model, options = self.model, {"use_reentrant": False, "context_fn": self.contexts}
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(options)
        else:  # Transformers before 5.2x
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.base_model.register_forward_pre_hook(self.before)
        model.base_model.register_forward_hook(self.after, always_call=True)

    def contexts(self) -> tuple[Any, Any]:
        """Around a layer's forward pass, and around its recomputation."""
        if self._trip is not None:
            self._trip.next_layer()
        if self._shelves is None or self.config.attention == "recompute":
            if self._shelves is not None:
                self._shelves.append(SavedResults(resident))
            return contextlib.nullcontext(), contextlib.nullcontext()
        away = self._trip is not None and self.config.offload in ("attention", "all")
        assert self._trip is not None or not away
        shelf = SavedResults(self._trip.keep if away and self._trip is not None else resident)
        self._shelves.append(shelf)
        return CachingMode(shelf), CachedMode(shelf)

    def before(self, decoder: Any, args: tuple) -> None:
        """A training pass begins."""
        stack = contextlib.ExitStack()
        self._stack.append(stack)
        if not (decoder.training and torch.is_grad_enabled()):
            return
        self._shelves = []
        if self.config.offload is not None:
            # One road for all steps: device memory belongs to the stream it was first used on.
            self._road = self._road or copy_backend_of(next(decoder.parameters()).device)
            self._trip = OffloadSession(self._road)
        if self.config.offload in ("layers", "all"):
            assert self._trip is not None
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._trip.keep, _unpack))

    def after(self, decoder: Any, args: tuple, output: Any) -> None:
        """It ends; the first one must have used the levers. (Also called when the pass failed, without an output.)"""
        if self._stack:
            self._stack.pop().close()
        shelves, self._shelves, self._trip = self._shelves, None, None
        if shelves is None or output is None:
            return
        name = type(self.model).__name__
        if not shelves:
            raise ValueError(
                f"memory.apply switched on attention={self.config.attention!r} for {name}, but its layers did not ask "
                "what to save: checkpointing was switched on anew or off since. Set activation_checkpointing "
                "(gradient_checkpointing) of TrainingArguments to False: memory.apply does it."
            )
        if self.config.attention == "save" and not self.proven and not any(map(len, shelves)):
            raise ValueError(
                f"attention='save', but no attention operator ran in the {len(shelves)} layers of {name}: its "
                "attention is made of matrix products (as PyTorch's is for values of another head dim than keys, in "
                'one process). Use attn_implementation="ring_zigzag" (or another of ring_hf) with '
                'context_parallel_size > 1, or set attention="recompute".'
            )
        self.proven = True


def _unpack(back: Any) -> Tensor:
    return back()


def _refuse(model: Any, saving: bool) -> None:
    name = type(model).__name__
    if not getattr(model, "supports_gradient_checkpointing", False) or not any(
        hasattr(module, "gradient_checkpointing") for module in model.modules()
    ):
        raise ValueError(
            f"{name} has no decoder layers that can be checkpointed (supports_gradient_checkpointing=False). Set "
            'attention="none".'
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            f"{name} has activation checkpointing (gradient_checkpointing) on already, which would recompute what "
            'memory.apply saves. Switch it off before, or set attention="none".'
        )
    backend = getattr(model.config, "_attn_implementation", None)
    if saving and backend in ("eager", "flex_attention"):
        raise ValueError(
            f"attention='save' with attn_implementation={backend!r}: it is no operator whose result could be saved. "
            'Use "ring_zigzag" (or another of ring_hf) or "sdpa", or set attention="recompute".'
        )
