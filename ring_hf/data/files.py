"""Documents of files: a .txt is one document, a .json, .jsonl or .parquet has one in each row.

All but .parquet may be compressed. Only the text is read, so that other columns may hold anything. A row whose text is
empty or null is left out; anything else that cannot be read as text is refused with the file, the row and the cause.
"""

import bz2
import codecs
import gzip
import importlib
import io
import json
import logging
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

logger = logging.getLogger("ring_hf")

Row = tuple[str, Any]  # its location ("line 3"), and its text or the value that should be a text


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


def read_documents(
    files: tuple[tuple[str, int, int], ...], text_column: str, encoding: str
) -> Iterator[dict[str, str]]:
    """Yield `{"text": ...}` for every document of the files, in order.

    Args:
        files: path, size in bytes and time of change in ns of each; with the latter two, the cache of `datasets`
            notices that a file has changed.
        text_column (`str`): the key or column that holds the text.
        encoding (`str`): of .txt, .json and .jsonl files.

    Raises:
        ValueError: if a file or row cannot be read as text, or if there is no text at all.
    """
    num_documents = num_without_text = 0
    first_without_text = ""
    for path, *_ in files:
        for location, text in _rows(path, text_column, encoding):
            if text is None or text == "":
                first_without_text = first_without_text or f"{path}, {location}"
                num_without_text += 1
                continue
            yield {"text": _checked(text, text_column, path, location)}
            num_documents += 1
    num_rows = num_documents + num_without_text
    if not num_documents:
        raise ValueError(_explain_nothing(files, num_rows, first_without_text, text_column))
    if num_without_text:
        logger.warning(
            "%d of %d rows hold no text and are left out; the first is %s.",
            num_without_text,
            num_rows,
            first_without_text,
        )


def _rows(path: str, text_column: str, encoding: str) -> Iterator[Row]:
    kind, compression = ENDINGS[ending_of(path) or ""]
    try:
        if kind == ".parquet":
            yield from _parquet(path, text_column)
            return
        with COMPRESSIONS[compression](path) as stream:
            yield from READERS[kind](_text(stream, encoding), text_column, path)
    except UnicodeDecodeError as error:
        raise ValueError(_explain_encoding(path, compression, encoding, error)) from None
    except (EOFError, OSError, lzma.LZMAError, zlib.error, pa.ArrowInvalid) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise ValueError(f"{path} cannot be opened: {error.strerror}.") from None
        action = "read as parquet" if kind == ".parquet" else "decompressed"
        raise ValueError(f"{path} cannot be {action}: {error}. Fetch or write it again.") from None


def _text(stream: IO[bytes], encoding: str) -> io.TextIOWrapper:
    # Of UTF-8 a byte order mark is dropped: it would be a token of the first document.
    return io.TextIOWrapper(stream, "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding)


def _whole(text: io.TextIOWrapper, text_column: str, path: str) -> Iterator[Row]:
    yield "the whole file", text.read()


def _json(text: io.TextIOWrapper, text_column: str, path: str) -> Iterator[Row]:
    """Read an array of objects, one object, or (as some write it) an object in each line."""
    content = text.read()
    if not content.strip():
        return
    try:
        rows = json.loads(content)
    except json.JSONDecodeError as error:
        first, _, rest = content.strip().partition("\n")
        if not rest or not _is_json(first):
            raise ValueError(
                f"{path}, line {error.lineno}: no JSON ({error.msg}, column {error.colno}). Repair the file; one "
                "object in each line is as good as an array of objects."
            ) from None
        yield from _json_lines(io.StringIO(content), text_column, path)
        return
    rows = rows if isinstance(rows, list) else [rows]
    yield from _objects(((f"row {number}", row) for number, row in enumerate(rows, 1)), text_column, path)


def _json_lines(lines: io.TextIOBase, text_column: str, path: str) -> Iterator[Row]:
    def rows() -> Iterator[Row]:
        for number, line in enumerate(map(str.strip, lines), 1):
            if line:
                try:
                    yield f"line {number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{path}, line {number}: no JSON ({error.msg}, column {error.colno}): {_excerpt(line)}. "
                        "Repair or remove the line."
                    ) from None

    yield from _objects(rows(), text_column, path)


def _objects(rows: Iterator[Row], text_column: str, path: str) -> Iterator[Row]:
    keys: dict[str, None] = {}
    has_column = False
    for location, row in rows:
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, {location}: {_excerpt(row)} is a {type(row).__name__} and no object with the key "
                f"{text_column!r}. Write each row as {{{json.dumps(text_column)}: ...}}."
            )
        has_column |= text_column in row
        keys |= dict.fromkeys(row)
        yield location, row.get(text_column)
    if keys and not has_column:
        raise ValueError(_no_such_column(path, text_column, list(keys)))


def _parquet(path: str, text_column: str) -> Iterator[Row]:
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        if text_column not in schema.names:
            raise ValueError(_no_such_column(path, text_column, schema.names))
        kind = schema.field(text_column).type
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_null(value)):
            raise ValueError(
                f"text_column={text_column!r} of {path} holds {kind} and no text. Set text_column to the column that "
                "holds the text, or write it as a column of strings first."
            )
        row = 0
        for batch in file.iter_batches(batch_size=1000, columns=[text_column]):
            for text in batch.column(0).to_pylist():
                row += 1
                yield f"row {row}", text


def _checked(text: Any, text_column: str, path: str, location: str) -> str:
    if not isinstance(text, str):
        raise ValueError(
            f"{path}, {location}: {text_column!r} holds a {type(text).__name__} and no text: {_excerpt(text)}. Set "
            "text_column to the key that holds the text, or write the rows as text first (a chat: with the "
            "tokenizer's apply_chat_template)."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{path}, {location}: character {error.start + 1} of the text, {text[error.start]!r}, is half of a "
            "surrogate pair and no character. Repair or remove the row."
        ) from None
    return text


def _explain_nothing(files: tuple[tuple[str, int, int], ...], num_rows: int, first: str, text_column: str) -> str:
    names = files[0][0] if len(files) == 1 else f"{files[0][0]} and {len(files) - 1} more files"
    message = f"There is no text in {names}."
    empty = [path for path, size, _ in files if size == 0]
    if empty:
        message += f" Empty (0 bytes): {', '.join(empty[:3])}{', ...' * (len(empty) > 3)}."
    elif num_rows:
        message += f" All {num_rows} rows are empty or null, such as {first}."
    return f"{message} Name other files, or set text_column={text_column!r} to the one that holds the text."


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


def _no_such_column(path: str, text_column: str, columns: list[str]) -> str:
    return (
        f"text_column={text_column!r} is not a column of {path!r}, which has {columns}. Set text_column to the one "
        "that holds the text."
    )


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def _excerpt(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


READERS: dict[str, Callable[[Any, str, str], Iterator[Row]]] = {".txt": _whole, ".json": _json, ".jsonl": _json_lines}
# Ending of the file name -> (kind of its text, compression); parquet is compressed inside.
ENDINGS = {kind + compression: (kind, compression) for kind in READERS for compression in COMPRESSIONS}
ENDINGS[".parquet"] = (".parquet", "")
