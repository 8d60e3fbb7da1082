"""Documents to token ids, one row per document, cached on disk by `datasets`."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset


def tokenize_documents(documents: Dataset, tokenizer: Callable[..., Any], num_proc: int | None = None) -> Dataset:
    """Tokenise the column `text` into `input_ids`, with a progress bar.

    Special tokens are those the tokenizer adds by itself; the end-of-text token, if it has one, closes every document.

    Args:
        documents (`Dataset`): the result of `load_documents`.
        tokenizer: a Transformers tokenizer, or anything that is called the same way and has `eos_token_id`.
        num_proc (`int`, *optional*): worker processes.

    Returns:
        The single column `input_ids`, a list of ids for each document.
    """
    return documents.map(
        _tokenize,
        batched=True,
        batch_size=64,  # documents may be books
        remove_columns=documents.column_names,
        fn_kwargs={"tokenizer": tokenizer},
        num_proc=num_proc,
        desc="Tokenising documents",
    )


def _tokenize(batch: dict[str, list[str]], tokenizer: Any) -> dict[str, list[list[int]]]:
    rows = tokenizer(batch["text"], return_attention_mask=False, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    return {"input_ids": [row if end is None or row[-1:] == [end] else [*row, end] for row in rows]}
