"""What is refused before the first step: models and Trainer settings whose numbers would silently be wrong.

Each rule is a function that returns a message or None. The first table looks at the model, the second at the Trainer's
arguments, the third at its training data loader. `tests/hf/test_refusals.py` holds one case for each of them.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from .names import layout_of

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "attention"}
LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


def text_config(model: PreTrainedModel) -> Any:
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
        f"{type(model).__name__} does not pass its attention through Transformers' attention interface: it accepts "
        "the name of the backend and ignores it, so every rank would attend inside its shard. Use a model that "
        "supports attention backends."
    )


def _layer_types(model: PreTrainedModel) -> str | None:
    config = text_config(model)
    types = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    types |= {kind for kind in (getattr(config, "layers_block_type", None) or ()) if kind != "attention"}
    if not types:
        return None
    return (
        f"{type(model).__name__} has layers of type {', '.join(sorted(types))}. They carry a state along the sequence "
        "or look at its neighbourhood, which sharding breaks. Use a model with attention layers only."
    )


def _not_causal_decoder(model: PreTrainedModel) -> str | None:
    if not getattr(model.config, "is_encoder_decoder", False):
        return None
    return f"{type(model).__name__} is an encoder-decoder; only decoder models can be sharded along the sequence."


def _loss(model: PreTrainedModel) -> str | None:
    loss_type = getattr(model, "loss_type", None)
    known = LOSS_MAPPING.get(loss_type) is ForCausalLMLoss
    # GPT-2 and other old names have no loss type; Transformers gives them the causal loss.
    known = known or (loss_type is None and type(model).__name__.endswith("LMHeadModel"))
    if known and model.loss_function is ForCausalLMLoss:
        return None
    return (
        f"{type(model).__name__} does not use the causal language modelling loss "
        f"(loss_type={getattr(model, 'loss_type', None)!r}), the only one that is known to split over shards. Use a "
        "...ForCausalLM model."
    )


def _forward_takes_kwargs(model: PreTrainedModel) -> str | None:
    parameters = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return (
        f"{type(model).__name__}.forward takes no **kwargs, so shift_labels and the description of the sequence "
        "cannot reach the loss and the attention layers."
    )


def _attention_dropout(model: PreTrainedModel) -> str | None:
    dropout = getattr(text_config(model), "attention_dropout", 0.0) or 0.0
    if dropout == 0:
        return None
    return (
        f"attention_dropout={dropout} would draw another mask on every rank. Set model.config.attention_dropout = 0.0."
    )


def _dropout(model: PreTrainedModel) -> str | None:
    names = [
        f"{name} (p={module.p})"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0
    ]
    if not names:
        return None
    return (
        f"{len(names)} dropout modules are active, for example {names[0]}. Ranks start from one seed, so all shards "
        "would drop the same places, and no run would equal one process. Set the dropout probabilities to 0."
    )


def _rope(model: PreTrainedModel) -> str | None:
    parameters = getattr(text_config(model), "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    types = {value.get("rope_type") for value in nested} & LENGTH_DEPENDENT_ROPE
    if not types:
        return None
    return (
        f"rope_type={types.pop()!r} picks its frequencies by the largest position in the batch, which differs between "
        'shards. Use "linear", "yarn", "llama3" or a larger rope_theta.'
    )


def _router_loss(model: PreTrainedModel) -> str | None:
    if not getattr(text_config(model), "output_router_logits", False):
        return None
    return (
        "output_router_logits=True adds an auxiliary loss over the tokens of one shard, which is not the loss of the "
        "whole sequence. Set model.config.output_router_logits = False."
    )


def _output_attentions(model: PreTrainedModel) -> str | None:
    if not getattr(text_config(model), "output_attentions", False):
        return None
    return "output_attentions=True needs the attention matrix, which ring attention never builds. Set it to False."


MODEL_RULES: tuple[Callable[[PreTrainedModel], str | None], ...] = (
    _not_causal_decoder,
    _attention_interface,
    _backend,
    _layer_types,
    _loss,
    _forward_takes_kwargs,
    _attention_dropout,
    _dropout,
    _rope,
    _router_loss,
    _output_attentions,
)


def _label_smoothing(args: Any) -> str | None:
    if not args.label_smoothing_factor:
        return None
    return (
        f"label_smoothing_factor={args.label_smoothing_factor}: the Trainer's label smoother shifts labels inside "
        "each shard, so every shard loses a target. Set it to 0."
    )


def _average_tokens(args: Any) -> str | None:
    if args.average_tokens_across_devices:
        return None
    return (
        "average_tokens_across_devices=False weighs every shard alike although shards hold different numbers of "
        "targets. Set it to True."
    )


def _sampling(args: Any) -> str | None:
    if args.train_sampling_strategy != "batch_rebalance":
        return None
    return (
        'train_sampling_strategy="batch_rebalance" deals other examples to every process, also to those that share a '
        'sequence. Use "random", "sequential" or "group_by_length".'
    )


def _neftune(args: Any) -> str | None:
    if not args.neftune_noise_alpha:
        return None
    return f"neftune_noise_alpha={args.neftune_noise_alpha} adds noise that depends on the shard. Leave it unset."


def _dispatch(args: Any) -> str | None:
    return DISPATCHED if args.accelerator_config.dispatch_batches else None


def _even_batches(args: Any) -> str | None:
    if args.accelerator_config.even_batches:
        return None
    return (
        "accelerator_config even_batches=False gives replicas different numbers of batches, so some would wait for "
        "ever. Set it to True."
    )


def _gather_objects(args: Any) -> str | None:
    if not args.eval_use_gather_object:
        return None
    return "eval_use_gather_object=True cannot restore whole sequences from shards. Set it to False."


def _batch_metrics_inputs(args: Any) -> str | None:
    if not (args.batch_eval_metrics and "inputs" in args.include_for_metrics):
        return None
    return (
        'include_for_metrics=["inputs"] with batch_eval_metrics=True would hand shards to compute_metrics. Drop one '
        "of them."
    )


def _compile(args: Any) -> str | None:
    if not args.torch_compile:
        return None
    return "torch_compile=True is not proven yet with context parallelism. Set it to False."


def _liger(args: Any) -> str | None:
    if not args.use_liger_kernel:
        return None
    return "use_liger_kernel=True replaces the loss and is not proven yet with context parallelism. Set it to False."


ARGUMENT_RULES: tuple[Callable[[Any], str | None], ...] = (
    _label_smoothing,
    _average_tokens,
    _sampling,
    _neftune,
    _dispatch,
    _even_batches,
    _gather_objects,
    _batch_metrics_inputs,
    _compile,
    _liger,
)

DISPATCHED = (
    "Batches are dispatched from rank 0, so ranks that share a sequence get different rows. "
    'Set accelerator_config={"dispatch_batches": False} in TrainingArguments (Accelerate dispatches iterable datasets '
    "by default)."
)


def check_loader(loader: Any) -> str | None:
    """A loader that would give ranks of one group different rows."""
    return DISPATCHED if isinstance(loader, DataLoaderDispatcher) else None


def first_error(rules: tuple[Callable[[Any], str | None], ...], subject: Any) -> str | None:
    """The message of the first rule that `subject` breaks."""
    for rule in rules:
        message = rule(subject)
        if message is not None:
            return message
    return None
