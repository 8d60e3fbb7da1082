"""Where documents come from: files, a dataset of the hub, or the text that every Python installation carries.

A source is one string. `builtin` is the standard library's own modules and the language reference
(`pydoc_data.topics`): about ten megabytes of real documents, hundreds of them longer than 16,000 characters, on every
machine. A path, a folder or a glob is read by the file name's ending. Anything else is the name of a dataset on the
hub.
"""

import glob
import hashlib
import importlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, concatenate_datasets, load_dataset

BUILTIN = "builtin"
READERS = {  # ending of the file name -> (reader of `datasets`, its options)
    ".txt": ("text", {"sample_by": "document"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
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


def load_documents(source: str, text_column: str = "text", split: str = "train") -> Dataset:
    """Read every document of a source into a dataset with the single column `text`.

    Args:
        source (`str`): `builtin`; a file, folder or glob of .txt (one document each), .json, .jsonl or .parquet; or a
            dataset on the hub, with `:name` behind it if it has several configurations.
        text_column (`str`): the column that holds the text, in files other than .txt and on the hub.
        split (`str`): which split of a hub dataset.
    """
    if source == BUILTIN:
        return Dataset.from_generator(builtin_documents, gen_kwargs={"python": sys.version})
    paths = find_files(source)
    if not paths:
        name, _, configuration = source.partition(":")
        return _text_only(load_dataset(name, configuration or None, split=split), text_column, source)
    by_ending = {ending: [path for path in paths if Path(path).suffix == ending] for ending in READERS}
    return concatenate_datasets([_read_files(e, files, text_column) for e, files in by_ending.items() if files])


def find_files(source: str) -> list[str]:
    """The files a path, folder or glob stands for, sorted; empty if it looks like the name of a hub dataset
    instead."""
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(str(file) for file in path.rglob("*") if file.suffix in READERS)
    else:
        found = sorted(glob.glob(str(path), recursive=True))
    looks_like_path = (
        path.exists()
        or path.suffix in READERS
        or path.is_absolute()
        or glob.has_magic(source)
        or source.startswith(".")
    )
    wrong = [file for file in found if Path(file).suffix not in READERS]
    if wrong or (looks_like_path and not found):
        raise ValueError(
            f"data source {source!r} names {wrong[0] if wrong else 'no file that exists'}. Give a file, folder or "
            f"glob of {', '.join(READERS)}, the name of a dataset on the hub, or {BUILTIN!r}."
        )
    return found


def split_documents(documents: Dataset, heldout_fraction: float) -> tuple[Dataset, Dataset]:
    """Split by document into (train, held out).

    A document goes where the hash of its text sends it, so the split does not depend on order or number of the
    others, and two copies of one document never end up on both sides.
    """
    if not 0 < heldout_fraction < 1:
        raise ValueError(
            f"heldout_fraction={heldout_fraction} must lie between 0 and 1. 0.05 holds out one document in twenty."
        )
    threshold = int(heldout_fraction * 2**32)
    heldout = [_hash(text) < threshold for text in documents["text"]]
    if all(heldout) or not any(heldout):
        raise ValueError(
            f"heldout_fraction={heldout_fraction} of {len(documents)} documents leaves one side empty: documents are "
            "held out whole. Change the fraction, or name a held-out source of its own."
        )
    sides = [documents.select([i for i, out in enumerate(heldout) if out == side]) for side in (False, True)]
    return sides[0], sides[1]


def builtin_documents(python: str) -> Iterator[dict[str, str]]:
    """The standard library's modules, then the topics of the language reference, in alphabetical order.

    `python` is only there so that the cache of one Python version is not taken for another's.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts):
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                yield {"text": text}
    topics = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield {"text": topics[name]}


def _read_files(ending: str, paths: list[str], text_column: str) -> Dataset:
    reader, options = READERS[ending]
    documents = load_dataset(reader, data_files=[os.path.abspath(path) for path in paths], split="train", **options)
    return _text_only(documents, "text" if reader == "text" else text_column, paths[0])


def _text_only(documents: Dataset, text_column: str, source: str) -> Dataset:
    if text_column not in documents.column_names:
        raise ValueError(
            f"text_column={text_column!r} is not a column of {source!r}, which has {documents.column_names}. "
            "Set text_column to the one that holds the text."
        )
    documents = documents.select_columns([text_column])
    return documents if text_column == "text" else documents.rename_column(text_column, "text")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", errors="replace")).digest()[:4], "big")
