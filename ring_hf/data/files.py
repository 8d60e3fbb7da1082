"""Rows of files: a .txt is one row, a .json, .jsonl or .parquet has many.

All but .parquet may be compressed. Only the columns of the format are read, so that others may hold anything. A row
that cannot be read is refused with the file, the row and the cause, or left out and counted (`errors="skip"`). Rows
whose text is empty or null are left out in any case.
"""

import bz2
import codecs
import gzip
import importlib
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from .bad_rows import GOOD, RowError, bad_row


@dataclass(frozen=True)
class RowColumns:
    """The columns that a format reads.

    Args:
        required: names that every row needs.
        optional: names that a row may have.
        renamed: (name of the format, name in the source), where they differ.
    """

    required: tuple[str, ...] = ("text",)
    optional: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()

    @property
    def is_text(self) -> bool:
        """Whether rows are nothing but texts."""
        return self.required == ("text",) and not self.optional

    @property
    def sources(self) -> dict[str, str]:
        """The name in the source by the name of the format."""
        names = (*self.required, *self.optional)
        return dict(zip(names, names, strict=True)) | dict(self.renamed)

    @property
    def text_column(self) -> str:
        return self.sources["text"]


Row = tuple[str, dict[str, Any] | RowError]  # its location ("line 3") and its columns, or why there are none


def _open_zstandard(path: str) -> IO[bytes]:
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError:
        raise ValueError(
            f"{path} is compressed by Zstandard, which the package zstandard reads. Install it, or unpack the file."
        ) from None
    return zstandard.open(path, "rb")


# Ending of the file name -> function that opens the file for reading.
COMPRESSIONS: dict[str, Callable[[str], Any]] = {
    "": lambda path: open(path, "rb"),  # noqa: SIM115  the caller closes it
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}


def ending_of(path: str | Path) -> str | None:
    """Return the ending that decides how a file is read, such as `.jsonl.gz`, or None if it is unknown."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    return next((ending for ending in ("".join(suffixes[-2:]), "".join(suffixes[-1:])) if ending in ENDINGS), None)


def read_rows(
    files: tuple[tuple[str, int, int], ...], columns: RowColumns, encoding: str, errors: str = "raise"
) -> Iterator[dict[str, str | None]]:
    """Yield the rows of the files, in order, with the columns of `BAD_ROW_FEATURES`.

    A row is `{"text": ...}` for formats of nothing but text. For others it is `{"row": ..., "location": ...}`: its
    columns as JSON, so that rows may nest as they like, and the file and line it comes from.

    Args:
        files: path, size in bytes and time of change in ns of each; with the latter two, the cache of `datasets`
            notices that a file has changed.
        columns (`RowColumns`): which ones are read.
        encoding (`str`): of .txt, .json and .jsonl files.
        errors (`str`): `raise`, or `skip` for rows with an error.

    Raises:
        ValueError: if a file or row cannot be read, or if there is nothing at all.
    """
    num_rows = num_good = num_bad = 0
    first_empty = ""
    nothing = {"text": ""} if columns.is_text else {"row": "", "location": ""}
    for path, *_ in files:
        for location, value in _rows(path, columns, encoding, errors):
            num_rows += 1
            try:
                if isinstance(value, RowError):
                    raise value
                row = _text_row(value, columns) if columns.is_text else _json_row(value, columns, path, location)
            except RowError as error:
                where = f"{path}, {location}" if location else ""
                if error.kind == NO_TEXT:
                    first_empty = first_empty or where
                    yield {**nothing, "error": error.kind, "message": f"{where}."}
                else:
                    num_bad += 1
                    yield {**nothing, **bad_row(error, where, errors)}
                continue
            num_good += 1
            yield {**row, **GOOD}
    if not num_good and not num_bad:
        raise ValueError(_explain_nothing(files, num_rows, first_empty, columns))


def _rows(path: str, columns: RowColumns, encoding: str, errors: str) -> Iterator[Row]:
    kind, compression = ENDINGS[ending_of(path) or ""]
    if kind == ".txt" and not columns.is_text:
        raise ValueError(
            f"{path} is plain text, but the format reads the columns {', '.join(columns.required)}. Name .json, "
            ".jsonl or .parquet files, or set format: text."
        )
    try:
        if kind == ".parquet":
            yield from _parquet(path, columns)
            return
        with COMPRESSIONS[compression](path) as stream:
            escapes = errors == "skip" and kind == ".jsonl"  # one bad line does not end the file
            yield from READERS[kind](_text(stream, encoding, escapes), columns, path)
    except UnicodeDecodeError as error:
        yield "", RowError(f"not {encoding}", _explain_encoding(path, compression, encoding, error))
    except (EOFError, OSError, lzma.LZMAError, zlib.error, pa.ArrowInvalid) as error:
        if isinstance(error, OSError) and error.errno is not None:
            yield "", RowError("unreadable file", f"{path} cannot be opened: {error.strerror}.")
            return
        action = "read as parquet" if kind == ".parquet" else "decompressed"
        message = f"{path} cannot be {action}: {error}. Fetch or write it again."
        yield "", RowError("unreadable file", message)


def _text(stream: IO[bytes], encoding: str, escapes: bool) -> io.TextIOWrapper:
    # Of UTF-8 a byte order mark is dropped: it would be a token of the first document.
    name = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
    return io.TextIOWrapper(stream, name, errors="surrogateescape" if escapes else "strict")


def _whole(text: io.TextIOWrapper, columns: RowColumns, path: str) -> Iterator[Row]:
    yield "the whole file", {columns.text_column: text.read()}


def _json(text: io.TextIOWrapper, columns: RowColumns, path: str) -> Iterator[Row]:
    """Read an array of objects, one object, or (as some write it) an object in each line."""
    content = text.read()
    if not content.strip():
        return
    try:
        rows = json.loads(content)
    except json.JSONDecodeError as error:
        first, _, rest = content.strip().partition("\n")
        if not rest or not _is_json(first):
            yield (
                f"line {error.lineno}",
                RowError(
                    "no JSON",
                    f"no JSON ({error.msg}, column {error.colno}). Repair the file; one object in each line is as "
                    "good as an array of objects.",
                ),
            )
            return
        yield from _json_lines(io.StringIO(content), columns, path)
        return
    rows = rows if isinstance(rows, list) else [rows]
    yield from _objects(((f"row {number}", row) for number, row in enumerate(rows, 1)), columns, path)


def _json_lines(lines: io.TextIOBase, columns: RowColumns, path: str) -> Iterator[Row]:
    def rows() -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(map(str.strip, lines), 1):
            if line:
                yield f"line {number}", _parse_line(line)

    yield from _objects(rows(), columns, path)


def _parse_line(line: str) -> Any:
    if _ESCAPED_BYTE.search(line):
        return RowError("wrong bytes", "bytes that are not in the encoding of the file. Convert or remove the line.")
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return RowError(
            "no JSON",
            f"no JSON ({error.msg}, column {error.colno}): {excerpt(line)}. Repair or remove the line.",
        )


def _objects(rows: Iterator[tuple[str, Any]], columns: RowColumns, path: str) -> Iterator[Row]:
    keys: dict[str, None] = {}
    column = columns.sources[columns.required[0]]
    has_column = False
    for location, row in rows:
        if isinstance(row, dict):
            has_column |= column in row
            keys |= dict.fromkeys(row)
        elif not isinstance(row, RowError):
            row = RowError(
                "wrong type",
                f"{excerpt(row)} is a {type(row).__name__} and no object with the key {column!r}. Write each row as "
                f"{{{json.dumps(column)}: ...}}.",
            )
        yield location, row
    if keys and not has_column and columns.is_text:  # of a single row it is a missing text
        yield "", RowError("missing column", no_such_column(path, columns.text_column, list(keys)))


def _parquet(path: str, columns: RowColumns) -> Iterator[Row]:
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        sources = columns.sources
        for name in columns.required:
            if sources[name] not in schema.names:
                yield "", RowError("missing column", no_such_column(path, sources[name], schema.names, name))
                return
        if columns.is_text and not _holds_text(schema.field(columns.text_column).type):
            yield (
                "",
                RowError(
                    "wrong type",
                    f"text_column={columns.text_column!r} of {path} holds {schema.field(columns.text_column).type} "
                    "and no text. Set text_column to the column that holds the text, or write it as a column of "
                    "strings first.",
                ),
            )
            return
        row = 0
        present = [name for name in sources.values() if name in schema.names]
        for batch in file.iter_batches(batch_size=1000, columns=present):
            for values in batch.to_pylist():
                row += 1
                yield f"row {row}", values


def _holds_text(kind: pa.DataType) -> bool:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_null(value)


def _text_row(row: dict[str, Any], columns: RowColumns) -> dict[str, str | None]:
    text = row.get(columns.text_column)
    if text is None or text == "":
        raise RowError(NO_TEXT, "")
    if not isinstance(text, str):
        raise RowError(
            "wrong type",
            f"{columns.text_column!r} holds a {type(text).__name__} and no text: {excerpt(text)}. Set text_column to "
            "the key that holds the text, or set format to one that reads these rows.",
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            "half a character",
            f"character {error.start + 1} of the text, {text[error.start]!r}, is half of a surrogate pair and no "
            "character. Repair or remove the row.",
        ) from None
    return {"text": text}


def _json_row(row: dict[str, Any], columns: RowColumns, path: str, location: str) -> dict[str, str | None]:
    sources = columns.sources
    for name in columns.required:
        if sources[name] not in row:
            raise RowError("missing column", f"the row has no {sources[name]!r}, only {list(row)}.")
    values = {name: row[source] for name, source in sources.items() if source in row}
    try:
        return {"row": json.dumps(values), "location": f"{path}, {location}"}
    except TypeError as error:
        raise RowError("wrong type", f"{error}. Write the columns {list(values)} as text, numbers or lists.") from None


def _explain_nothing(files: tuple[tuple[str, int, int], ...], num_rows: int, first: str, columns: RowColumns) -> str:
    names = files[0][0] if len(files) == 1 else f"{files[0][0]} and {len(files) - 1} more files"
    message = f"There is no text in {names}." if columns.is_text else f"There are no rows in {names}."
    empty = [path for path, size, _ in files if size == 0]
    if empty:
        message += f" Empty (0 bytes): {', '.join(empty[:3])}{', ...' * (len(empty) > 3)}."
    elif num_rows:
        message += f" All {num_rows} rows are empty or null, such as {first}."
    if not columns.is_text:
        return f"{message} Name other files."
    return f"{message} Name other files, or set text_column={columns.text_column!r} to the one that holds the text."


def _explain_encoding(path: str, compression: str, encoding: str, error: UnicodeDecodeError) -> str:
    """Return a message that names the line, which the error of a buffered reader does not."""
    decoder = codecs.getincrementaldecoder(encoding)()
    start, location = b"", "at its end"
    with COMPRESSIONS[compression](path) as stream:
        for number, line in enumerate(stream, 1):
            start = start or line[:2]
            try:
                decoder.decode(line)
            except UnicodeDecodeError as line_error:
                error, location = line_error, f"line {number}"
                break
    other = "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin-1"
    byte = error.object[error.start : error.start + 1].hex()
    return (
        f"{path}, {location}: byte 0x{byte} is no {encoding} ({error.reason}). Name the encoding of the files, "
        f"such as encoding={other!r}, or convert them: iconv -f {other} -t utf-8."
    )


def no_such_column(source: str, column: str, columns: list[str], name: str = "text") -> str:
    """Return a message that a source lacks the column that a format calls `name`."""
    if name == "text":
        return (
            f"text_column={column!r} is not a column of {source!r}, which has {columns}. Set text_column to the one "
            "that holds the text."
        )
    return (
        f"{column!r} is not a column of {source!r}, which has {columns}. Set columns: {{{name}: ...}} to the one that "
        f"holds the {name}, or format to one that reads these columns."
    )


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def excerpt(value: Any) -> str:
    """Return the beginning of a value, for a message."""
    text = value if isinstance(value, str) else json.dumps(value, default=repr)
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


NO_TEXT = "without text"  # kind of rows that are left out in any case
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
READERS: dict[str, Callable[[Any, RowColumns, str], Iterator[Row]]] = {
    ".txt": _whole,
    ".json": _json,
    ".jsonl": _json_lines,
}
# Ending of the file name -> (kind of its text, compression); parquet is compressed inside.
ENDINGS = {kind + compression: (kind, compression) for kind in READERS for compression in COMPRESSIONS}
ENDINGS[".parquet"] = (".parquet", "")
