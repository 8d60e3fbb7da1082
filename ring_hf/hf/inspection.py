"""What a model's attention layers ask of a kernel, seen without its weights: for `ring-hf doctor`.

The model is built on torch's meta device from its configuration, judged by the rules that training would judge it by,
and run once on a few tokens that do not exist, with an attention function that only notes what it is asked for. Where
a model cannot run without data, the usual names of its configuration are read instead.
"""

import copy
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from . import backend
from .models import MODEL_RULES, text_config
from .supported import first_error

# Real models of each kind of attention, as their configurations describe them; the layers are what matters here.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-3-70b": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "gemma-2-9b": {
        "model_type": "gemma2",
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
    "gpt-oss-20b": {"model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32},
    "deepseek-v3": {"model_type": "deepseek_v3"},
}
_PROBE = "ring_hf_probe"
_TOKENS = 8


@dataclass(frozen=True)
class AttentionKind:
    """Layers that ask for the same: head counts and dims, what is visible, what is done to the scores."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: bool = False


@dataclass(frozen=True)
class Inspected:
    """A model as context parallelism sees it.

    Attributes:
        refused: the message with which training would refuse it, or None.
        kinds: its attention layers and how many there are of each kind.
        probed: whether the layers were seen at work, or read from the configuration.
    """

    name: str
    model_type: str
    refused: str | None
    kinds: tuple[tuple[AttentionKind, int], ...]
    probed: bool


def load_config(name: str) -> Any:
    """The configuration behind a folder, a config.json or a key of `SHAPES`. Nothing is downloaded.

    Raises:
        ValueError: if it is none of them, or Transformers does not know the architecture.
    """
    if name in SHAPES:
        return AutoConfig.for_model(**SHAPES[name])
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"{name!r} is neither a folder with a config.json, nor such a file, nor one of {', '.join(SHAPES)}. "
            "Download the model's config.json first; nothing is downloaded here."
        )
    try:
        return AutoConfig.for_model(**json.loads(path.read_text()))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no configuration that Transformers can read ({error}).") from error


def inspect_model(name: str, config: Any, attention: str) -> Inspected:
    """Builds the model of a configuration without weights and looks at its attention.

    Args:
        attention: the backend it would attend with, such as "ring_zigzag".
    """
    config = copy.deepcopy(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.bfloat16)
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # not causal, not this backend, a field missing
        said = " ".join(str(error).split())
        return Inspected(name, config.model_type, f"Transformers cannot build it: {said}", (), False)
    refused = first_error(MODEL_RULES, model)
    counted = _probe(model)
    if counted is None:
        counted = _configured(text_config(model))
        return Inspected(name, config.model_type, refused, counted, False)
    return Inspected(name, config.model_type, refused, counted, True)


def _probe(model: PreTrainedModel) -> tuple[tuple[AttentionKind, int], ...] | None:
    seen: Counter[AttentionKind] = Counter()

    def attention(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> tuple[Any, None]:
        window = kwargs.get("sliding_window") or backend._window(module)
        heads = query.shape[1], key.shape[1], query.shape[-1], value.shape[-1]
        sinks = kwargs.get("s_aux") is not None
        seen[AttentionKind(*heads, window, backend._chunk(module), kwargs.get("softcap") or None, sinks)] += 1
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    AttentionInterface.register(_PROBE, attention)
    AttentionMaskInterface.register(_PROBE, lambda *args, **kwargs: None)
    try:
        model.set_attn_implementation(_PROBE)
        with torch.no_grad(), torch.device("meta"):
            tokens = torch.zeros(1, _TOKENS, dtype=torch.long)
            # A mask, or Transformers would look into the positions for packed documents.
            model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
        return None  # experts chosen by values, architectures that refuse the probe: their configuration is read
    return tuple(seen.items()) or None


def _configured(config: Any) -> tuple[tuple[AttentionKind, int], ...]:
    num_heads = getattr(config, "num_attention_heads", None)
    if not isinstance(num_heads, int):
        return ()
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    latent = getattr(config, "kv_lora_rank", None) and getattr(config, "v_head_dim", None)
    if latent:  # multi-head latent attention: a key of both parts for every head
        num_kv_heads, head_dim = num_heads, config.qk_nope_head_dim + config.qk_rope_head_dim
    v_head_dim = config.v_head_dim if latent else head_dim
    softcap = getattr(config, "attn_logit_softcapping", None)
    sinks = config.model_type in ("gpt_oss",)
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    counted = []
    for name, count in Counter(types).items():
        window = config.sliding_window if name == "sliding_attention" else None
        chunk = getattr(config, "attention_chunk_size", None) if name == "chunked_attention" else None
        kind = AttentionKind(num_heads, num_kv_heads, head_dim, v_head_dim, window, chunk, softcap, sinks)
        counted.append((kind, count))
    return tuple(counted)
