"""The keys by which a run of `recipes/sft.py` describes its data, translated to those of `DataArguments`.

The recipe has the names of TRL's `SFTConfig`: `packing` is true or false, and the loss on the assistant's or the
completion's tokens alone is a key of the run. In `DataArguments` it is an option of the format of a source.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .run_options import option

_BOOLEANS = {"true": True, "false": False, True: True, False: False}
_PACKINGS = {"bfd": "best_fit", "bfd_split": "best_fit", "wrapped": "stream"}  # by packing_strategy


@dataclass
class ConversationKeys:
    """Keys of the recipe that concern data and have no counterpart in `DataArguments`."""

    recipe: str | None = option(
        None, "finetune or sft, whose keys these are. Default: sft if packing is true or false, or a key below is set."
    )
    packing_strategy: str | None = option(None, "bfd, bfd_split or wrapped; with packing true.")
    assistant_only_loss: bool | None = option(None, "Take the loss of the assistant's tokens only. Default: false.")
    completion_only_loss: bool | None = option(None, "Take no loss of prompts. Default: true.")
    chat_template_path: str | None = option(None, "File of the chat template. Default: the tokenizer's.")


def is_conversation_run(values: Mapping[str, Any]) -> bool:
    """Return whether the values of a run are those of `recipes/sft.py`."""
    if values.get("recipe") is not None:
        return bool(values["recipe"] == "sft")
    keys = {field.name for field in fields(ConversationKeys)} - {"recipe"}
    return values.get("packing") in _BOOLEANS or any(values.get(key) is not None for key in keys)


def as_data_keys(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the values of a run of `recipes/sft.py` with the keys of `DataArguments`, and options of formats.

    Raises:
        ValueError: if `packing` or its strategy is none of TRL's.
    """
    packing, strategy = values.get("packing", False), values.get("packing_strategy") or "bfd"
    if packing not in _BOOLEANS or strategy not in _PACKINGS:
        raise ValueError(
            f"packing={packing!r}, packing_strategy={strategy!r}: recipes/sft.py packs with packing true or false, "
            f"and one of {', '.join(_PACKINGS)}."
        )
    translated = {
        "format": "messages",
        "overlong": "drop",
        **values,
        "packing": _PACKINGS[strategy] if _BOOLEANS[packing] else "separate",
    }
    options = {
        "assistant_only_loss": bool(values.get("assistant_only_loss")),
        "completion_only_loss": values.get("completion_only_loss"),
        "chat_template": values.get("chat_template_path"),
        "max_length": values.get("max_length"),
    }
    return translated, options
