"""`apply(model, config)`: find the modules that each option changes, check them, switch the options on, log it."""

import dataclasses
import functools
import logging
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import chunked_mlp, token_wise
from .chunked_loss import LossObserver, blockwise
from .layer_checkpointing import LayerCheckpointing
from .lazy_logits import LazyLogits, disable, enable, remove
from .mlp_classes import declare
from .mlp_lookup import find_mlps, inner_classes_of, recorded_classes, spec_from_call, why_not_mlp
from .options import MemoryConfig
from .sharded_weights import (
    original_class,
    refuse_composite,
    refuse_inner_shards,
    refuse_released_parts,
    refuse_ungathered,
)

logger = logging.getLogger("ring_hf")

COMPILED = (
    "The model is compiled (torch.compile), which would trace past the options of memory.apply. Leave torch.compile "
    "(torch_compile of TrainingArguments) out."
)
_applied: "weakref.WeakKeyDictionary[nn.Module, Applied]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Applied:
    """What `apply` changed of a model.

    Attributes:
        config: the options.
        feed_forward: tokens of a block, by the name of each feed-forward module.
        head: class of the LM head whose loss is taken in blocks.
        observers: functions to call with the losses of tokens in every training pass (`chunked_loss.LossObserver`); to
            be added to where the loss is taken in blocks.
    """

    config: MemoryConfig
    feed_forward: dict[str, int]
    head: str | None
    observers: list[LossObserver] = field(default_factory=list, compare=False, repr=False)

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
    """Switch memory options on for a Transformers model, in place, before the Trainer (or a training loop) gets it.

    Feed-forward modules are looked up by class (`mlp_lookup.py`). A pass of a few tokens is needed for
    `ffn_block="auto"` (the size of activations), two for `loss_block` (whether the loss is the same), and one for
    feed-forward modules whose insides were replaced, as PEFT and bitsandbytes do.

    Args:
        model: a causal language model, also as PEFT wrapped it.
        config: the options; or give its fields as keyword arguments.

    Returns:
        What was changed, for the log. The same call again changes nothing.

    Raises:
        ValueError: if the model does not allow an option; nothing is changed then.
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
            f"memory.apply was called with {before.config} before, and now with {config}. Build the model again to "
            "change it."
        )
    if (config.attention, config.ffn_block, config.loss_block) == ("none", None, None):
        return Applied(config, {}, None)
    _refuse_model(inner)
    if (config.ffn_block, config.loss_block) != (None, None):
        refuse_ungathered(inner)
    # Everything is checked first; then nothing can fail halfway.
    with token_wise.stand_in_weights(inner):
        checkpointing = None if config.attention == "none" else LayerCheckpointing(inner, config)
        mlps = [] if config.ffn_block is None else find_mlps(inner)
        head = None if config.loss_block is None else _head(inner)
        if isinstance(config.ffn_block, int):
            blocks = {mlp.name: config.ffn_block for mlp in mlps}
        else:
            blocks = chunked_mlp.automatic_blocks(inner, mlps)
    for module in [mlp.module for mlp in mlps] + ([] if head is None else [head]):
        refuse_inner_shards(module)
    if head is not None:
        refuse_composite(head)
    for mlp in mlps:
        chunked_mlp.wrap(mlp, blocks[mlp.name])
    applied = Applied(config, blocks, None if head is None else type(head).__name__)
    if head is not None:
        _switch_loss(inner, applied)
    if checkpointing is not None:
        checkpointing.switch_on()
    inner.register_forward_pre_hook(_refuse_compiled)
    _applied[inner] = applied
    logger.info("%s", applied)
    return applied


def applied_to(model: Any) -> Applied | None:
    """Return what `apply` changed of a model, if anything."""
    return _applied.get(base_model(model))


def sharding_error(model: Any) -> str | None:
    """Return why an engine that has wrapped a model does not show whole weights to its blocks, or None.

    For the time when the engine is known: `apply` asks the same of a model that is sharded when it is loaded.
    """
    inner = base_model(model)
    applied = _applied.get(inner)
    if applied is None:
        return None
    mlps = [module for module in inner.modules() if chunked_mlp.SETTINGS in vars(module)]
    head = inner.get_output_embeddings() if applied.head is not None else None
    try:
        for module in mlps:
            refuse_inner_shards(module)
            refuse_released_parts(module)
        if head is not None:
            refuse_inner_shards(head)
            refuse_composite(head)
    except ValueError as error:
        return str(error)
    return None


def declare_mlp(model: Any, kind: type) -> None:
    """Prove on a model that a feed-forward class treats each token by itself, so that `apply` runs it over blocks.

    Every module of that class is called with a few tokens, some of them NaN. The declaration holds for this process; a
    small model with random weights proves as much as a large one.

    Args:
        model: a Transformers model with modules of that class.
        kind: the class. Its subclasses are not declared.

    Raises:
        ValueError: if a module of that class is not a feed-forward layer that treats each token by itself.
    """
    inner = base_model(model)
    with token_wise.stand_in_weights(inner):
        calls = token_wise.record_calls(inner, lambda module: original_class(module) is kind)
        routers = tuple(set(recorded_classes(inner)))
        errors = [f"{call.name}: {reason}" for call in calls if (reason := why_not_mlp(call, routers)) is not None]
    if not calls:
        raise ValueError(
            f"No {kind.__name__} is called in a pass of {type(inner).__name__}, so nothing can be proven of it. Give "
            "a model that holds one."
        )
    if errors:
        raise ValueError(f"{kind.__name__} cannot be computed over blocks ({errors[0]}). Set ffn_block=None.")
    specs = [spec_from_call(call) for call in calls]
    spec = dataclasses.replace(
        specs[0],
        is_called_once=all(each.is_called_once for each in specs),
        inner_classes=frozenset(name for call in calls for name in inner_classes_of(call.module)),
    )
    if any((each.token_dims, each.result_dims) != (spec.token_dims, spec.result_dims) for each in specs):
        raise ValueError(f"{kind.__name__} is called with different arguments in each layer. Set ffn_block=None.")
    declare(kind, spec)


def base_model(model: Any) -> Any:
    """Return the Transformers model inside wrappers: PEFT (`get_base_model`), DDP and the like (`module`).

    Raises:
        ValueError: if there is none.
    """
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
    """Return the name of the Python module whose function replaces the forward of an instance."""
    forward = vars(module).get("forward")
    while isinstance(forward, functools.partial):
        forward = forward.func
    # Of the function itself: `functools.wraps` gives it the name of what it replaces.
    return getattr(getattr(forward, "__func__", forward), "__globals__", {}).get("__name__", "")


def _has_trl_head(module: nn.Module) -> bool:
    return _replaced_by(module).split(".")[0] == "trl"


def _cause_of(module: nn.Module) -> str:
    """Return who replaced a forward, and the way out."""
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


def _head(model: Any) -> nn.Module:
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings, so there is no head. Set loss_block=None.")
    loss = model.loss_function
    if getattr(loss, "__name__", None) != "ForCausalLMLoss" or hasattr(loss, "__wrapped__"):
        raise ValueError(
            f"{type(model).__name__} computes {getattr(loss, '__name__', loss)!r} and not the causal language "
            "modelling loss, which is the only one that is taken in blocks. Set loss_block=None."
        )
    _prove_loss(model)
    return head


def _prove_loss(model: Any) -> None:
    """Raise if the model does not hand the result of its head to its loss function, or if the loss differs."""
    tokens, stock = token_wise.tokens(model), model.loss_function
    calls: list[bool] = []  # whether the logits were deferred

    def counting(logits: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(isinstance(logits, LazyLogits))
        return blockwise(stock)(logits, *args, **kwargs)

    own = vars(model).get("_loss_function")
    with token_wise.preserved_state(model):
        expected = float(model(input_ids=tokens, labels=tokens, use_cache=False).loss)
        head = model.get_output_embeddings()
        try:
            model.loss_function = counting
            enable(head, 5)
            loss = float(model(input_ids=tokens, labels=tokens, use_cache=False).loss)
        finally:
            remove(head)
            if own is None:
                del model._loss_function
            else:
                model.loss_function = own
    tolerance = token_wise.TOLERANCE.get(model.get_input_embeddings().weight.dtype, 1e-2)
    if calls != [True] or not abs(loss - expected) <= tolerance * abs(expected):
        raise ValueError(
            f"{type(model).__name__} changes the logits between its head and its loss in a way that cannot be done "
            f"block by block (deferred: {calls}, loss {loss:.6g} instead of {expected:.6g}). Set loss_block=None."
        )


def _switch_loss(model: Any, applied: Applied) -> None:
    enabled_heads: list[nn.Module] = []
    is_loss_called = False

    def on_loss() -> None:
        nonlocal is_loss_called
        is_loss_called = True

    model.loss_function = blockwise(model.loss_function, on_loss, applied.observers)

    def before(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal is_loss_called
        is_loss_called = False
        head = module.get_output_embeddings()  # in every pass: PEFT may have wrapped it since
        if kwargs.get("labels") is not None:
            enable(head, applied.config.loss_block)
            enabled_heads.append(head)
        elif kwargs.get("loss_weights") is not None:
            raise ValueError(
                "The batch has loss_weights but its labels were taken out before the forward pass (as "
                "label_smoothing_factor and compute_loss_func do): a loss outside the model would overlook them. Let "
                "the model compute the loss, or remove the column."
            )

    def after(module: Any, args: tuple, output: Any) -> None:
        has_labels = bool(enabled_heads)
        while enabled_heads:
            disable(enabled_heads.pop())
        if has_labels and not is_loss_called and output is not None:
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
