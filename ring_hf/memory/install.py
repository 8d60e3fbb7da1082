"""`apply(model, config)`: find what each lever works on, prove it on the model itself, switch it on, say so."""

import functools
import logging
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import chunked_mlp, token_wise
from .chunked_loss import blockwise
from .layer_checkpointing import LayerCheckpointing
from .lazy_logits import LazyLogits, arm
from .options import MemoryConfig

logger = logging.getLogger("ring_hf")

COMPILED = (
    "The model is compiled (torch.compile), which would trace past the levers of memory.apply. Leave torch.compile "
    "(torch_compile of TrainingArguments) out."
)
_applied: "weakref.WeakKeyDictionary[nn.Module, Applied]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Applied:
    """What was done to a model."""

    config: MemoryConfig
    feed_forward: dict[str, int]  # module name: tokens of a block
    head: str | None

    def __str__(self) -> str:
        blocks = sorted(set(self.feed_forward.values()))
        parts = [f"attention {self.config.attention}", f"offload {self.config.offload}"]
        if blocks:
            sizes = f"{blocks[0]} to {blocks[-1]}" if len(blocks) > 1 else f"{blocks[0]}"
            parts.append(f"{len(self.feed_forward)} feed-forward parts in blocks of {sizes} tokens")
        if self.head:
            parts.append(f"loss of {self.head} in blocks ({self.config.loss_block} tokens)")
        return "memory: " + ", ".join(parts)


def apply(model: Any, config: MemoryConfig | None = None, **settings: Any) -> Applied:
    """Pull the levers on a Transformers model, in place, before the Trainer (or a training loop) gets it.

    Args:
        model: a causal language model, also as PEFT wrapped it.
        config: which levers; or its fields as keyword arguments.

    Returns:
        What was done, for the log. The same call again changes nothing.

    Raises:
        ValueError: for what cannot be done to this model, before anything is changed.
    """
    if config is not None and settings:
        raise ValueError(f"config={config} and {', '.join(settings)} were both given. Give one of them.")
    config = MemoryConfig(**settings) if config is None else config
    inner = base_model(model)
    before = _applied.get(inner)
    if before is not None:
        if before.config == config:
            return before
        raise ValueError(
            f"memory.apply was called with {before.config} before, and now with {config}. Build the model anew to "
            "change it."
        )
    if (config.attention, config.ffn_block, config.loss_block) == ("none", None, None):
        return Applied(config, {}, None)
    _refuse_model(inner)
    # Everything is found and proven first; then nothing can fail halfway.
    with token_wise.stand_in_weights(inner):
        layers = None if config.attention == "none" else LayerCheckpointing(inner, config)
        found = _feed_forward(inner) if config.ffn_block is not None else []
        head = _head(inner) if config.loss_block is not None else None
        block = config.ffn_block
        blocks = {seen.name: block if isinstance(block, int) else chunked_mlp.automatic_block(seen) for seen in found}
    for seen in found:
        chunked_mlp.wrap(seen, blocks[seen.name])
        seen.module.register_forward_pre_hook(chunked_mlp.refuse_changed)
    if head is not None:
        _switch_loss(inner, config)
    if layers is not None:
        layers.switch_on()
    inner.register_forward_pre_hook(_refuse_compiled)
    applied = Applied(config, blocks, None if head is None else type(head).__name__)
    _applied[inner] = applied
    logger.info("%s", applied)
    return applied


def applied_to(model: Any) -> Applied | None:
    """What `apply` did to this model, if anything."""
    return _applied.get(base_model(model))


def base_model(model: Any) -> Any:
    """The Transformers model inside wrappers: PEFT (`get_base_model`), DDP and the like (`module`)."""
    while not hasattr(model, "get_output_embeddings") or hasattr(model, "get_base_model"):
        inner = model.get_base_model() if hasattr(model, "get_base_model") else getattr(model, "module", None)
        if inner is None:
            raise ValueError(f"{type(model).__name__} holds no Transformers model, which memory.apply needs.")
        model = inner
    return model


def _refuse_model(model: Any) -> None:
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(COMPILED)
    if any(p.is_meta for p in model.parameters()):
        raise ValueError(
            "Parameters of the model are on the meta device, so nothing can be tried on it. Load its weights before "
            "memory.apply."
        )
    replaced = [(name, module) for name, module in model.named_modules() if "forward" in vars(module)]
    if replaced:
        name, module = replaced[0]
        raise ValueError(
            f"The forward of {len(replaced)} modules was replaced ({name or type(model).__name__}, for example), "
            f"{_cause_of(module)}"
        )


def _replaced_by(module: nn.Module) -> str:
    """Return the name of the Python module whose function stands in for the forward of an instance."""
    forward = vars(module).get("forward")
    while isinstance(forward, functools.partial):
        forward = forward.func
    # Of the function itself: `functools.wraps` gives it the name of what it replaces.
    return getattr(getattr(forward, "__func__", forward), "__globals__", {}).get("__name__", "")


def _has_trl_head(module: nn.Module) -> bool:
    return _replaced_by(module).split(".")[0] == "trl"


def _cause_of(module: nn.Module) -> str:
    """Say who replaced a forward, and what to do about it."""
    if _has_trl_head(module):
        return (
            "by TRL: its trainers give a model a fused LM head, which takes the loss tile by tile itself. Call "
            "memory.apply before the trainer is made, with loss_block=None."
        )
    if hasattr(module, "_hf_hook"):
        return "as Accelerate does for device_map. Call memory.apply on a model that is loaded without device_map."
    source = _replaced_by(module)
    source = f"a function of {source}" if source else "something that is not a Python function"
    return f"by {source}. Call memory.apply first, on the model as it is loaded."


def _refuse_compiled(model: Any, args: tuple) -> None:
    if torch.compiler.is_compiling():
        raise ValueError(COMPILED)


def _feed_forward(model: Any) -> list[token_wise.RecordedCall]:
    found, error = chunked_mlp.find(model)
    if error is not None:
        raise ValueError(error)
    return found


def _head(model: Any) -> nn.Module:
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings, so there is no head. Set loss_block=None.")
    loss = model.loss_function
    if getattr(loss, "__name__", None) != "ForCausalLMLoss" or hasattr(loss, "__wrapped__"):
        raise ValueError(
            f"{type(model).__name__} computes {getattr(loss, '__name__', loss)!r} and not the causal language "
            "modelling loss, which alone is taken in blocks. Set loss_block=None."
        )
    _prove_loss(model)
    return head


def _prove_loss(model: Any) -> None:
    """Does the model hand the result of its head to its loss function, and is the loss the same?"""
    tokens, stock, calls = token_wise.tokens(model), model.loss_function, []

    def counting(logits: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(isinstance(logits, LazyLogits))
        return blockwise(stock)(logits, *args, **kwargs)

    own = vars(model).get("_loss_function")
    with token_wise.undisturbed(model):
        wanted = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        head = model.get_output_embeddings()
        try:
            model.loss_function = counting
            arm(head, 5)
            found = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        finally:
            disarm(head)
            if own is None:
                del model._loss_function
            else:
                model.loss_function = own
    apart = abs(float(found) - float(wanted))
    bar = token_wise.TOLERANCE.get(model.get_input_embeddings().weight.dtype, 1e-2)
    if calls != [True] or not apart <= bar * abs(float(wanted)):
        raise ValueError(
            f"{type(model).__name__} changes the logits between its head and its loss in a way that cannot be done "
            f"block by block (deferred: {calls}, loss {float(found):.6g} instead of {float(wanted):.6g}). Set "
            "loss_block=None."
        )


def disarm(head: nn.Module) -> None:
    """Undo `arm`."""
    arm(head, None)
    vars(head).pop("forward", None)
    vars(head).pop("_ring_hf_loss_block", None)


def _switch_loss(model: Any, config: MemoryConfig) -> None:
    armed: list[nn.Module] = []
    asked = False

    def called() -> None:
        nonlocal asked
        asked = True

    model.loss_function = blockwise(model.loss_function, called)

    def before(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal asked
        asked = False
        head = module.get_output_embeddings()  # anew: PEFT may have wrapped it since
        if kwargs.get("labels") is not None:
            arm(head, config.loss_block)
            armed.append(head)
        elif kwargs.get("loss_weights") is not None:
            raise ValueError(
                "The batch has loss_weights but its labels were taken out before the forward pass (as "
                "label_smoothing_factor and compute_loss_func do): a loss outside the model would overlook them. Let "
                "the model compute the loss, or remove the column."
            )

    def after(module: Any, args: tuple, output: Any) -> None:
        wanted = bool(armed)
        while armed:
            arm(armed.pop(), None)
        if wanted and not asked and output is not None:
            if _has_trl_head(module):
                raise ValueError(
                    f"TRL gave {type(module).__name__} a fused LM head, which takes the loss tile by tile itself and "
                    "never asks the model's loss function, so that loss_block would be ignored. Set loss_block=None."
                )
            raise ValueError(
                f"The forward pass of {type(module).__name__} was replaced since memory.apply, and does not call the "
                "model's loss function, so that loss_block would be ignored. Leave the replacement (such as "
                "use_liger_kernel) out, or set loss_block=None."
            )

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after, always_call=True)
