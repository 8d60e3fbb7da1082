"""Conversations to tokens: rows of `messages`, or of a prompt and its completion, with labels where there is a loss.

The rows are those of TRL and the hub. A message is `{"role": ..., "content": ...}`, of an assistant also with
`tool_calls`; `tools` lists the functions that the template describes, as objects or as their JSON. The tokens and
labels are those that TRL's SFTTrainer computes of the same rows: the chat template of the tokenizer writes the text,
and its `{% generation %}` marks say which tokens are the assistant's.
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .bad_rows import RowError
from .files import excerpt

logger = logging.getLogger("ring_hf")

_IGNORED = -100
CONVERSATION_OPTIONS = {"assistant_only_loss": True, "chat_template": None}
COMPLETION_OPTIONS = {"completion_only_loss": True, "chat_template": None}
TOOLS = ("tools", "chat_template_kwargs")  # optional columns of both formats
_warned: set[str] = set()


def tokenize_conversation(row: Mapping[str, Any], tokenizer: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `input_ids` and `labels` of a conversation.

    Args:
        row: `messages`, and optionally `tools` and `chat_template_kwargs` (arguments of the template).
        tokenizer: a Transformers tokenizer.
        options: `assistant_only_loss`, take the loss of the assistant's tokens only; `chat_template`, instead of the
            tokenizer's: its text, or a file that ends with .jinja or .j2.

    Raises:
        ValueError: if the tokenizer has no chat template, or one without the marks that `assistant_only_loss` needs.
        RowError: if the row is no conversation, or no token of it has a loss.
    """
    template = find_template(tokenizer, options.get("chat_template"))
    only = bool(options.get("assistant_only_loss", True))
    if only:
        check_generation_marks(template)
    messages = _messages("messages", row.get("messages"))
    result = _render(row, messages, tokenizer, template, return_assistant_tokens_mask=only)
    input_ids = list(result["input_ids"])
    mask = result["assistant_masks"] if only else [1] * len(input_ids)
    return _with_labels(input_ids, mask, "assistant")


def tokenize_completion(row: Mapping[str, Any], tokenizer: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `input_ids` and `labels` of a prompt and its completion, both texts or both lists of messages.

    The end-of-text token, if the tokenizer has one, closes a completion that is text. The completion begins where the
    tokens of the prompt alone and of both together differ.

    Args:
        row: `prompt`, `completion`, and for messages optionally `tools` and `chat_template_kwargs`.
        tokenizer: a Transformers tokenizer.
        options: `completion_only_loss`, take no loss of the prompt; `chat_template` as for conversations.

    Raises:
        ValueError: if messages have no chat template.
        RowError: if the row holds something else, or no token of it has a loss.
    """
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        end = tokenizer.eos_token or ""
        completion = completion if completion.endswith(end) else completion + end
        prompt_ids = list(tokenizer(prompt)["input_ids"])
        input_ids = list(tokenizer(prompt + completion)["input_ids"])
    elif isinstance(prompt, list) and isinstance(completion, list):
        template = find_template(tokenizer, options.get("chat_template"))
        prompt, completion = _messages("prompt", prompt), _messages("completion", completion)
        prompt_ids = list(_render(row, prompt, tokenizer, template, add_generation_prompt=True)["input_ids"])
        input_ids = list(_render(row, prompt + completion, tokenizer, template)["input_ids"])
    else:
        raise RowError(
            "wrong type",
            f"'prompt' holds {excerpt(prompt)} and 'completion' {excerpt(completion)}. Write both as text, or both as "
            "lists of messages.",
        )
    pairs = zip(prompt_ids, input_ids, strict=False)
    num_common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(prompt_ids), len(input_ids)))
    if num_common < len(prompt_ids):
        _warn_of_divergence(tokenizer.decode(prompt_ids[num_common:]))
    is_masked = bool(options.get("completion_only_loss", True))
    mask = [int(i >= num_common or not is_masked) for i in range(len(input_ids))]
    return _with_labels(input_ids, mask, "completion")


def find_template(tokenizer: Any, chat_template: str | None = None) -> str:
    """Return the text of the chat template that is used.

    Args:
        tokenizer: its `chat_template` is the default; of several, the one named `default`.
        chat_template: the text of another, or a file that ends with .jinja or .j2.

    Raises:
        ValueError: if there is none.
    """
    template = tokenizer.chat_template if chat_template is None else chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    if not template:
        raise ValueError(
            "The tokenizer has no chat template, so messages cannot be written as text. Use the tokenizer of a chat "
            "model, or set chat_template to a .jinja file."
        )
    if template.endswith((".jinja", ".j2")):
        if not Path(template).is_file():
            raise ValueError(f"chat_template={template!r} is no file that exists. Correct the path.")
        return Path(template).read_text(encoding="utf-8")
    return template


def has_generation_marks(template: str) -> bool:
    """Return whether a chat template marks the tokens of the assistant."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def check_generation_marks(template: str) -> None:
    """Raise `ValueError` if a chat template does not say which tokens are the assistant's."""
    if not has_generation_marks(template):
        raise ValueError(
            "assistant_only_loss=True, but the chat template has no {% generation %} marks, so nothing says which "
            "tokens are the assistant's. Put {% generation %} before and {% endgeneration %} behind what the "
            "assistant writes (the end of its turn included) and set chat_template to that file, or set "
            "assistant_only_loss=False to train on all tokens."
        )


def _messages(name: str, value: Any) -> list[dict[str, Any]]:
    """Return the messages without their null values, which columnar files add to every message."""
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise RowError(
            "no conversation",
            f"{name!r} holds {excerpt(value)} and no list of messages. Write each as "
            '{"role": "user", "content": "..."}.',
        )
    messages = [_without_nulls(message) for message in value]
    for number, message in enumerate(messages, 1):
        if not isinstance(message.get("role"), str):
            raise RowError(
                "no conversation",
                f"message {number} of {name!r} has no role, only {sorted(message)}. Write each as "
                '{"role": "user", "content": "..."}.',
            )
        if "content" not in message and "tool_calls" not in message:
            raise RowError("no conversation", f"message {number} of {name!r} has neither content nor tool_calls.")
    return messages


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _render(
    row: Mapping[str, Any], messages: list[dict[str, Any]], tokenizer: Any, template: str, **options: Any
) -> Mapping[str, Any]:
    tools = row.get("tools")
    arguments = row.get("chat_template_kwargs") or {}
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
        return tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=True,
            return_dict=True,
            tools=_without_nulls(tools) or None,
            **options,
            **_without_nulls(arguments),
        )
    except Exception as error:  # a template may raise anything: a jinja error, a TypeError of a filter
        raise RowError(
            "refused by the template", f"the chat template refuses the row: {type(error).__name__}: {error}"
        ) from error


def _with_labels(input_ids: list[int], mask: list[int], whose: str) -> dict[str, Any]:
    if not any(mask[1:]):  # no token predicts the first
        raise RowError("without a loss", f"none of its {len(input_ids)} tokens is the {whose}'s. Remove the row.")
    labels = [token if is_counted else _IGNORED for token, is_counted in zip(input_ids, mask, strict=True)]
    return {"input_ids": input_ids, "labels": labels}


def _warn_of_divergence(rest: str) -> None:
    """Log once in each process; most rows of a source are alike."""
    if not _warned:
        logger.warning(
            "The tokens of a prompt do not begin those of prompt and completion: %r is left out of the sequence, "
            "which the model would see when it generates. End prompts at a boundary of tokens, or use a template that "
            "writes both alike. Other rows may be the same.",
            rest,
        )
    _warned.add(rest)
