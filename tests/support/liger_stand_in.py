"""Liger without Liger: what `use_liger_kernel=True` does to a Llama, by the signatures of liger-kernel 0.8.5.

`liger()` makes Transformers find the real package if it is installed and Triton interprets (TRITON_INTERPRET=1, and
then only the kernels that it can interpret, `SETTINGS`), and this module's stand-in otherwise.
"""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from types import MethodType, ModuleType
from typing import Any
from unittest import mock

from torch.nn.functional import cross_entropy, pad
from transformers.integrations import liger as integration
from transformers.modeling_outputs import CausalLMOutputWithPast

REAL = importlib.util.find_spec("liger_kernel") is not None and os.environ.get("TRITON_INTERPRET") == "1"
SETTINGS = {"rope": True, "fused_linear_cross_entropy": True, "rms_norm": False, "swiglu": not REAL}


def fused_loss(hidden_BSD: Any, weight: Any, labels: Any, shift_labels: Any, num_items_in_batch: Any) -> Any:
    """As Liger's: shifted labels as they are, a sum over them divided by the number of items."""
    if shift_labels is None:
        shift_labels = pad(labels, (0, 1), value=-100)[..., 1:]
    logits = (hidden_BSD @ weight.t()).float().flatten(0, 1)
    how = "mean" if num_items_in_batch is None else "sum"
    loss = cross_entropy(logits, shift_labels.flatten(), reduction=how)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def deaf_loss(hidden_BSD: Any, weight: Any, labels: Any, shift_labels: Any, num_items_in_batch: Any) -> Any:
    """A fused loss that shifts the labels of the shard itself."""
    return fused_loss(hidden_BSD, weight, labels, None, num_items_in_batch)


def averaging_loss(hidden_BSD: Any, weight: Any, labels: Any, shift_labels: Any, num_items_in_batch: Any) -> Any:
    """A fused loss that is the mean of its shard."""
    return fused_loss(hidden_BSD, weight, labels, shift_labels, None)


def stand_in(loss: Callable[..., Any]) -> Callable[..., None]:
    """`liger_kernel.transformers._apply_liger_kernel_to_instance`."""

    def forward(
        self: Any,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        use_cache: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        cache_position: Any = None,
        logits_to_keep: Any = 0,
        skip_logits: Any = None,
        **kwargs: Any,
    ) -> Any:
        hidden = self.model(input_ids, attention_mask, position_ids, past_key_values, use_cache=use_cache, **kwargs)[0]
        shift_labels, items = kwargs.pop("shift_labels", None), kwargs.get("num_items_in_batch")
        if self.training if skip_logits is None else skip_logits:
            return CausalLMOutputWithPast(loss=loss(hidden, self.lm_head.weight, labels, shift_labels, items))
        logits = self.lm_head(hidden)
        if labels is None:
            return CausalLMOutputWithPast(logits=logits)
        size = self.config.vocab_size
        own_loss = self.loss_function(
            logits=logits, labels=labels, vocab_size=size, shift_labels=shift_labels, **kwargs
        )
        return CausalLMOutputWithPast(loss=own_loss, logits=logits)

    def gated(self: Any, x: Any) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    def apply(model: Any, **kwargs: Any) -> None:
        if kwargs.get("fused_linear_cross_entropy", True):
            model.forward = MethodType(forward, model)
        if kwargs.get("swiglu", True):
            for layer in model.model.layers:
                layer.mlp.forward = MethodType(gated, layer.mlp)

    return apply


@contextlib.contextmanager
def liger(loss: Callable[..., Any] | None = None) -> Iterator[None]:
    """`use_liger_kernel=True` finds Liger, or with a loss of its own, a stand-in that has it."""
    if REAL and loss is None:
        yield
        return
    package, module = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    module._apply_liger_kernel_to_instance = stand_in(loss or fused_loss)  # type: ignore[attr-defined]
    modules = {"liger_kernel": package, "liger_kernel.transformers": module}
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.object(integration, "is_liger_kernel_available", lambda: True),
    ):
        yield
