"""Activation checkpointing of decoder layers: Transformers' own, with our choice of what to save and where.

Transformers checkpoints its layers through `activation_checkpointing_enable`, with options that reach PyTorch: we pass
`context_fn` and add two hooks to the decoder, so no code of a layer is replaced. The layers drop their KV cache in
training then, as with any checkpointing. The hooks refuse a step whose layers did not call our `context_fn`, as
checkpointing was switched on again or off by somebody else.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor

from .offload import CopyBackend, OffloadSession, copy_backend_of
from .options import MemoryConfig
from .selective_checkpoint import CachedMode, CachingMode, SavedResults, keep_on_device


class LayerCheckpointing:
    """Checkpointing of one model. The constructor only checks the model; `switch_on` changes it.

    Args:
        model: a Transformers model.
        config: `attention` is not "none".

    Raises:
        ValueError: if the model cannot be checkpointed, is already, or has attention that is no operator.
    """

    def __init__(self, model: Any, config: MemoryConfig) -> None:
        self.model, self.config = model, config
        self.is_proven = False
        self._session: OffloadSession | None = None
        self._copies: CopyBackend | None = None
        self._results_of_layers: list[SavedResults] | None = None
        self._passes: list[contextlib.ExitStack] = []
        _refuse(model, config.attention == "save")

    def switch_on(self) -> None:
        """Have the model checkpoint its layers in every training pass."""
        model, options = self.model, {"use_reentrant": False, "context_fn": self.contexts}
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(options)
        else:  # Transformers before 5.2x
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.base_model.register_forward_pre_hook(self.before)
        model.base_model.register_forward_hook(self.after, always_call=True)

    def contexts(self) -> tuple[Any, Any]:
        """Return the contexts of a layer's forward pass and of its recomputation."""
        if self._session is not None:
            self._session.next_layer()
        if self._results_of_layers is None:
            return contextlib.nullcontext(), contextlib.nullcontext()
        if self.config.attention == "recompute":
            self._results_of_layers.append(SavedResults(keep_on_device))
            return contextlib.nullcontext(), contextlib.nullcontext()
        if self.config.offload in ("attention", "all"):
            assert self._session is not None
            results = SavedResults(self._session.keep)
        else:
            results = SavedResults(keep_on_device)
        self._results_of_layers.append(results)
        return CachingMode(results), CachedMode(results)

    def before(self, decoder: Any, args: tuple) -> None:
        """Prepare a training pass. A pre-hook of the decoder."""
        stack = contextlib.ExitStack()
        self._passes.append(stack)
        if not (decoder.training and torch.is_grad_enabled()):
            return
        self._results_of_layers = []
        if self.config.offload is not None:
            # The same streams in all steps: device memory belongs to the stream it was first used on.
            self._copies = self._copies or copy_backend_of(next(decoder.parameters()).device)
            self._session = OffloadSession(self._copies)
        if self.config.offload in ("layers", "all"):
            assert self._session is not None
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._session.keep, _unpack))

    def after(self, decoder: Any, args: tuple, output: Any) -> None:
        """End a training pass. A hook of the decoder, also called when the pass failed, then without an output.

        Raises:
            ValueError: if the layers did not ask for our contexts, or if no attention operator ran in the first pass.
        """
        if self._passes:
            self._passes.pop().close()
        results_of_layers, self._results_of_layers, self._session = self._results_of_layers, None, None
        if results_of_layers is None or output is None:
            return
        name = type(self.model).__name__
        if not results_of_layers:
            raise ValueError(
                f"memory.apply switched on attention={self.config.attention!r} for {name}, but its layers did not ask "
                "what to save: checkpointing was switched on again or off since. Set activation_checkpointing "
                "(gradient_checkpointing) of TrainingArguments to False: memory.apply does it."
            )
        if self.config.attention == "save" and not self.is_proven and not any(map(len, results_of_layers)):
            raise ValueError(
                f"attention='save', but no attention operator ran in the {len(results_of_layers)} layers of {name}: "
                "its attention is made of matrix products (as PyTorch's is for values of another head dim than keys, "
                'in one process). Use attn_implementation="ring_zigzag" (or another of ring_hf) with '
                'context_parallel_size > 1, or set attention="recompute".'
            )
        self.is_proven = True


def _unpack(read: Any) -> Tensor:
    return read()


def _refuse(model: Any, is_saving: bool) -> None:
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
    if is_saving and backend in ("eager", "flex_attention"):
        raise ValueError(
            f"attention='save' with attn_implementation={backend!r}: it is no operator whose result could be saved. "
            'Use "ring_zigzag" (or another of ring_hf) or "sdpa", or set attention="recompute".'
        )
