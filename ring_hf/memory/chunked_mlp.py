"""Feed-forward layers over blocks of tokens: found by what they do, proven token-wise, wrapped in place.

A feed-forward layer is a module inside a decoder layer that treats tokens one by one, is not affine, gives back the
width it was given, and holds weights of at least that width squared. In mixtures of experts the router stays whole
(its logits are recorded, and its auxiliary loss is over all tokens): then the experts behind it, which are told each
token's choice, and shared experts are taken. Experts that are called with anything but one row per token are refused.

Letters: B rows, S tokens of a row, T = B * S.
"""

import math
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .chunked import in_blocks
from .sharded_weights import gather_as_unit, refuse_shards
from .token_wise import RecordedCall, TokenAxes, flat, is_affine, treats_tokens_alone, values_above_zero, watch

SETTINGS = "_ring_hf_ffn"
_DROPS = (
    "{} drops values at random, and blocks would draw other places when they are recomputed. Set the dropout "
    "probability to 0, or ffn_block=None."
)
SMALLEST = 1024  # tokens of an automatic block: below, matrices are too small to be fast


def find(model: Any) -> tuple[list[RecordedCall], str | None]:
    """The feed-forward layers of a model, and what is wrong with them if anything is."""
    recorded = tuple(set(_recorded(model)))
    called = {seen.module: seen for seen in watch(model, lambda module: _num_weights(module) > 0)}
    found: list[RecordedCall] = []
    missed: list[str] = []
    bare: list[str] = []
    for name, layer in _layers(model, called):
        here = list(_inside(layer, called, recorded))
        found += here
        covered = {id(weight) for seen in here for weight in seen.module.parameters()}
        for path, module in layer.named_modules():
            if _looks_like_experts(module) and not {id(w) for w in module.parameters(recurse=False)} <= covered:
                missed.append(f"{name}.{path} ({type(module).__name__})")
        if not here:
            bare.append(name)
    if missed:
        return [], (
            f"{len(missed)} feed-forward parts of {type(model).__name__}, for example {missed[0]}, do not treat each "
            "token by itself (experts with a capacity, or that get their tokens sorted), so they cannot be cut into "
            "blocks of tokens. Set ffn_block=None."
        )
    if bare or not found:
        return [], (
            f"{type(model).__name__} has no feed-forward layer that is a module of its own and treats each token by "
            f"itself{f' in {bare[0]}' if found else ''}. Set ffn_block=None."
        )
    dropping = [f"{seen.name}.{place}" for seen in found for place in values_above_zero(seen.module, "drop")]
    return found, _DROPS.format(dropping[0]) if dropping else None


def _recorded(model: Any) -> Iterator[type]:
    """Classes whose outputs Transformers collects besides hidden states and attention: routers."""
    for module in model.modules():
        for key, targets in (getattr(type(module), "_can_record_outputs", None) or {}).items():
            if key not in ("hidden_states", "attentions", "cross_attentions"):
                for target in targets if isinstance(targets, (list, tuple)) else (targets,):
                    kind = getattr(target, "target_class", target)
                    named = getattr(target, "class_name", None)
                    yield from (type(m) for m in model.modules() if named and type(m).__name__.endswith(named))
                    if isinstance(kind, type):
                        yield kind


def _num_weights(module: nn.Module) -> int:
    """Weights of matrices; those that bitsandbytes quantized count as what they stand for."""
    shapes = (getattr(getattr(p, "quant_state", None), "shape", p.shape) for p in module.parameters())
    return sum(math.prod(shape) for shape in shapes if len(shape) >= 2)


def _looks_like_experts(module: nn.Module) -> bool:
    return sum(p.numel() for p in module.parameters(recurse=False) if p.ndim >= 3) > 0


def _layers(model: Any, called: dict[nn.Module, RecordedCall]) -> Iterator[tuple[str, nn.Module]]:
    """Members of lists of modules that are called, and are in no other such list; not those of one matrix."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            members = [(n, m) for n, m in module.named_children() if m in called and len(list(m.parameters())) > 2]
            for number, member in members:
                inside |= set(member.modules())
                yield f"{name}.{number}", member


def _inside(
    layer: nn.Module, called: dict[nn.Module, RecordedCall], recorded: tuple[type, ...]
) -> Iterator[RecordedCall]:
    for child in layer.children():
        seen = called.get(child)
        if seen is not None and _is_feed_forward(seen, recorded):
            yield seen
        elif not isinstance(child, recorded):
            yield from _inside(child, called, recorded)


def _is_feed_forward(seen: RecordedCall, recorded: tuple[type, ...]) -> bool:
    if seen.rows is None or not seen.same_width or len([p for p in seen.module.parameters() if p.ndim >= 2]) < 2:
        return False
    if recorded and any(isinstance(module, recorded) for module in seen.module.modules()):
        return False
    first = next(x for x in (*seen.args, *seen.kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point())
    if _num_weights(seen.module) < first.shape[-1] ** 2:
        return False
    return treats_tokens_alone(seen) and not is_affine(seen)


def automatic_block(seen: RecordedCall) -> int:
    """Tokens whose activations are about as large as the weights: smaller blocks would not lower the peak, but cost
    time. (ALST's tiled MLP, arXiv 2506.13996, takes one tile per hidden size tokens, which is the same for a dense
    layer.)"""
    sizes: list[int] = []
    weights = {w.untyped_storage().data_ptr() for w in seen.module.parameters()}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            sizes.append(x.numel())
        return x

    leaves, kwargs = torch.utils._pytree.tree_map_only(
        Tensor,
        lambda x: x.detach().requires_grad_() if x.is_floating_point() else x,
        (seen.args, seen.kwargs),
    )
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        seen.module(*leaves, **kwargs)
    assert seen.rows is not None
    rows = next(lead for lead in (*seen.rows.args, *dict(seen.rows.kwargs).values()) if lead)
    first = next(x for x in (*seen.args, *seen.kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point())
    per_token = max(sum(sizes) // flat(first, rows).shape[0], 1)
    return max(SMALLEST, _num_weights(seen.module) // per_token)


def wrap(seen: RecordedCall, block: int) -> None:
    """Replace the forward of one module. It stays an attribute of the instance alone: checkpoints, names and copies
    of the model are as before."""
    assert seen.rows is not None
    seen.module.__dict__[SETTINGS] = (seen.rows, block)
    if seen.num_calls == 1:  # ZeRO-3 reduces the gradients of a leaf after its first backward pass
        gather_as_unit(seen.module)
    seen.module.forward = MethodType(_forward, seen.module)


def refuse_changed(module: nn.Module, args: tuple) -> None:
    """A hook: others change a module after it was proven (Liger its forward, PEFT what is inside)."""
    name = type(module).__name__
    if getattr(module.forward, "__func__", None) is not _forward:
        raise ValueError(
            f"The forward pass of {name} was replaced since memory.apply, so that ffn_block would be ignored. Leave "
            "the replacement (such as use_liger_kernel) out, or set ffn_block=None."
        )
    dropping = next(values_above_zero(module, "drop"), None) if module.training else None
    if dropping is not None:
        raise ValueError(_DROPS.format(f"{name}.{dropping}"))
    for part in module.modules():
        if is_parametrized(part) or (part is not module and part._forward_pre_hooks_with_kwargs):
            raise ValueError(
                f"{type(part).__name__} in {name} is changed for this pass alone (a parametrization or a hook, as "
                "PEFT sets for target_parameters, alora_invocation_tokens and adapter_names), which the backward pass "
                "in blocks would not see. Call memory.apply after get_peft_model for target_parameters, or set "
                "ffn_block=None."
            )


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    rows: TokenAxes
    rows, block = self.__dict__[SETTINGS]
    own = type(self).forward
    leads = [*rows.args, *(lead for _, lead in rows.kwargs)]
    places = [x for x, lead in zip((*args, *(kwargs.get(key) for key, _ in rows.kwargs)), leads, strict=False) if lead]
    fits = len(args) == len(rows.args) and all(isinstance(x, Tensor) for x in places)
    leads = [lead for lead in leads if lead]
    shapes = {flat(x, lead).shape[0] for x, lead in zip(places, leads, strict=True)} if fits else set()
    if len(shapes) != 1 or max(shapes) <= block:
        return own(self, *args, **kwargs)

    refuse_shards(self)
    # Not the tensors themselves: the graph keeps this function, and would keep them alive.
    fixed = [None if lead else x for x, lead in zip(args, rows.args, strict=True)]
    options = {key: value for key, value in kwargs.items() if key not in dict(rows.kwargs)}

    def function(*parts: Tensor) -> tuple[Tensor, ...]:
        found = iter(part[None] if lead == 2 else part for part, lead in zip(parts, leads, strict=True))
        mine = [next(found) if lead else x for x, lead in zip(fixed, rows.args, strict=True)]
        results = own(self, *mine, **{key: next(found) for key, _ in rows.kwargs}, **options)
        results = results if rows.is_tuple else (results,)
        return tuple(flat(x, lead) for x, lead in zip(results, rows.results, strict=True))

    tensors = [flat(x, lead) for x, lead in zip(places, leads, strict=True)]
    trained = [p for p in self.parameters() if p.requires_grad]
    results = in_blocks(function, tensors, trained, block)
    first = next((x.shape[:2] for x, lead in zip(places, leads, strict=True) if lead == 2), None)
    shaped = tuple(
        x.unflatten(0, first) if lead == 2 and first is not None else x
        for x, lead in zip(results, rows.results, strict=True)
    )
    return shaped if rows.is_tuple else shaped[0]
