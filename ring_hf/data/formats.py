"""Formats of rows: what a source holds, and the function that turns its rows into a tokenised dataset.

A tokenised dataset has the columns of `tokens.py`: `input_ids`, and where the format knows them `labels` and
`loss_weights`. Everything after that, from mixing to packing, is the same for all formats.

To add a format, write a function of one row and put it into a `Format`:

    def tokenize_note(row, tokenizer, options):             # the row's columns, as Python objects
        if not isinstance(row["note"], str):
            raise RowError("wrong type", f"'note' holds {excerpt(row['note'])}. Write it as text.")
        return {"input_ids": tokenizer(row["note"])["input_ids"]}

    FORMATS["note"] = Format(columns=("note",), tokenize=each_row(tokenize_note))
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, Features

from .bad_rows import BAD_ROW_FEATURES, GOOD, RowError, bad_row, drop_bad_rows
from .conversations import (
    COMPLETION_OPTIONS,
    CONVERSATION_OPTIONS,
    TOOLS,
    tokenize_completion,
    tokenize_conversation,
)
from .document_qa import DOCUMENT_QA_COLUMNS, DOCUMENT_QA_OPTIONS, tokenize_document_qa
from .files import RowColumns
from .pretokenized import check_tokens
from .source_spec import SourceSpec, explain_keys
from .tokens import COLUMNS, map_batches, tokenize_documents
from .vision_codes import VISION_OPTIONS, tokenize_vision_codes

RowFunction = Callable[[dict[str, Any], Any, Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class FormatSettings:
    """How the rows of one source are tokenised.

    Args:
        source: its name, for messages.
        errors: `raise` at a row that cannot be used, or `skip` it and count it.
        num_proc: worker processes.
        options: those of the format, with its defaults filled in.
    """

    source: str = "the source"
    errors: str = "raise"
    num_proc: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """A kind of rows.

    Args:
        columns: names that every row needs.
        tokenize: (rows, tokenizer, settings) -> tokenised dataset. The rows are the result of `load_rows`; or of
            `stream_rows`, of which it makes a stream whose bad rows have an `error` and a `message`.
        optional: names that a row may have.
        options: the keys of a source's `options` that the format reads, with their defaults.
        joins_rows: whether a document is made of several rows, which must not be held out one by one or streamed.
    """

    columns: tuple[str, ...]
    tokenize: Callable[[Any, Any, FormatSettings], Any]
    optional: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    joins_rows: bool = False

    def row_columns(self, renamed: Mapping[str, str]) -> RowColumns:
        """Return what is read of a source in which some columns have other names.

        Raises:
            ValueError: if the format has no column of that name.
        """
        if unknown := sorted(set(renamed) - {*self.columns, *self.optional}):
            raise ValueError(
                f"columns renames {unknown}, which the format does not read. It reads "
                f"{', '.join((*self.columns, *self.optional))}."
            )
        return RowColumns(self.columns, self.optional, tuple(sorted(renamed.items())))


def with_options(spec: SourceSpec, options: Mapping[str, Any]) -> SourceSpec:
    """Return a source with options of the run, where its format has them and the source does not set them."""
    known = find_format(spec.format).options
    defaults = {name: value for name, value in options.items() if name in known and value is not None}
    return dataclasses.replace(spec, options={**defaults, **spec.options})


def tokenize_source(rows: Any, tokenizer: Any, format_name: str, settings: FormatSettings) -> Any:
    """Tokenise the rows of a source by its format.

    Args:
        rows (`Dataset` or `IterableDataset`): the result of `load_rows` or `stream_rows`.
        tokenizer: a Transformers tokenizer.
        format_name (`str`): a key of `FORMATS`.
        settings (`FormatSettings`): options that are left out take the format's defaults.

    Raises:
        ValueError: if there is no such format or option, or a row cannot be used.
    """
    row_format = find_format(format_name)
    check_options(format_name, settings.options)
    options = {**row_format.options, **settings.options}
    return row_format.tokenize(rows, tokenizer, dataclasses.replace(settings, options=options))


def find_format(name: str) -> Format:
    """Return the format of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in FORMATS:
        raise ValueError(f"format unknown: {explain_keys([name], FORMATS)}. Choose one of {', '.join(FORMATS)}.")
    return FORMATS[name]


def check_options(format_name: str, options: Mapping[str, Any]) -> None:
    """Raise `ValueError` if a format does not read one of these options."""
    known = find_format(format_name).options
    if unknown := [name for name in options if name not in known]:
        raise ValueError(
            f"unknown in options of format {format_name!r}: {explain_keys(unknown, known)}. It has "
            f"{', '.join(known) or 'none'}."
        )


def each_row(function: RowFunction) -> Callable[[Any, Any, FormatSettings], Any]:
    """Return the `tokenize` of a format that treats every row by itself.

    Args:
        function: (row, tokenizer, options) -> `input_ids` and optionally `labels` and `loss_weights`. It raises
            `RowError` for a row that cannot be used; the file and line are added here.
    """

    def tokenize(rows: Any, tokenizer: Any, settings: FormatSettings) -> Any:
        tokens = map_batches(
            rows,
            _apply,
            Features({**COLUMNS, **BAD_ROW_FEATURES}),
            settings.num_proc,
            desc="Tokenising rows",
            with_indices=True,
            fn_kwargs={"function": function, "tokenizer": tokenizer, "settings": settings},
        )
        if not isinstance(rows, Dataset):
            return tokens
        return _drop_null_columns(drop_bad_rows(tokens, settings.source))

    return tokenize


def _apply(
    batch: dict[str, list[Any]],
    indices: list[int],
    function: RowFunction,
    tokenizer: Any,
    settings: FormatSettings,
) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [] for name in (*COLUMNS, *BAD_ROW_FEATURES)}
    for i, index in enumerate(indices):
        row = {name: values[i] for name, values in batch.items()}
        location = f"{settings.source}, row {index + 1}"
        if "location" in row:  # of files
            row, location = json.loads(row["row"]), row["location"]
        try:
            result = {**function(row, tokenizer, settings.options), **GOOD}
        except RowError as error:
            result = bad_row(error, location, settings.errors)
        for name, values in columns.items():
            values.append(result.get(name))
    return columns


def _drop_null_columns(tokens: Dataset) -> Dataset:
    """Remove the optional columns that no row has."""
    table = tokens.with_format("arrow")
    for name in COLUMNS:
        batches = table.select_columns([name]).iter(batch_size=1024)
        if name != "input_ids" and all(batch[name].null_count == len(batch) for batch in batches):
            tokens = tokens.remove_columns(name)
    return tokens


def _tokenize_text(rows: Any, tokenizer: Any, settings: FormatSettings) -> Any:
    return tokenize_documents(rows, tokenizer, settings.num_proc)


FORMATS: dict[str, Format] = {
    "text": Format(columns=("text",), tokenize=_tokenize_text),
    "tokens": Format(
        columns=("input_ids",),
        optional=("labels", "loss_weights"),
        tokenize=each_row(check_tokens),
        options={"vocab_size": None},
    ),
    "messages": Format(
        columns=("messages",),
        optional=TOOLS,
        tokenize=each_row(tokenize_conversation),
        options=CONVERSATION_OPTIONS,
    ),
    "prompt_completion": Format(
        columns=("prompt", "completion"),
        optional=TOOLS,
        tokenize=each_row(tokenize_completion),
        options=COMPLETION_OPTIONS,
    ),
    "document_qa": Format(
        columns=DOCUMENT_QA_COLUMNS, tokenize=tokenize_document_qa, options=DOCUMENT_QA_OPTIONS, joins_rows=True
    ),
    "vision_codes": Format(columns=("content",), tokenize=each_row(tokenize_vision_codes), options=VISION_OPTIONS),
}
