"""Model and tokenizer of a run, from its arguments."""

from typing import Any

from arguments import ModelArguments
from transformers import AutoConfig, AutoModelForCausalLM

from ring_hf.data import add_vision_vocabulary, byte_level
from ring_hf.hf.pretrained import load_pretrained


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
        ValueError: if the model has no RoPE, or several.
    """
    if args.rope_theta is not None or args.rope_parameters is not None:
        current = getattr(config, "rope_parameters", None)
        if not current:
            raise ValueError(
                f"rope_theta={args.rope_theta}, rope_parameters={args.rope_parameters}: a {config.model_type} "
                "configuration has no RoPE to set. Leave both out."
            )
        if args.rope_theta is not None and "rope_theta" not in current:
            raise ValueError(
                f"rope_theta={args.rope_theta}: {config.model_type} has one RoPE per layer type "
                f"({', '.join(current)}). "
                "Set rope_parameters with all of them."
            )
        config.rope_parameters = args.rope_parameters or {**current, "rope_theta": args.rope_theta}
        config.standardize_rope_params()
        config.validate_rope()
    if getattr(config, "max_position_embeddings", max_length) < max_length:
        config.max_position_embeddings = max_length
