"""The feed-forward classes of every family of Transformers that a small configuration can build, by the probe.

`scripts/update_mlp_table.py` writes them into `ring_hf/memory/mlp_classes.py`; `tests/memory/test_mlp_table.py` proves
that table.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.activations import ACT2CLS

from ..memory.mlp_classes import EXPERTS_IMPLEMENTATIONS, MlpSpec, qualified_name
from ..memory.mlp_lookup import inner_classes_of, recorded_classes, spec_from_call, why_not_mlp
from ..memory.token_wise import RecordedCall, record_calls
from .family_verdicts import installed_exact
from .model_families import EXACT, IMAGE, REQUIRED_FIELDS, SIZES, dropouts, model_class, tiny

IMAGE_TEXT = "image-text/"  # in front of the model type of a family that takes images and text
MAX_PARAMETERS = 4_000_000
# Tried in turn: what a family refuses of `SIZES`, or cannot run with.
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"head_dim": None, "num_key_value_heads": 4},
    {"hidden_size": 512, "head_dim": 128, "intermediate_size": 192, "moe_intermediate_size": 192},
    {"hidden_size": 256, "head_dim": 64, "intermediate_size": 192, "moe_intermediate_size": 192},
    {"head_dim": None, "qk_rope_head_dim": None, "num_key_value_heads": 4, "num_experts_per_tok": 1},
)
# Heavy enough to be taken for feed-forward layers in small models only.
NORMS = {"transformers.models.axk2.modeling_axk2.AXK2GatedRMSNorm"}
VISION = {**IMAGE, "depth": 1, "num_heads": 2, "out_hidden_size": 32, "embed_dim": 32}


@dataclass(frozen=True)
class Family:
    """What the probe says of a family.

    Attributes:
        specs: how each feed-forward class takes tokens, by qualified name.
        module_names: of the feed-forward modules in its model.
        inner_classes: qualified names of the classes inside of them.
    """

    specs: dict[str, MlpSpec]
    module_names: list[str]
    inner_classes: set[str]


def family_names() -> list[str]:
    """Every installed family with a causal language model, its variants in `EXACT`, and those of images and text."""
    causal = [config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING]
    image_text = [IMAGE_TEXT + config.model_type for config in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING]
    return list(dict.fromkeys([*installed_exact(), *causal, *image_text]))


def build(name: str) -> Any:
    """Return a small random model of a family in fp64 that runs a pass of tokens, or None."""
    if name in installed_exact([name] if name in EXACT else []):
        return tiny(name, "ring_zigzag")
    for variant in VARIANTS:
        try:
            model = _small(name, variant)
            record_calls(model, lambda module: False)
        except Exception:  # whatever a family does not take
            continue
        return model
    return None


def _small(name: str, variant: dict[str, Any]) -> Any:
    config_class = CONFIG_MAPPING[name.removeprefix(IMAGE_TEXT)]
    if name.startswith(IMAGE_TEXT):
        entry = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[config_class]
        kind = entry[0] if isinstance(entry, (tuple, list)) else entry
    else:
        kind = model_class(config_class)
    default, parts = config_class(), getattr(config_class, "sub_configs", None) or {}
    settings = {**_known(default, SIZES | variant), **dict.fromkeys(dropouts(default), 0.0)}
    settings |= REQUIRED_FIELDS.get(name, {})
    if "text_config" in parts:
        settings["text_config"] = _known(default.text_config, SIZES | variant) | _model_type(default.text_config)
    if "vision_config" in parts:
        settings["vision_config"] = _known(default.vision_config, VISION) | _model_type(default.vision_config)
    config = config_class(**settings)
    if kind.config_class is parts.get("text_config"):
        config = config.get_text_config()
    options = {"experts_implementation": "eager", "attn_implementation": "sdpa" if kind._supports_sdpa else "eager"}
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in kind._from_config(config, **options).parameters())
    if num_parameters > MAX_PARAMETERS:
        raise ValueError(f"{name} has {num_parameters} parameters.")
    torch.manual_seed(0)
    return kind._from_config(config, **options).double()


def _known(config: Any, settings: dict[str, Any]) -> dict[str, Any]:
    names = {*dir(config), *config.attribute_map}
    return {key: value for key, value in settings.items() if key in names and value is not None}


def _model_type(config: Any) -> dict[str, str]:
    return {"model_type": config.model_type} if config.model_type else {}


def probe(model: Any) -> Family:
    """Try every module of the decoder layers of a model, experts with every implementation that runs on a CPU."""
    calls = list(_feed_forward_calls(model))
    specs: dict[str, MlpSpec] = {}
    for call in calls:
        name, spec = qualified_name(type(call.module)), spec_from_call(call)
        assert all(num == 1 for num in spec.result_dims) and not spec.returns_tuple, name
        assert specs.setdefault(name, spec).token_dims == spec.token_dims, name
        if not spec.is_called_once:  # some layers may run again, and others once
            specs[name] = spec
    inner = {name for call in calls for name in inner_classes_of(call.module)}
    return Family(specs, [call.name for call in calls], inner)


def _feed_forward_calls(model: Any) -> Iterator[RecordedCall]:
    routers = tuple(set(recorded_classes(model)))
    calls = {call.module: call for call in record_calls(model, lambda module: any(True for _ in module.parameters()))}
    for layer in _called_layers(model, calls):
        yield from _calls_inside(layer, calls, routers)


def _called_layers(model: Any, calls: dict[nn.Module, RecordedCall]) -> Iterator[nn.Module]:
    """Members of lists of modules that are called, and are in no other such list; not those of one matrix."""
    nested: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in nested:
            for member in module:
                if member in calls and len(list(member.parameters())) > 2:
                    nested.update(member.modules())
                    yield member


def _calls_inside(
    layer: nn.Module, calls: dict[nn.Module, RecordedCall], routers: tuple[type, ...]
) -> Iterator[RecordedCall]:
    for child in layer.children():
        call = calls.get(child)
        if call is not None and _is_mlp(call, routers):
            yield call
        elif not isinstance(child, routers):
            yield from _calls_inside(child, calls, routers)


def _is_mlp(call: RecordedCall, routers: tuple[type, ...]) -> bool:
    if qualified_name(type(call.module)) in NORMS or why_not_mlp(call, routers) is not None:
        return False
    if hasattr(call.module, "is_concatenated"):  # Transformers chooses how these experts run by name
        _prove_implementations(call, routers)
    return True


def _prove_implementations(call: RecordedCall, routers: tuple[type, ...]) -> None:
    """Raise if experts treat tokens differently when they run in another way; in fp32, which all of them take."""
    config: Any = call.module.config
    before = config._experts_implementation
    args, kwargs = tree_map_only(Tensor, _in_fp32, (call.args, call.kwargs))
    call.module.float()
    for implementation in sorted(filter(None, EXPERTS_IMPLEMENTATIONS)):
        config._experts_implementation = implementation
        reason = why_not_mlp(replace(call, args=args, kwargs=kwargs), routers)
        assert reason is None, (call.name, implementation, reason)
    config._experts_implementation = before
    call.module.double()


def _in_fp32(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x


def token_wise_activations() -> set[str]:
    """Return the qualified names of Transformers' activation functions, each of which is one of single elements."""
    x = torch.linspace(-3, 3, 35, dtype=torch.float64).view(5, 7)
    names = set()
    for entry in ACT2CLS.values():
        kind, options = entry if isinstance(entry, tuple) else (entry, {})
        activation = kind(**options).double()
        whole = activation(x)
        assert all(torch.allclose(activation(x[t]), whole[t], rtol=0, atol=1e-12) for t in range(5)), kind
        names.add(qualified_name(kind))
    return names
