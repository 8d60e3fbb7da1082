"""Tokenised datasets: the columns every format of rows is turned into, and packing reads.

input_ids       A list of token ids for each document.
labels          Optional, as many: the token itself, or -100 where there is no loss. Not shifted: the model or the
                collator does that. Without the column, or where it is null, the labels are the tokens.
loss_weights    Optional, as many: what the loss of each label counts. Without the column no loss is weighted; where
                it is null, every weight is 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets

LABELS, WEIGHTS = "labels", "loss_weights"
TOKENS = List(Value("int32"))
COLUMNS = {"input_ids": TOKENS, LABELS: TOKENS, WEIGHTS: List(Value("float32"))}


@dataclass(frozen=True)
class TokenRow:
    """The tokens of a document, or of a span of it: `[num_tokens]` each, without the weights if there are none."""

    input_ids: np.ndarray
    labels: np.ndarray
    loss_weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, span: slice) -> "TokenRow":
        weights = None if self.loss_weights is None else self.loss_weights[span]
        return TokenRow(self.input_ids[span], self.labels[span], weights)


def tokenize_documents(documents: Any, tokenizer: Callable[..., Any], num_proc: int | None = None) -> Any:
    """Tokenise the column `text` into `input_ids`, with a progress bar.

    Special tokens are those the tokenizer adds by itself; the end-of-text token, if it has one, closes every document.

    Args:
        documents (`Dataset` or `IterableDataset`): the result of `load_documents`.
        tokenizer: a Transformers tokenizer, or anything that is called the same way and has `eos_token_id`.
        num_proc (`int`, *optional*): worker processes; a stream has none.

    Returns:
        The single column `input_ids`, a list of ids for each document.
    """
    return map_batches(
        documents,
        _tokenize,
        Features({"input_ids": TOKENS}),
        num_proc,
        desc="Tokenising documents",
        fn_kwargs={"tokenizer": tokenizer},
    )


def map_batches(
    rows: Any, function: Callable[..., Any], features: Features, num_proc: int | None, desc: str, **options: Any
) -> Any:
    """Return rows that `function` makes of batches of rows, one of each: a dataset, or a stream of a stream.

    Args:
        rows (`Dataset` or `IterableDataset`): whose columns are replaced; a stream keeps them beside the new ones.
        function: batch of columns -> batch of the columns in `features`.
        options: further arguments of `Dataset.map`.
    """
    options |= {"batched": True, "batch_size": 64}  # documents may be books
    if isinstance(rows, IterableDataset):
        return rows.map(function, **options)
    return rows.map(
        function, remove_columns=rows.column_names, features=features, num_proc=num_proc, desc=desc, **options
    )


def num_tokens(tokens: Dataset) -> list[int]:
    """Return the length of each document, read from the offsets of the Arrow table and not from its tokens."""
    table = tokens.select_columns(["input_ids"]).with_format("arrow")
    lengths = [
        np.asarray(batch["input_ids"].combine_chunks().value_lengths()) for batch in table.iter(batch_size=1024)
    ]
    return np.concatenate(lengths).tolist() if lengths else []


def read_row(tokens: Dataset, document: int) -> TokenRow:
    """Return one document of a tokenised dataset in Arrow format, with the defaults of the columns filled in."""
    table = tokens[document : document + 1]
    values = {
        name: table[name].combine_chunks().flatten().to_numpy().astype(COLUMNS[name].feature.dtype, copy=False)
        for name in table.column_names
        if name in COLUMNS and table[name][0].is_valid
    }
    weights = values.get(WEIGHTS)
    if weights is None and WEIGHTS in table.column_names:
        weights = np.ones(len(values["input_ids"]), np.float32)
    return TokenRow(values["input_ids"], values.get(LABELS, values["input_ids"]), weights)


def concatenate_tokens(datasets: Sequence[Dataset]) -> Dataset:
    """Concatenate tokenised datasets, of which some may lack `labels` or `loss_weights`; their rows are null there."""
    names = [name for name in COLUMNS if any(name in dataset.column_names for dataset in datasets)]
    features = Features({name: COLUMNS[name] for name in names})
    aligned = []
    for dataset in datasets:
        columns = dataset.select_columns([name for name in names if name in dataset.column_names])
        for name in names:
            if name not in columns.column_names:
                columns = columns.add_column(name, [None] * len(columns), feature=COLUMNS[name])
        columns = columns.select_columns(names)
        aligned.append(columns if columns.features == features else columns.cast(features))
    return aligned[0] if len(aligned) == 1 else concatenate_datasets(aligned)


def _tokenize(batch: dict[str, list[str]], tokenizer: Any) -> dict[str, list[list[int]]]:
    rows = tokenizer(batch["text"], return_attention_mask=False, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    return {"input_ids": [row if end is None or row[-1:] == [end] else [*row, end] for row in rows]}
