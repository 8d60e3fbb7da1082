"""Which models can be sharded: rules about architectures, checked before anything is computed.

A model is exact under context parallelism if tokens interact only in attention that is called through Transformers'
interface, if everything else depends on one token and its `position_ids`, and if nothing is random. Each rule is named
after the property it checks and returns an error message, or None. `REFUSED_TYPES` lists model types that break these
conditions in a way that neither config nor modules show. `ring_hf/verify/model_families.py` holds the verdict on every
family of Transformers; those called exact are compared with one process.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ring_hf.memory.chunked_loss import stock_of
from ring_hf.memory.token_wise import values_above_zero

from ..attention.shard_errors import OUTPUT_ATTENTIONS
from ..attn_names import layout_of
from .moe_aux_loss import check_aux_loss

Rule = Callable[[PreTrainedModel], str | None]

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
# Why other types of layers are refused; types in neither table get the reason in `STATEFUL`.
OTHER_LAYERS = {
    "conv": "look at neighbouring tokens, which may be on another rank",
    "indexed_attention": "choose the keys of a query by an index over the whole sequence",
    "deepseek_sparse_attention": "choose the keys of a query by an index over the whole sequence",
    "compressed_sparse_attention": "attend to summaries of the whole sequence",
    "heavily_compressed_attention": "attend to summaries of the whole sequence",
}
STATEFUL = "carry a state along the sequence or look at neighbouring tokens"
REFUSED_TYPES = {
    "doge": "makes its attention mask from the values of all tokens",
    "gemma4_unified": "joins the tokens of images in its attention mask, even if there are none",
    "gemma4_assistant": "predicts from hidden states of another model",
    "gemma4_unified_assistant": "predicts from hidden states of another model",
    "mllama_text_model": "attends to images in layers that text without images skips",
    "nemotron": "does not pass keyword arguments to its attention layers, so the batch metadata cannot reach them",
    "phimoe": "samples experts at random in training, so no run would equal one process",
}


def text_config(model: PreTrainedModel) -> Any:
    """Return the config of the language model, also of a multimodal model."""
    return model.config.get_text_config()


def _backend(model: PreTrainedModel) -> str | None:
    try:
        layout_of(model.config)
    except ValueError as error:
        return str(error)
    return None


def _attention_interface(model: PreTrainedModel) -> str | None:
    if model._supports_attention_backend:
        return None
    return (
        f"{type(model).__name__} does not call its attention through Transformers' attention interface: it accepts "
        "attn_implementation and ignores it, so every rank would attend within its own shard. Use a model that "
        "supports attention backends."
    )


def _layer_types(model: PreTrainedModel) -> str | None:
    config = text_config(model)
    types: set[str] = set()
    for name in ("layer_types", "layers_block_type"):
        types |= set(getattr(config, name, None) or ()) - ATTENTION_LAYERS
    if not types:
        return None
    reasons = {OTHER_LAYERS.get(layer_type, STATEFUL) for layer_type in types}
    return (
        f"{type(model).__name__} has layers of type {', '.join(sorted(types))}. They {' and '.join(sorted(reasons))}. "
        "Use a model with attention layers only."
    )


def _refused_type(model: PreTrainedModel) -> str | None:
    reason = REFUSED_TYPES.get(model.config.model_type) or REFUSED_TYPES.get(text_config(model).model_type)
    return None if reason is None else f"{type(model).__name__} {reason}. Use another model."


def _convolution(model: PreTrainedModel) -> str | None:
    """Check the decoder only: image and audio encoders get no input here."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for name, module in (decoder or model).named_modules():
        if isinstance(module, torch.nn.Conv1d) and module.kernel_size[0] > 1:
            return (
                f"{type(model).__name__} has convolutions ({name}), which look at neighbouring tokens that may be "
                "on another rank. Use a model with attention layers only."
            )
    return None


def _internal_positions(model: PreTrainedModel) -> str | None:
    if not any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules()):
        return None
    return (
        f"{type(model).__name__} computes position ids itself, from its padding_idx + 1, instead of taking the "
        "position_ids of the batch. Use another model."
    )


def _encoder_decoder(model: PreTrainedModel) -> str | None:
    if not getattr(model.config, "is_encoder_decoder", False):
        return None
    return f"{type(model).__name__} is an encoder-decoder, which cannot be sharded. Use a decoder-only model."


def _loss_type(model: PreTrainedModel) -> str | None:
    loss_type = getattr(model, "loss_type", None)
    is_causal_loss = LOSS_MAPPING.get(loss_type) is ForCausalLMLoss
    if loss_type is None and type(model).__name__.endswith("LMHeadModel"):
        is_causal_loss = True  # GPT-2 and other old names have no loss type; Transformers gives them the causal loss
    if is_causal_loss and stock_of(model.loss_function) is ForCausalLMLoss:
        return None
    return (
        f"{type(model).__name__} does not use the causal language modelling loss (loss_type={loss_type!r}), the only "
        "loss that is exact over shards. Use a ...ForCausalLM model."
    )


def _forward_kwargs(model: PreTrainedModel) -> str | None:
    parameters = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return (
        f"{type(model).__name__}.forward takes no **kwargs, so shift_labels and the batch metadata cannot reach the "
        "loss and the attention layers. Add **kwargs to forward and pass them on."
    )


def _attention_dropout(model: PreTrainedModel) -> str | None:
    dropout = getattr(text_config(model), "attention_dropout", 0.0) or 0.0
    if dropout == 0:
        return None
    return (
        f"attention_dropout={dropout} would draw a different mask on every rank. Set "
        "model.config.attention_dropout = 0.0 before the model is built (from_pretrained takes it as an argument)."
    )


def _dropout(model: PreTrainedModel) -> str | None:
    names = list(values_above_zero(model, "drop"))
    if not names:
        return None
    return (
        f"{len(names)} dropout modules are active, for example {names[0]}. Ranks start from the same seed, so all "
        "shards would get the same dropout mask, and no run would equal one process. Set the dropout probabilities "
        "to 0."
    )


def _jitter(model: PreTrainedModel) -> str | None:
    names = list(values_above_zero(model, "jitter"))
    if not names:
        return None
    return (
        f"Random noise on the router is active ({names[0]}), and every rank would draw its own. Set the model's "
        "jitter noise to 0."
    )


def _rope(model: PreTrainedModel) -> str | None:
    parameters = getattr(text_config(model), "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    types = {value.get("rope_type") for value in nested if _depends_on_length(value)}
    if not types:
        return None
    return (
        f"rope_type={types.pop()!r} chooses its frequencies by the largest position of a shard, which differs between "
        'ranks. Use "linear", "yarn", "llama3", a larger rope_theta, or "longrope" with short_factor equal to '
        "long_factor."
    )


def _depends_on_length(parameters: dict[str, Any]) -> bool:
    """Return whether the frequencies of a RoPE depend on the positions of a batch.

    LongRoPE takes one of two lists of factors by the largest position. If the lists are equal, nothing is chosen.
    """
    kind = parameters.get("rope_type")
    return kind == "dynamic" or (
        kind == "longrope" and parameters.get("short_factor") != parameters.get("long_factor")
    )


def _output_attentions(model: PreTrainedModel) -> str | None:
    if not getattr(text_config(model), "output_attentions", False):
        return None
    return OUTPUT_ATTENTIONS


MODEL_RULES: tuple[Rule, ...] = (
    _encoder_decoder,
    _layer_types,
    _attention_interface,
    _backend,
    _refused_type,
    _convolution,
    _internal_positions,
    _loss_type,
    _forward_kwargs,
    _attention_dropout,
    _dropout,
    _jitter,
    _rope,
    check_aux_loss,
    _output_attentions,
)
# What concerns losses and training does not matter to a model that generates.
_TRAINING_RULES = {_loss_type, _attention_dropout, _dropout, _jitter, check_aux_loss, _output_attentions}
GENERATION_RULES = tuple(rule for rule in MODEL_RULES if rule not in _TRAINING_RULES)
