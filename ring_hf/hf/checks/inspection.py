"""What the attention layers of a model need from a kernel, without loading its weights: for `ring-hf doctor`.

The model is built from its config on torch's meta device, checked by the rules that training applies, and run once on
a few meta tokens with an attention function that only records its arguments. If a model cannot run on meta tensors,
the usual field names of its config are read instead.
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
_NUM_TOKENS = 8


@dataclass(frozen=True)
class AttentionKind:
    """The arguments that layers of one kind pass to the attention function.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key/value heads.
        head_dim: elements of a query or key of one head.
        v_head_dim: elements of a value of one head.
        window: tokens of a sliding window, the query's own included; None: no window.
        chunk: tokens of an attention chunk; None: no chunks.
        softcap: bound of the scores; None: not bounded.
        sinks: whether each head has an attention sink.
    """

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
    """The properties of a model that matter to context parallelism.

    Attributes:
        error: the message with which training would refuse the model, or None.
        kinds: the kinds of its attention layers, with the number of layers of each.
        is_probed: whether the kinds were recorded in a forward pass; otherwise they were read from the config.
    """

    name: str
    model_type: str
    error: str | None
    kinds: tuple[tuple[AttentionKind, int], ...]
    is_probed: bool


def load_config(keys: Mapping[str, Any], source: str) -> Any:
    """Return the config with the keys of a `config.json` that was read from `source` (a path or repository).

    Raises:
        ValueError: if Transformers does not know the architecture, or rejects a key.
    """
    try:
        return AutoConfig.for_model(**keys)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{source} is not a config that Transformers can read ({error}).") from error


def inspect_model(name: str, config: Any, attention: str) -> ModelInspection:
    """Build the model of a config without weights and inspect its attention.

    Args:
        name: of the model, for the result.
        config: a Transformers config; it is not changed.
        attention: the attention implementation to check the model with, for example "ring_zigzag".
    """
    config = copy.deepcopy(config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.bfloat16)
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # not causal, not this backend, a missing field
        reason = " ".join(str(error).split())
        message = f"Transformers cannot build it: {reason}"
        return ModelInspection(name, config.model_type, message, kinds=(), is_probed=False)
    model_error = first_error(MODEL_RULES, model)
    kinds = _probe(model)
    is_probed = kinds is not None
    if kinds is None:
        kinds = _read_kinds(text_config(model))
    return ModelInspection(name, config.model_type, model_error, kinds, is_probed)


def _probe(model: PreTrainedModel) -> tuple[tuple[AttentionKind, int], ...] | None:
    """Record the arguments of the attention calls of one forward pass; None if the pass fails."""
    counts: Counter[AttentionKind] = Counter()

    def attention(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> tuple[Any, None]:
        kind = AttentionKind(
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_dim=query.shape[-1],
            v_head_dim=value.shape[-1],
            window=kwargs.get("sliding_window") or backend.layer_window(module),
            chunk=backend.layer_chunk(module),
            softcap=kwargs.get("softcap") or None,
            sinks=kwargs.get("s_aux") is not None,
        )
        counts[kind] += 1
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None

    AttentionInterface.register(_PROBE, attention)
    AttentionMaskInterface.register(_PROBE, lambda *args, **kwargs: None)
    try:
        model.set_attn_implementation(_PROBE)
        with torch.no_grad(), torch.device("meta"):
            tokens = torch.zeros(1, _NUM_TOKENS, dtype=torch.long)
            # Without a mask, Transformers would read the positions to detect packed documents.
            model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
        return None  # experts are chosen by values, or the architecture does not support the probe
    return tuple(counts.items()) or None


def _read_kinds(config: Any) -> tuple[tuple[AttentionKind, int], ...]:
    """Read the kinds of attention layers from the usual fields of a config; empty if they are missing."""
    num_heads = getattr(config, "num_attention_heads", None)
    if not isinstance(num_heads, int):
        return ()
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = v_head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    if getattr(config, "kv_lora_rank", None) and getattr(config, "v_head_dim", None):
        # Multi-head latent attention: every head has a key, with and without RoPE.
        num_kv_heads, v_head_dim = num_heads, config.v_head_dim
        head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    layer_types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    kinds = []
    for layer_type, num_layers in Counter(layer_types).items():
        kind = AttentionKind(
            num_heads,
            num_kv_heads,
            head_dim,
            v_head_dim,
            window=config.sliding_window if layer_type == "sliding_attention" else None,
            chunk=getattr(config, "attention_chunk_size", None) if layer_type == "chunked_attention" else None,
            softcap=getattr(config, "attn_logit_softcapping", None),
            sinks=config.model_type == "gpt_oss",
        )
        kinds.append((kind, num_layers))
    return tuple(kinds)
