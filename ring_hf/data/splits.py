"""Hold documents out of training: whole ones where there are enough of them, else the end of each."""

import hashlib
import json
import logging
from collections.abc import Iterator

from datasets import Dataset

logger = logging.getLogger("ring_hf")

_MAX_SHIFT = 1000  # characters by which a cut may move back to the end of a line or a word


def split_documents(documents: Dataset, heldout_fraction: float) -> tuple[Dataset, Dataset | None]:
    """Split documents into (train, held out).

    The hash of its text decides the side of a document, so the split does not depend on the order or number of the
    others, and two copies of one document never end up on both sides. If that leaves one side empty, because there
    are too few documents (one book, say), the last `heldout_fraction` of the text of every document is held out
    instead, from the end of a line or a word on. Rows that are not plain texts (conversations, say) are never cut.

    Args:
        documents (`Dataset`): the result of `load_documents` or `load_rows`.
        heldout_fraction (`float`): from 0 to below 1. 0 holds nothing out: (documents, None).

    Raises:
        ValueError: if the fraction is out of range, or leaves one side without text.
    """
    if not 0 <= heldout_fraction < 1:
        raise ValueError(
            f"heldout_fraction={heldout_fraction} must be at least 0 and below 1. 0.05 holds out one document in "
            "twenty, 0 none."
        )
    if heldout_fraction == 0:
        return documents, None
    threshold = int(heldout_fraction * 2**32)
    heldout = [_hash(content) < threshold for content in _contents(documents)]
    if any(heldout) and not all(heldout):
        train = documents.select([i for i, is_out in enumerate(heldout) if not is_out])
        return train, documents.select([i for i, is_out in enumerate(heldout) if is_out])
    if "text" not in documents.column_names:
        raise ValueError(
            f"heldout_fraction={heldout_fraction} of {len(documents)} rows leaves one side empty, and only plain "
            "texts can be cut. Name a held-out source of its own (heldout_data), or set heldout_fraction=0 to train "
            "without evaluation."
        )
    return _split_texts(documents, heldout_fraction)


def cut_index(text: str, heldout_fraction: float) -> int:
    """Return the index of the first held-out character of a text.

    `heldout_fraction` of the text, rounded, comes after the cut; it then moves back to the end of a line, or else of a
    word, if there is one within `_MAX_SHIFT` characters.
    """
    cut = len(text) - round(len(text) * heldout_fraction)
    earliest = max(0, cut - _MAX_SHIFT)
    for boundary in ("\n", " "):
        end = text.rfind(boundary, earliest, cut)
        if end > 0:
            return end + 1
    return cut


def _split_texts(documents: Dataset, heldout_fraction: float) -> tuple[Dataset, Dataset]:
    sides = []
    for heldout in (False, True):
        parts = documents.map(
            _cut,
            batched=True,
            batch_size=64,  # documents may be books
            fn_kwargs={"heldout_fraction": heldout_fraction, "heldout": heldout},
            desc="Cutting off the held-out text",
        )
        if not len(parts):
            num_characters = sum(len(text) for text in documents["text"])
            raise ValueError(
                f"heldout_fraction={heldout_fraction} of {len(documents)} documents with {num_characters} characters "
                "leaves one side empty. Name a held-out source of its own (heldout_data), or set heldout_fraction=0 "
                "to train without evaluation."
            )
        sides.append(parts)
    logger.warning(
        "heldout_fraction=%s of %d documents holds out either none of them or all, so the last %.3g %% of the text of "
        "each is held out instead.",
        heldout_fraction, len(documents), 100 * heldout_fraction,
    )  # fmt: skip
    return sides[0], sides[1]


def _cut(batch: dict[str, list[str]], heldout_fraction: float, heldout: bool) -> dict[str, list[str]]:
    parts = []
    for text in batch["text"]:
        cut = cut_index(text, heldout_fraction)
        parts.append(text[cut:] if heldout else text[:cut])
    return {"text": [part for part in parts if part]}


def _contents(documents: Dataset) -> Iterator[str]:
    """Yield what identifies each row: its text, or all its columns, but not the file it comes from."""
    for column in ("text", "row"):
        if column in documents.column_names:
            yield from documents[column]
            return
    for row in documents:
        yield json.dumps(row, sort_keys=True, default=repr)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", errors="replace")).digest()[:4], "big")
