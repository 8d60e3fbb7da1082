"""Model and tokenizer of a run, from its arguments."""

import os
from pathlib import Path
from typing import Any

from arguments import ModelArguments
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ring_hf.data import build_byte_tokenizer
from ring_hf.data.byte_level import END_OF_TEXT, PADDING

# Files of which a folder holds at least one if it holds a model or a tokenizer.
FILES = {
    "model": ("config.json", "adapter_config.json"),
    "tokenizer": ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
}


def load_tokenizer(args: ModelArguments) -> Any:
    """Return the tokenizer that the arguments name, else the model's; `bytes` is built here.

    Raises:
        ValueError: if a new model has no tokenizer, or none can be loaded.
    """
    name = args.tokenizer or args.model
    if name is None:
        raise ValueError("a new model needs a tokenizer. Set tokenizer to a hub id, a folder, or `bytes`.")
    if name == "bytes":
        return PreTrainedTokenizerFast(
            tokenizer_object=build_byte_tokenizer(), eos_token=END_OF_TEXT, pad_token=PADDING
        )
    revision = args.model_revision if name == args.model else "main"
    return load_pretrained(AutoTokenizer, "tokenizer", name, revision=revision)


def load_pretrained(loader: Any, kind: str, name: str, **options: Any) -> Any:
    """Return `loader.from_pretrained(name)`.

    Raises:
        ValueError: if neither a folder nor the hub provides it; the message covers both.
    """
    folder = Path(name)
    try:
        return loader.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        if not folder.is_dir() and isinstance(error, OSError):
            raise ValueError(
                f"there is no folder {name!r} here (in {os.getcwd()}). If a folder was meant, correct the path. If a "
                f"hub id (`organisation/name`) was meant, its {kind} cannot be loaded: {error}"
            ) from error
        if not folder.is_dir() or any((folder / file).is_file() for file in FILES[kind]):
            raise
        content = ", ".join(sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"the folder {name!r} holds no {kind} ({' or '.join(FILES[kind])}), but {content}. Name the folder that "
            f"save_pretrained or a run wrote{', or set tokenizer' * (kind == 'tokenizer')}."
        ) from error


def load_model(args: ModelArguments, tokenizer: Any, max_length: int) -> Any:
    """Return the model, loaded or built, with its positions set for `max_length` tokens.

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
        return AutoModelForCausalLM.from_config(config, **options)
    options |= {"revision": args.model_revision, "config": config}
    return load_pretrained(AutoModelForCausalLM, "model", args.model, **options)


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
