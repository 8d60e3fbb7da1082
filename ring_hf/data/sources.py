"""Sources of documents: files, a dataset of the hub, or the text that every Python installation contains.

A source is one string. `builtin` is the standard library's own modules and the language reference
(`pydoc_data.topics`): about ten megabytes of real documents, hundreds of them longer than 16,000 characters, on every
machine. A path, a folder or a glob is read by the file names' endings. Anything else is the name of a dataset on the
hub.
"""

import codecs
import glob
import importlib
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from .bad_rows import BAD_ROW_FEATURES, GOOD, check_errors, drop_bad_rows, logger
from .files import NO_TEXT, RowColumns, ending_of, excerpt, no_such_column, read_rows

BUILTIN = "builtin"
# Of rows of nothing but text, and of others as JSON; a thousand books may be more than a string column can hold.
_TEXT = {"text": Value("large_string")}
_JSON = {"row": Value("large_string"), "location": Value("string")}
_KINDS = ".txt, .json or .jsonl (also .gz, .bz2, .xz or .zst), or .parquet"
# Packages of the standard library that are not prose of their own: test suites, tables of numbers, vendored copies.
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "ensurepip",
    "site-packages",
    "dist-packages",
    "__pycache__",
}


def load_documents(
    source: str, text_column: str = "text", split: str = "train", encoding: str = "utf-8", errors: str = "raise"
) -> Dataset:
    """Read every document of a source into a dataset with the single column `text`; see `load_rows`."""
    columns = RowColumns() if text_column == "text" else RowColumns(renamed=(("text", text_column),))
    return load_rows(source, columns, split, encoding, errors)


def load_rows(
    source: str,
    columns: RowColumns = RowColumns(),  # noqa: B008  it is frozen
    split: str = "train",
    encoding: str = "utf-8",
    errors: str = "raise",
) -> Dataset:
    """Read every row of a source into a dataset.

    Rows whose text is empty or null are left out, with a warning that counts them.

    Args:
        source (`str`): `builtin`; a file, folder or glob of .txt (one document each), .json, .jsonl (both: a row each;
            all three also compressed, such as .jsonl.gz) or .parquet; or a dataset on the hub, with `:name` behind it
            if it has several configurations.
        columns (`RowColumns`): which ones are read.
        split (`str`): which split of a hub dataset.
        encoding (`str`): of .txt, .json and .jsonl files.
        errors (`str`): `raise` at a row that cannot be read, or `skip` it and count it.

    Returns:
        The single column `text`, for a format of nothing but text. For others, of files: `row`, the columns as JSON,
        and `location`, the file and line; of the hub: the columns themselves, by the names of the format.

    Raises:
        ValueError: if there is nothing to read, or a file or row cannot be read, which it names.
    """
    check_errors(errors)
    files = [] if source == BUILTIN else find_files(source)
    if not files and source != BUILTIN:
        return _hub_rows(source, columns, split)
    function, settings = _reader(source, files, columns, encoding, errors)
    if source == BUILTIN:
        return Dataset.from_generator(function, gen_kwargs=settings)
    features = Features({**(_TEXT if columns.is_text else _JSON), **BAD_ROW_FEATURES})
    try:
        rows = Dataset.from_generator(function, features=features, gen_kwargs=settings)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):  # of `read_rows`, which is more precise
            raise error.__cause__ from None
        raise
    return drop_bad_rows(rows, source)


def stream_rows(
    source: str,
    columns: RowColumns = RowColumns(),  # noqa: B008  it is frozen
    split: str = "train",
    encoding: str = "utf-8",
    errors: str = "raise",
) -> IterableDataset:
    """Return the rows of `load_rows` as a stream, in one shard, with the columns of `BAD_ROW_FEATURES`.

    Rows without text are in the stream, as rows with an error.
    """
    check_errors(errors)
    files = [] if source == BUILTIN else find_files(source)
    if source == BUILTIN or files:
        function, settings = _reader(source, files, columns, encoding, errors)
        return IterableDataset.from_generator(function, gen_kwargs=settings)
    rows = load_hub(source, split, streaming=True)
    return IterableDataset.from_generator(_stream_hub, gen_kwargs={"rows": rows, "columns": columns, "name": source})


def _reader(
    source: str, files: list[str], columns: RowColumns, encoding: str, errors: str
) -> tuple[Callable[..., Iterator[dict[str, Any]]], dict[str, Any]]:
    """Return the function that yields the rows of files or of the built-in text, and its arguments."""
    if source != BUILTIN:
        return read_rows, {**file_settings(files, encoding), "columns": columns, "errors": errors}
    if not columns.is_text:
        raise ValueError(f"data source {BUILTIN!r} is text without the columns {columns.required}. Name another.")
    return builtin_documents, {"python": sys.version}


def _stream_hub(rows: Iterable[dict[str, Any]], columns: RowColumns, name: str) -> Iterator[dict[str, Any]]:
    sources = columns.sources
    for number, row in enumerate(rows, 1):
        if number == 1:
            for column in columns.required:
                if sources[column] not in row:
                    raise ValueError(no_such_column(name, sources[column], list(row), column))
        values = {column: row[key] for column, key in sources.items() if key in row}
        if columns.is_text and not isinstance(values["text"], str | None):
            raise ValueError(
                f"text_column={columns.text_column!r} of {name!r} holds {excerpt(values['text'])} in row {number} and "
                "no text. Set text_column to the column that holds the text, or set format to one that reads these "
                "rows."
            )
        is_empty = columns.is_text and not values["text"]
        yield {**values, **({"error": NO_TEXT, "message": f"{name}, row {number}."} if is_empty else GOOD)}


def file_settings(files: list[str], encoding: str) -> dict[str, Any]:
    """Return the files as `read_rows` takes them, and the encoding.

    Raises:
        ValueError: if Python does not know the encoding.
    """
    try:
        codecs.lookup(encoding)
    except LookupError:
        raise ValueError(
            f"encoding={encoding!r} is unknown to Python. Name one such as utf-8, latin-1 or utf-16."
        ) from None
    stats = [(os.path.abspath(path), os.stat(path)) for path in files]
    return {"files": tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats), "encoding": encoding}


def find_files(source: str) -> list[str]:
    """Return the files of a path, folder or glob, sorted; none if it looks like the name of a hub dataset.

    Raises:
        ValueError: if it is a path and no file can be read there.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _files_in(path)
    files = [file for file in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(file)]
    is_path = path.is_absolute() or glob.has_magic(source) or source.startswith(".") or ending_of(path) is not None
    if not files and is_path:
        raise ValueError(
            f"data source {source!r} names no file that exists (from {os.getcwd()}). Give a file, folder or glob of "
            f"{_KINDS}; the name of a dataset on the hub; or {BUILTIN!r}."
        )
    for file in files:
        if ending_of(file) is None:
            raise ValueError(
                f"data source {source!r} names {file}, whose ending says nothing that can be read here. Give a file, "
                f"folder or glob of {_KINDS}. An archive (.zip, .tar) must be unpacked."
            )
    return files


def _files_in(folder: Path) -> list[str]:
    files = sorted(str(file) for file in folder.rglob("*") if file.is_file())
    readable = [file for file in files if ending_of(file) is not None]
    if not readable:
        endings = Counter("".join(Path(file).suffixes[-2:]) or "no ending" for file in files)
        contents = ", ".join(f"{count} with {ending}" for ending, count in endings.most_common(4)) or "no file at all"
        raise ValueError(
            f"the folder {str(folder)!r} holds nothing that can be read as text: {contents}. Give a file, folder or "
            f"glob of {_KINDS}."
        )
    return readable


def _hub_rows(source: str, columns: RowColumns, split: str) -> Dataset:
    rows = load_hub(source, split)
    names = columns.sources
    for name in columns.required:
        if names[name] not in rows.column_names:
            raise ValueError(no_such_column(source, names[name], rows.column_names, name))
    present = {name: column for name, column in names.items() if column in rows.column_names}
    rows = rows.select_columns(list(present.values()))
    rows = rows.rename_columns({column: name for name, column in present.items() if column != name})
    if not columns.is_text:
        return rows
    kind = rows.features["text"]
    if getattr(kind, "dtype", None) not in ("string", "large_string", "null"):
        raise ValueError(
            f"text_column={columns.text_column!r} of {source!r} holds {kind} and no text. Set text_column to the "
            "column that holds the text, or set format to one that reads these rows."
        )
    return _with_text(rows, source)


def load_hub(source: str, split: str, **options: Any) -> Any:
    """Return a split of a hub dataset, named by `name` or `name:configuration`.

    Raises:
        ValueError: if it cannot be loaded.
    """
    name, _, configuration = source.partition(":")
    try:
        return load_dataset(name, configuration or None, split=split, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data source {source!r} is no file or folder here (in {os.getcwd()}), and cannot be loaded as a dataset "
            f"of the hub: {error}. If files were meant, correct the path; if a dataset, its name, configuration "
            f"(`name:configuration`), split ({split!r}) or the connection."
        ) from error


def _with_text(documents: Dataset, source: str) -> Dataset:
    """Leave out the rows without text."""
    table = documents.with_format("arrow")
    rows: list[int] = []
    for start in range(0, len(documents), 1000):
        texts = table[start : start + 1000]["text"].cast(pa.large_string())  # a column of nulls has no length
        has_text = pc.greater(pc.fill_null(pc.utf8_length(texts), 0), 0)
        rows += [start + row for row, is_text in enumerate(has_text.to_pylist()) if is_text]
    if not rows:
        raise ValueError(f"There is no text in {source!r}: all {len(documents)} rows are empty or null.")
    if len(rows) < len(documents):
        num_empty = len(documents) - len(rows)
        logger.warning("%d of %d rows of %s hold no text and are left out.", num_empty, len(documents), source)
        documents = documents.select(rows)
    return documents


def builtin_documents(python: str) -> Iterator[dict[str, str]]:
    """Yield the standard library's modules, then the topics of the language reference, in alphabetical order.

    Args:
        python (`str`): the Python version, so that `datasets` caches the documents of each version separately.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths: list[Path] = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)  # site-packages may hold tens of thousands of files
        paths += [Path(folder, file) for file in files if file.endswith(".py")]
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            yield {"text": text}
    topics = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield {"text": topics[name]}
