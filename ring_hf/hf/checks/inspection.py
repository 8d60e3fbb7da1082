"""What a model's attention layers ask of a kernel, seen without its weights: for `ring-hf doctor`.

The model is built on torch's meta device from its configuration, judged by the rules that training would judge it by,
and run once on a few tokens that do not exist, with an attention function that only notes what it is asked for. Where
a model cannot run without data, the usual names of its configuration are read instead.
"""

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..attention import backend
from .argument_rules import first_error
from .model_rules import MODEL_RULES, text_config

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
class ModelInspection:
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


def load_config(keys: Mapping[str, Any], source: str) -> Any:
    """The configuration with the keys of a `config.json`, read at `source`.

    Raises:
        ValueError: if Transformers does not know the architecture, or cannot read a key.
    """
    try:
        return AutoConfig.for_model(**keys)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{source} is no configuration that Transformers can read ({error}).") from error


def inspect_model(name: str, config: Any, attention: str) -> ModelInspection:
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
        return ModelInspection(name, config.model_type, f"Transformers cannot build it: {said}", (), False)
    refused = first_error(MODEL_RULES, model)
    counted = _probe(model)
    if counted is None:
        counted = _configured(text_config(model))
        return ModelInspection(name, config.model_type, refused, counted, False)
    return ModelInspection(name, config.model_type, refused, counted, True)


def _probe(model: PreTrainedModel) -> tuple[tuple[AttentionKind, int], ...] | None:
    seen: Counter[AttentionKind] = Counter()

    def attention(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> tuple[Any, None]:
        window = kwargs.get("sliding_window") or backend.layer_window(module)
        heads = query.shape[1], key.shape[1], query.shape[-1], value.shape[-1]
        sinks = kwargs.get("s_aux") is not None
        seen[AttentionKind(*heads, window, backend.layer_chunk(module), kwargs.get("softcap") or None, sinks)] += 1
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
