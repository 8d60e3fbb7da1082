"""Converts a `config.json` of Transformers to a `Model`. The file is parsed as JSON; nothing is downloaded.

Architectures are a table of their differences from Llama. A number that the file does not have gets the default that
Transformers uses.
"""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .model import Model
from .model_table import MODEL_TABLE, find_model_name

# Differences from Llama per model_type. `windows` says which layers have a window if the file does not list them:
# every layer, or all but each n-th (1-based).
_GEMMA = {"wide_norm": True, "tied": True}
_QWEN = {"windows": "from max_window_layers"}
_EXPERTS = {"experts": "num_local_experts", "expert_ff": "intermediate_size"}
_MANY_EXPERTS = {"experts": "num_experts", "expert_ff": "moe_intermediate_size"}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"windows": "all"},
    "ministral": {"windows": "all"},
    "mixtral": {"windows": "all", **_EXPERTS},
    "qwen2": {"qkv_bias": True, **_QWEN},
    "qwen2_moe": {"qkv_bias": True, "shared_gate": True, **_QWEN, **_MANY_EXPERTS},
    "qwen3": {"qk_norm": "head", **_QWEN},
    "qwen3_moe": {"qk_norm": "head", **_QWEN, **_MANY_EXPERTS},
    "gemma": _GEMMA,
    "gemma2": {"norms": 4, "windows": 2, **_GEMMA},
    "gemma3_text": {"norms": 4, "windows": 6, "qk_norm": "head", **_GEMMA},
    "phi3": {"windows": "all"},
    "smollm3": {"tied": True},
    "granite": {},
    "olmo2": {"qk_norm": "whole"},
    "olmo3": {"qk_norm": "whole", "windows": 4},
    "seed_oss": {"out_bias": False},
    "gpt_oss": {"windows": 2, "sinks": True, "router_bias": True, "expert_bias": True, **_EXPERTS},
    "deepseek_v3": {"experts": "n_routed_experts", "expert_ff": "moe_intermediate_size"},
}


def read_model(text: str) -> Model:
    """Return the model of a folder, of a `config.json`, or of a name in the built-in table.

    Raises:
        ValueError: if there is no such file or name, or the planner does not know the architecture.
    """
    return parse_config(*read_config(text))


def read_config(text: str) -> tuple[Mapping[str, Any], str, str]:
    """Return the `config.json` of a model as a dict, the name of the model, and the source of the config in words.

    Args:
        text: a folder, a `config.json`, or a name in the built-in table.

    Raises:
        ValueError: if there is no such file or name, or the file is not a JSON object.
    """
    path = Path(text)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        try:
            config = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(
                f"{file} is not JSON: {error}. Pass a config.json of Transformers, or its folder."
            ) from None
        if not isinstance(config, dict):
            raise ValueError(
                f"{file} contains a {type(config).__name__}, not an object. Pass a config.json of Transformers, or "
                "its folder."
            )
        return config, path.name if path.is_dir() else path.parent.name or text, str(file)
    if path.is_dir():
        raise ValueError(f"{path} has no config.json. Pass the folder that save_pretrained wrote, or the file itself.")
    name = find_model_name(text)
    if name is not None:
        return MODEL_TABLE[name], name, f"built-in table: config.json of {name}"
    similar = _similar_names(text)
    hint = f"Similar names: {', '.join(similar)}. " if similar else f"Known names: {', '.join(MODEL_TABLE)}. "
    raise ValueError(
        f"--model {text!r} is neither a folder, nor a file, nor a name in the built-in table, and nothing is "
        f"downloaded. {hint}For any other model pass its folder or its config.json."
    )


def _similar_names(text: str) -> list[str]:
    """Return the names of the table that resemble `text`, with or without organisation."""

    def short(name: str) -> str:
        return name.lower().rsplit("/")[-1]

    full_matches = difflib.get_close_matches(text.lower(), [name.lower() for name in MODEL_TABLE], 4, 0.5)
    short_matches = difflib.get_close_matches(short(text), [short(name) for name in MODEL_TABLE], 4, 0.6)
    return [name for name in MODEL_TABLE if name.lower() in full_matches or short(name) in short_matches]


def parse_config(config: Mapping[str, Any], name: str, source: str) -> Model:
    """Return the `Model` of a `config.json`.

    Raises:
        ValueError: if the planner does not know the architecture, or a size is missing.
    """
    config = {**config, **config["text_config"]} if isinstance(config.get("text_config"), Mapping) else dict(config)
    kind = str(config.get("model_type", "")).removesuffix("_text")
    kind = "gemma3_text" if kind == "gemma3" else kind
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"model_type={config.get('model_type')!r} ({source}): the planner does not know its layers. It knows "
            f"{', '.join(ARCHITECTURES)}. If the layers equal those of one of these architectures, set model_type to "
            "it in a copy of config.json."
        )
    missing_keys = [key for key in _REQUIRED_KEYS if config.get(key) is None]
    if missing_keys:
        raise ValueError(
            f"{source} lacks {', '.join(missing_keys)}. Pass the whole config.json of a causal language model."
        )
    traits = ARCHITECTURES[kind]
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    # Old files have null for default values.
    config = {key: value for key, value in config.items() if value is not None}
    mla = "kv_lora_rank" in config
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    if mla:
        head_dim = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    sparse = _sparse_layers(config, traits, layers)
    bias = config.get("attention_bias", kind == "gpt_oss")
    return Model(
        name=name,
        source=source,
        hidden=config["hidden_size"],
        heads=heads,
        kv_heads=heads if mla else config.get("num_key_value_heads", heads),
        head_dim=head_dim,
        v_head_dim=config.get("v_head_dim", head_dim) if mla else head_dim,
        ff=config["intermediate_size"],
        vocab=config["vocab_size"],
        tied=config.get("tie_word_embeddings", traits.get("tied", False)),
        windows=_layer_windows(config, traits, layers),
        sparse=sparse,
        experts=_num_experts(config, traits) if any(sparse) else 0,
        experts_per_token=config.get("num_experts_per_tok", 0) if any(sparse) else 0,
        expert_ff=config[traits["expert_ff"]] if any(sparse) else 0,
        shared_ff=_shared_width(config) if any(sparse) else 0,
        shared_gate=traits.get("shared_gate", False),
        router_bias=traits.get("router_bias", False),
        expert_bias=traits.get("expert_bias", False),
        q_rank=config.get("q_lora_rank", 0) if mla else 0,
        kv_rank=config.get("kv_lora_rank", 0),
        rope_dim=config["qk_rope_head_dim"] if mla else 0,
        qkv_bias=traits.get("qkv_bias", bias),
        out_bias=config.get("attention_out_bias", traits.get("out_bias", bias)),
        mlp_bias=config.get("mlp_bias", False),
        sinks=traits.get("sinks", False),
        qk_norm=traits.get("qk_norm", ""),
        norms=traits.get("norms", 2),
        wide_norm=traits.get("wide_norm", False),
    )


_REQUIRED_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


def _num_experts(config: Mapping[str, Any], traits: Mapping[str, Any]) -> int:
    # Transformers 5 writes num_local_experts for all of them.
    return config.get(traits["experts"], config.get("num_local_experts", 0))


def _shared_width(config: Mapping[str, Any]) -> int:
    width = config.get("shared_expert_intermediate_size", 0)
    return width or config.get("n_shared_experts", 0) * config.get("moe_intermediate_size", 0)


def _sparse_layers(config: Mapping[str, Any], traits: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    if "experts" not in traits or not _num_experts(config, traits):
        return (False,) * layers
    dense = set(config.get("mlp_only_layers", ())) | set(range(config.get("first_k_dense_replace", 0)))
    step = config.get("decoder_sparse_step", 1)
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))


def _layer_windows(config: Mapping[str, Any], traits: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    window, rule = config.get("sliding_window"), traits.get("windows")
    if not window or not config.get("use_sliding_window", rule != _QWEN["windows"]):
        return (None,) * layers
    kinds = config.get("layer_types")
    if kinds:
        return tuple(window if "sliding" in kind else None for kind in kinds)
    if rule == "all":
        return (window,) * layers
    if rule == _QWEN["windows"]:
        return tuple(window if layer >= config.get("max_window_layers", 28) else None for layer in range(layers))
    if rule is None:
        return (None,) * layers
    every = config.get("sliding_window_pattern", rule)
    return tuple(None if (layer + 1) % every == 0 else window for layer in range(layers))
