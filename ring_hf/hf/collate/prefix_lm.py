"""Prefix language modelling: the first tokens of an example see each other both ways, the rest is causal.

Examples say so in an integer column `prefix_length`. It is taken off before the inner collator sees them, and becomes
one number per document of the whole batch, which every layer finds in the batch's description. The layout of the idea:
T5's prefix LM (Raffel et al. 2020, arXiv 1910.10683, section 3.2.1), PaliGemma's images and prompts.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..batch_metadata import IGNORE_INDEX
from ..documents import Documents

COLUMN = "prefix_length"


def take_prefixes(features: Sequence[Any]) -> tuple[list[dict[str, Any]], tuple[int, ...]]:
    """The examples without their column, and its values."""
    plain, prefixes = [], []
    for number, feature in enumerate(features):
        if not isinstance(feature, Mapping) or COLUMN not in feature:
            raise ValueError(
                f"Example {number} of the batch has no {COLUMN}, but prefix_lm=True. Give every example that column "
                "(0: causal), and set remove_unused_columns=False in TrainingArguments: the Trainer drops columns "
                "that the model does not take."
            )
        value = feature[COLUMN]
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, bool) or not hasattr(value, "__index__") or value < 0:
            raise ValueError(f"{COLUMN}={value!r} of example {number} must be a whole number of tokens, at least 0.")
        prefixes.append(int(value))
        plain.append({key: part for key, part in feature.items() if key != COLUMN})
    return plain, tuple(prefixes)


def refuse_column(features: Sequence[Any]) -> None:
    """A column that would be overlooked."""
    if any(isinstance(feature, Mapping) and COLUMN in feature for feature in features):
        raise ValueError(
            f"The examples have a column {COLUMN}, which only counts with ContextParallelCollator(..., "
            "prefix_lm=True). Set it, or remove the column."
        )


def prefixes_of_documents(
    prefixes: tuple[int, ...],
    num_rows: int,
    length: int,
    documents: Documents | None,
    num_tokens: tuple[int, ...] | None,
    examples: tuple[int, ...] | None,
) -> Documents:
    """Per row and document of the unpadded batch, from the prefixes of its examples.

    Args:
        examples: boundaries of the examples in the one row that holds them all; None if every row is one example;
            empty if that is not known.
    """
    bounds = documents or ((0, length),) * num_rows
    wanted = ((0, length),) * num_rows if examples is None else (examples,)
    if bounds != wanted:
        found = sum(len(row) - 1 for row in bounds)
        raise ValueError(
            f"{COLUMN} counts from the start of an example, but {len(prefixes)} examples became {found} documents at "
            "other places. Give every example one document, padded or packed by the default collator (packing=True)."
        )
    lengths = num_tokens if examples is None else [b - a for a, b in itertools.pairwise(examples)]
    for number, (prefix, tokens) in enumerate(zip(prefixes, lengths or (length,) * num_rows, strict=True)):
        if prefix > tokens:
            raise ValueError(f"{COLUMN}={prefix} of example {number} is more than its {tokens} tokens.")
    return tuple((prefix,) for prefix in prefixes) if examples is None else (prefixes,)


def targets_inside(shift_labels_BS: torch.Tensor, documents: Documents | None, prefixes: Documents) -> int:
    """Targets that their own prediction can see: labels of prefix tokens."""
    count = 0
    for row, row_prefixes in enumerate(prefixes):
        starts = documents[row] if documents else (0,)
        for start, prefix in zip(starts, row_prefixes, strict=False):
            inside = shift_labels_BS[row, start : start + max(prefix - 1, 0)]
            count += int((inside != IGNORE_INDEX).sum())
    return count
