"""Model and tokenizer of a run, from its arguments."""

import logging
from typing import Any

from arguments import ModelArguments, SourceArguments
from datasets import Dataset
from rope import resolve_rope, warn_about_theta
from transformers import AutoConfig, AutoModelForCausalLM

from ring_hf.data import add_vision_vocabulary, byte_level
from ring_hf.data.sequences import load_source, load_splits, tokenize_heldout
from ring_hf.evaluation import evaluation_windows
from ring_hf.hf.pretrained import load_pretrained

logger = logging.getLogger("ring_hf.recipes")


def load_tokenizer(args: ModelArguments) -> Any:
    """Return the tokenizer that the arguments name, else the model's; `bytes` is built here.

    Raises:
        ValueError: if a new model has no tokenizer, or none can be loaded.
    """
    name = args.tokenizer or args.model
    if name is None:
        raise ValueError("a new model needs a tokenizer. Set tokenizer to a hub id, a folder, or `bytes`.")
    return byte_level.load_tokenizer(name, args.model_revision if name == args.model else "main")


def load_model(args: ModelArguments, tokenizer: Any, max_length: int, quantization_config: Any = None) -> Any:
    """Return the model, loaded or built, with its positions set for `max_length` tokens.

    Args:
        args (`ModelArguments`): which one.
        tokenizer: its tokenizer, for the vocabulary of a new model.
        max_length (`int`): tokens of a sequence.
        quantization_config (*optional*): how weights are quantised when they are loaded.

    Raises:
        ValueError: if it cannot be loaded, or its configuration is not one.
    """
    if args.model is not None:
        config = load_pretrained(AutoConfig, "model", args.model, revision=args.model_revision)
    else:
        assert isinstance(args.model_config, dict)
        special = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        sizes = {"vocab_size": len(tokenizer), **special, **args.model_config}
        if "model_type" not in sizes:
            raise ValueError(
                f"model_config={args.model_config} has no model_type. Name the architecture: model_type: llama."
            )
        config = AutoConfig.for_model(**sizes)
    set_positions(config, args, max_length)
    options: dict[str, Any] = {"attn_implementation": args.attn_implementation, "dtype": args.dtype}
    if args.model is None:
        model = AutoModelForCausalLM.from_config(config, **options)
    else:
        if quantization_config is not None:
            options["quantization_config"] = quantization_config
        options |= {"revision": args.model_revision, "config": config}
        model = load_pretrained(AutoModelForCausalLM, "model", args.model, **options)
    if args.vision_vocabulary:
        add_vision_vocabulary(model, tokenizer)
    return model


def set_positions(config: Any, args: ModelArguments, max_length: int) -> None:
    """Set RoPE from the arguments, then the maximum length of the configuration to at least `max_length` tokens.

    The order matters: scaled RoPE (yarn, llama3) takes the earlier maximum as the length it scales from.

    Raises:
        ValueError: if the model has no RoPE, or the arguments do not describe one (see `rope.resolve_rope`).
    """
    assert not isinstance(args.rope_parameters, str)  # parsed by the dataclass
    description = args.rope_parameters or (None if args.rope_theta is None else {"rope_theta": args.rope_theta})
    if description is not None:
        config.rope_parameters = resolve_rope(config, description, max_length)
        config.max_position_embeddings = max(max_length, config.max_position_embeddings)
        config.standardize_rope_params()
        config.validate_rope()
    if getattr(config, "max_position_embeddings", max_length) < max_length:
        config.max_position_embeddings = max_length
    warning = warn_about_theta(getattr(config, "rope_parameters", None) or {}, max_length)
    if warning is not None:
        logger.warning(warning)


def load_windows(args: SourceArguments, tokenizer: Any, lengths: list[int], max_windows: int) -> dict[int, Dataset]:
    """Return held-out windows by context length: the same text, cut as `recipes/perplexity.py` cuts it.

    Raises:
        ValueError: if nothing is held out, a length does not divide the longest, or no document is that long.
    """
    if not lengths:
        return {}
    longest = max(lengths)
    if wrong := [length for length in lengths if length < 2 or longest % length]:
        raise ValueError(f"perplexity_lengths={lengths}: {wrong[0]} must be at least 2 and divide {longest}.")
    if args.holds_nothing_out:
        raise ValueError(
            f"perplexity_lengths={lengths} are measured on held-out documents, and heldout_fraction=0 holds none out. "
            "Hold something out, or name a source as heldout_data."
        )
    has_source = args.heldout_data is not None  # then the training documents are not read
    heldout = [(spec, load_source(spec)) for spec in args.heldout_sources()] if has_source else load_splits(args)[1]
    tokens = tokenize_heldout(heldout, tokenizer)
    assert tokens is not None  # something is held out
    windows_NS = evaluation_windows(tokens["input_ids"], longest, max_windows)
    return {length: Dataset.from_dict({"input_ids": windows_NS.reshape(-1, length).tolist()}) for length in lengths}
