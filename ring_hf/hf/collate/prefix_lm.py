"""Prefix language modelling: attention is bidirectional inside a prefix of each example and causal after it.

An integer column `prefix_length` gives the tokens of each prefix. It is removed before the inner collator runs, and
becomes one number per document in the batch metadata, which every attention layer gets. For the mask, see T5's prefix
LM (Raffel et al. 2020, arXiv 1910.10683, section 3.2.1) and PaliGemma's images and prompts.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..batch_metadata import IGNORE_INDEX
from ..documents import Documents

PREFIX_COLUMN = "prefix_length"

# By row: the tokens of the prefix of each document; 0: the document is causal.
PrefixLengths = tuple[tuple[int, ...], ...]


def pop_prefix_lengths(features: Sequence[Any]) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    """Return copies of the examples without `PREFIX_COLUMN`, and the values of that column.

    Raises:
        ValueError: if an example has no such column, or its value is not a whole number of at least 0.
    """
    examples, prefix_lengths = [], []
    for index, feature in enumerate(features):
        if not isinstance(feature, Mapping) or PREFIX_COLUMN not in feature:
            raise ValueError(
                f"Example {index} of the batch has no {PREFIX_COLUMN}, but prefix_lm=True. Add the column to every "
                "example (0: causal), and set remove_unused_columns=False in TrainingArguments: the Trainer drops "
                "columns that the model does not take."
            )
        value = feature[PREFIX_COLUMN]
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, bool) or not hasattr(value, "__index__") or value < 0:
            raise ValueError(
                f"{PREFIX_COLUMN}={value!r} of example {index} must be a whole number of tokens, at least 0."
            )
        prefix_lengths.append(int(value))
        examples.append({key: column for key, column in feature.items() if key != PREFIX_COLUMN})
    return examples, tuple(prefix_lengths)


def refuse_prefix_column(features: Sequence[Any]) -> None:
    """Check the examples of a collator that was built without `prefix_lm=True`.

    Raises:
        ValueError: if they have the column `PREFIX_COLUMN`, which would be ignored.
    """
    if any(isinstance(feature, Mapping) and PREFIX_COLUMN in feature for feature in features):
        raise ValueError(
            f"The examples have a column {PREFIX_COLUMN}, which has an effect only with "
            "ContextParallelCollator(..., prefix_lm=True). Set prefix_lm=True, or remove the column."
        )


def prefixes_per_document(
    prefix_lengths: tuple[int, ...],
    num_rows: int,
    length: int,
    documents: Documents | None,
    num_tokens: tuple[int, ...] | None,
    examples: tuple[int, ...] | None,
) -> PrefixLengths:
    """Return the prefix lengths of each row, by document, of the unpadded batch.

    Args:
        prefix_lengths: of the examples, in tokens.
        num_rows: rows of the batch.
        length: tokens of a row.
        documents: boundaries of each row; None if every row is one document.
        num_tokens: real tokens of each row; None without padding.
        examples: boundaries of the examples in the one row that holds them all; None if every row is one example;
            empty if that is not known.

    Raises:
        ValueError: if documents and examples have different boundaries, or a prefix is longer than its example.
    """
    bounds = documents or ((0, length),) * num_rows
    example_bounds = ((0, length),) * num_rows if examples is None else (examples,)
    if bounds != example_bounds:
        num_documents = sum(len(row) - 1 for row in bounds)
        raise ValueError(
            f"{PREFIX_COLUMN} counts from the start of an example, but the {num_documents} documents of the batch do "
            f"not start where its {len(prefix_lengths)} examples do. Make every example one document, padded or "
            "packed by the default collator (packing=True)."
        )
    if examples is not None:
        example_lengths = tuple(end - start for start, end in itertools.pairwise(examples))
    else:
        example_lengths = num_tokens or (length,) * num_rows
    for index, (prefix_length, num_example_tokens) in enumerate(zip(prefix_lengths, example_lengths, strict=True)):
        if prefix_length > num_example_tokens:
            raise ValueError(
                f"{PREFIX_COLUMN}={prefix_length} of example {index} is more than its {num_example_tokens} tokens."
            )
    return tuple((prefix_length,) for prefix_length in prefix_lengths) if examples is None else (prefix_lengths,)


def count_targets_in_prefixes(
    shift_labels_BS: torch.Tensor, documents: Documents | None, prefixes: PrefixLengths
) -> int:
    """Return the number of labels on prefix tokens: the queries that predict them also attend to them.

    Args:
        shift_labels_BS: integers, the label of the next token at every position.
        documents: boundaries of each row; None if every row is one document.
        prefixes: as `prefixes_per_document` returns them.
    """
    count = 0
    for row, prefix_lengths in enumerate(prefixes):
        starts = documents[row] if documents else (0,)
        for start, prefix_length in zip(starts, prefix_lengths, strict=False):
            labels = shift_labels_BS[row, start : start + max(prefix_length - 1, 0)]
            count += int((labels != IGNORE_INDEX).sum())
    return count
