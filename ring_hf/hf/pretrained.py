"""Loading by name, from a folder or the hub, with messages that cover both."""

import os
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

# Files of which a folder holds at least one if it holds a model or a tokenizer.
FILES = {
    "model": ("config.json", "adapter_config.json"),
    "tokenizer": ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
}


def load_pretrained(loader: Any, kind: str, name: str, **options: Any) -> Any:
    """Return `loader.from_pretrained(name)`.

    Args:
        loader: an auto class of Transformers.
        kind: a key of `FILES`.

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


def load_auto_tokenizer(name: str, revision: str = "main") -> Any:
    """Return the tokenizer of a folder or of the hub.

    Raises:
        ValueError: if there is none.
    """
    return load_pretrained(AutoTokenizer, "tokenizer", name, revision=revision)


def wrap_tokenizer(tokenizer: Any, **special_tokens: str) -> Any:
    """Return a tokenizer of the library `tokenizers` as one of Transformers."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)
