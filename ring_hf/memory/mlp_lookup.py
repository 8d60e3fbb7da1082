"""Which modules of a model are feed-forward layers that may run over blocks of tokens.

A module is taken if exactly its class is in the table (`mlp_classes.py`) and nothing inside it was changed. In
mixtures of experts the router stays whole (its logits are recorded, and its auxiliary loss is over all tokens): the
table then lists the experts behind it, which receive each token's choice, and shared experts.

What the table cannot know is tried with the probe (`token_wise.py`) on the model itself: modules whose insides were
replaced. Adapters of PEFT and quantized matrices of bitsandbytes are the usual ones; whether they mix tokens depends
on their settings (8-bit matrices choose their outliers over all tokens), and experts whose weights PEFT adapts are
inside a module of PEFT that has to be computed as a whole. A class of which nothing is known is refused;
`memory.declare_mlp` proves and adds it.
"""

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

from torch import nn

from .mlp_classes import EXPERTS_IMPLEMENTATIONS, INNER_CLASSES, MlpSpec, qualified_name, spec_of
from .sharded_weights import is_dtensor, original_class
from .token_wise import (
    RecordedCall,
    is_affine,
    is_token_wise,
    record_calls,
    values_above_zero,
)

DROPOUT_ERROR = (
    "{} drops values at random, and blocks would draw others when they are recomputed. Set the dropout "
    "probability to 0, or ffn_block=None."
)
_ENGINES = ("torch.distributed", "deepspeed")  # whose hooks gather weights
_PACKAGES = ("torch", "transformers")


@dataclass(frozen=True)
class Mlp:
    """A feed-forward module of a model, by its name in it, and how it takes tokens."""

    name: str
    module: nn.Module
    spec: MlpSpec


def find_mlps(model: Any) -> list[Mlp]:
    """Return the feed-forward modules of a model, in order.

    Args:
        model: a Transformers model, with weights (or `stand_in_weights`) if something inside them was replaced.

    Raises:
        ValueError: if a layer has none, or experts that are not known to be token-wise, or dropout inside.
    """
    names = {module: name for name, module in model.named_modules()}
    model_class = type(model).__name__
    layers = list(_decoder_layers(model))
    failures = _probe_failures(model, [layer for members in layers for layer in members])
    mlps: list[Mlp] = []
    layers_without: list[nn.Module] = []
    uncovered_experts: list[nn.Module] = []
    for members in layers:
        mlps_of = {layer: list(_mlps_inside(layer, names, failures)) for layer in members}
        for layer, inside in mlps_of.items():
            covered = {id(weight) for mlp in inside for weight in mlp.module.parameters()}
            uncovered_experts += [module for module in layer.modules() if _holds_experts(module, covered)]
        if any(mlps_of.values()):
            layers_without += [layer for layer, inside in mlps_of.items() if not inside]
        mlps += [mlp for inside in mlps_of.values() for mlp in inside]
    if uncovered_experts:
        example = uncovered_experts[0]
        raise ValueError(
            f"{len(uncovered_experts)} feed-forward parts of {model_class}, for example {names[example]} "
            f"({type(example).__name__}), are not known to treat each token by itself (experts with a capacity, or "
            "that get their tokens sorted, do not), so they cannot be cut into blocks of tokens."
            + _way_out(failures, example)
        )
    if layers_without or not mlps:
        bare = layers_without[0] if mlps else next((layer for members in layers for layer in members), None)
        where = "" if bare is None else f" in {names[bare]} (whose parts are {_parts_of(bare)})"
        raise ValueError(
            f"{model_class} has no feed-forward layer that is a module of its own and is known to treat each token by "
            f"itself{where}." + _way_out(failures)
        )
    for mlp in mlps:
        for value in values_above_zero(mlp.module, "drop"):
            raise ValueError(DROPOUT_ERROR.format(f"{mlp.name}.{value}"))
    return mlps


def _decoder_layers(model: Any) -> Iterator[list[nn.Module]]:
    """Yield lists of modules that are in no other such list; not those of one matrix."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if not any(isinstance(module, nn.ModuleList) for module in decoder.modules()):
        decoder = model  # ModernBERT calls the matrix of its head a decoder
    nested: set[nn.Module] = set()
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and module not in nested:
            members = [member for member in module if len(list(member.parameters())) > 2]
            nested.update(inner for member in members for inner in member.modules())
            yield members


def _mlps_inside(
    layer: nn.Module, names: dict[nn.Module, str], failures: dict[nn.Module, str | None]
) -> Iterator[Mlp]:
    for child in layer.children():
        spec = _spec_with_wrappers(child)
        if spec is not None and failures.get(child) is None:
            yield Mlp(names[child], child, spec)
        else:
            yield from _mlps_inside(child, names, failures)


def _known_module(module: nn.Module) -> nn.Module | None:
    """Return a module if its class is known, or the one of a known class inside a module of PEFT, or None."""
    is_wrapper = original_class(module).__module__.startswith("peft.")
    return next(
        (inner for inner in (module.modules() if is_wrapper else [module]) if spec_of(inner) is not None), None
    )


def _spec_with_wrappers(module: nn.Module) -> MlpSpec | None:
    """Return the spec of a module; a module of PEFT around one takes the same arguments."""
    known = _known_module(module)
    return None if known is None else spec_of(known)


def argument_names(module: nn.Module) -> list[str]:
    """Return the names of the arguments of a feed-forward module, in the order of its forward."""
    known = _known_module(module)
    assert known is not None
    return list(inspect.signature(original_class(known).forward).parameters)[1:]


def _probe_failures(model: Any, layers: list[nn.Module]) -> dict[nn.Module, str | None]:
    """Try the modules whose insides were changed; return for each why it is no feed-forward layer, or None."""
    changes: dict[nn.Module, str] = {}
    for layer in layers:
        for module in layer.modules():
            spec = _spec_with_wrappers(module)
            change = None if spec is None else find_change(module, spec)
            if change is not None:
                changes[module] = change
    if not changes:
        return {}
    routers = tuple(set(recorded_classes(model)))
    failures: dict[nn.Module, str | None] = dict.fromkeys(changes, "it is not called")
    for call in record_calls(model, changes.__contains__):
        reason = why_not_mlp(call, routers)
        failures[call.module] = reason and f"{call.name} holds {changes[call.module]}, and {reason}"
    return failures


def find_change(module: nn.Module, spec: MlpSpec) -> str | None:
    """Return what of a module differs from what was proven of its class, or None."""
    if spec_of(module) is None:
        return f"the adapters of a {type(module).__name__}"
    if original_class(module).__module__.startswith("torch.nn."):
        return "modules of any class"  # a container: nothing is known of it by its class
    forward: Any = original_class(module).forward
    if forward.__globals__["__name__"].split(".")[0] != original_class(module).__module__.split(".")[0]:
        return f"a forward of {forward.__globals__['__name__']}"
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if implementation not in EXPERTS_IMPLEMENTATIONS or getattr(module, "_is_expert_parallel", False):
        return f"experts that run as {implementation}"
    for path, inner in module.named_modules():
        if inner is not module:
            name = qualified_name(original_class(inner))
            if name not in INNER_CLASSES and name not in spec.inner_classes:
                return f"a {type(inner).__name__} ({path})"
            hooks = (*inner._forward_pre_hooks.values(), *inner._forward_hooks.values())
            if not all(str(getattr(hook, "__module__", "")).startswith(_ENGINES) for hook in hooks):
                return f"a hook ({path})"
        for parameter in inner._parameters.values():
            if parameter is not None and not is_dtensor(parameter) and type(parameter) is not nn.Parameter:
                return f"a {type(parameter).__name__} ({path})"
        for key, value in vars(inner).items():
            function = value.func if isinstance(value, partial) else value
            if isinstance(function, FunctionType) and function.__module__.split(".")[0] not in _PACKAGES:
                return f"a function of {function.__module__} ({key})"
    return None


def inner_classes_of(module: nn.Module) -> set[str]:
    """Return the qualified names of the classes inside of a module."""
    return {qualified_name(original_class(inner)) for inner in module.modules() if inner is not module}


def why_not_mlp(call: RecordedCall, routers: tuple[type, ...]) -> str | None:
    """Try whether a module is a feed-forward layer that treats each token by itself; return why not, or None.

    It gives back the width it was given, holds weights of at least that width squared, and is not affine.

    Args:
        call: of the module.
        routers: classes whose outputs Transformers records, which have to see all tokens.
    """
    if call.axes is None:
        return "its arguments and results do not have one row per token"
    if not call.same_width or len([p for p in call.module.parameters() if p.ndim >= 2]) < 2:
        return "its result is not as wide as its argument, or it holds fewer than two matrices"
    if routers and any(isinstance(module, routers) for module in call.module.modules()):
        return "it holds a router, whose outputs are recorded for all tokens"
    if num_weights(call.module) < call.first_tokens().shape[-1] ** 2:
        return "it holds fewer weights than its width squared"
    if not is_token_wise(call):
        return "the result of a token depends on other tokens"
    return "it is no more than a matrix" if is_affine(call) else None


def spec_from_call(call: RecordedCall) -> MlpSpec:
    """Return how a module takes tokens, from its recorded call."""
    assert call.axes is not None
    names = list(inspect.signature(original_class(call.module).forward).parameters)[1:]
    token_dims = {
        name: x.ndim - num_leading
        for name, x, num_leading in zip(names, call.args, call.axes.args, strict=False)
        if num_leading
    }
    token_dims |= {name: call.kwargs[name].ndim - num_leading for name, num_leading in call.axes.kwargs}
    results = call.output if call.axes.is_tuple else (call.output,)
    result_dims = tuple(x.ndim - num_leading for x, num_leading in zip(results, call.axes.results, strict=True))
    return MlpSpec(token_dims, result_dims, call.axes.is_tuple, call.num_calls == 1)


def recorded_classes(model: Any) -> Iterator[type]:
    """Yield classes whose outputs Transformers collects besides hidden states and attention: routers."""
    for module in model.modules():
        for key, targets in (getattr(type(module), "_can_record_outputs", None) or {}).items():
            if key in ("hidden_states", "attentions", "cross_attentions"):
                continue
            for target in targets if isinstance(targets, (list, tuple)) else (targets,):
                target_class = getattr(target, "target_class", target)
                suffix = getattr(target, "class_name", None)
                yield from (type(m) for m in model.modules() if suffix and type(m).__name__.endswith(suffix))
                if isinstance(target_class, type):
                    yield target_class


def num_weights(module: nn.Module) -> int:
    """Return the number of weights in matrices; a weight that bitsandbytes quantized counts as its original."""
    shapes = (getattr(getattr(p, "quant_state", None), "shape", p.shape) for p in module.parameters())
    return sum(math.prod(shape) for shape in shapes if len(shape) >= 2)


def _holds_experts(module: nn.Module, covered: set[int]) -> bool:
    """Return whether a module holds stacked matrices, and weights that no feed-forward module covers."""
    own = list(module.parameters(recurse=False))
    return sum(p.numel() for p in own if p.ndim >= 3) > 0 and not {id(p) for p in own} <= covered


def _parts_of(layer: nn.Module) -> str:
    return ", ".join(dict.fromkeys(type(child).__name__ for child in layer.children()))


def _way_out(failures: dict[nn.Module, str | None], example: nn.Module | None = None) -> str:
    reason = next((reason for reason in failures.values() if reason is not None), None)
    if reason is not None:
        return f" Tried on the model: {reason}. Set ffn_block=None."
    if example is not None and type(example).__module__.startswith("torch.nn."):
        return " Set ffn_block=None."
    kind = "its class" if example is None else type(example).__name__
    return f" If it does, declare it first with ring_hf.memory.declare_mlp(model, {kind}), or set ffn_block=None."
