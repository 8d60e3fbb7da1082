"""Rows that are tokens already: checked against the vocabulary, row by row, and passed on."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .bad_rows import RowError
from .files import excerpt

_IGNORED = -100


def check_tokens(row: Mapping[str, Any], tokenizer: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a row of token ids.

    Args:
        row: `input_ids`, and optionally `labels` and `loss_weights` of the same length.
        tokenizer: its number of tokens is the vocabulary, unless
        options: have a `vocab_size`, of a model whose embedding is larger.

    Raises:
        RowError: if a value is no token of the vocabulary, no label or no weight.
    """
    vocab_size = len(tokenizer) if options.get("vocab_size") is None else int(options["vocab_size"])
    input_ids = _integers("input_ids", row["input_ids"])
    if len(input_ids) == 0:
        raise RowError("without tokens", "'input_ids' is empty. Remove the row.")
    columns: dict[str, Any] = {"input_ids": _in_vocabulary("input_ids", input_ids, vocab_size)}
    if row.get("labels") is not None:
        labels = _same_length("labels", _integers("labels", row["labels"]), input_ids)
        _in_vocabulary("labels", labels[labels != _IGNORED], vocab_size)
        columns["labels"] = labels
    if row.get("loss_weights") is not None:
        weights = _same_length("loss_weights", _numbers(row["loss_weights"]), input_ids)
        bad = np.flatnonzero(~np.isfinite(weights) | (weights < 0))
        if len(bad):
            raise RowError(
                "bad loss weight",
                f"'loss_weights' holds {weights[bad[0]]} at {bad[0]}. A weight is a number from 0 on.",
            )
        columns["loss_weights"] = weights
    return columns


def _integers(name: str, values: Any) -> np.ndarray:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise RowError("wrong type", f"{name!r} holds {excerpt(values)} and no list of integers. Write token ids.")
    return np.array(values, dtype=np.int64)


def _numbers(values: Any) -> np.ndarray:
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise RowError("wrong type", f"'loss_weights' holds {excerpt(values)} and no list of numbers.")
    if any(isinstance(value, float) and math.isnan(value) for value in values):
        raise RowError("bad loss weight", "'loss_weights' holds NaN. A weight is a number from 0 on.")
    return np.array(values, dtype=np.float32)


def _same_length(name: str, values: np.ndarray, input_ids: np.ndarray) -> np.ndarray:
    if len(values) != len(input_ids):
        raise RowError(
            "other length", f"{name!r} has {len(values)} values for {len(input_ids)} input_ids. Write one for each."
        )
    return values


def _in_vocabulary(name: str, values: np.ndarray, vocab_size: int) -> np.ndarray:
    outside = values[(values < 0) | (values >= vocab_size)]
    if len(outside):
        raise RowError(
            "outside the vocabulary",
            f"{name!r} holds {outside[0]}, but the vocabulary has {vocab_size:,} tokens. Tokenise the row with the "
            "tokenizer of this run, or set options: {vocab_size: ...} to that of the model.",
        )
    return values
