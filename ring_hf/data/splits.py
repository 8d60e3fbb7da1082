"""Which documents are held out of training: whole ones where there are enough of them, else the end of each."""

import hashlib
import logging

from datasets import Dataset

logger = logging.getLogger("ring_hf")

_REACH = 1000  # characters before a cut in which a line or a word may end


def split_documents(documents: Dataset, heldout_fraction: float) -> tuple[Dataset, Dataset | None]:
    """Split documents into (train, held out).

    A document goes where the hash of its text sends it, so the split does not depend on order or number of the
    others, and two copies of one document never end up on both sides. Where that leaves one side empty, because there
    are too few documents (one book, say), the last `heldout_fraction` of the text of every document is held out
    instead, from the end of a line or a word on.

    Args:
        documents (`Dataset`): what `load_documents` returns.
        heldout_fraction (`float`): from 0 to below 1. 0 holds nothing out: (documents, None).
    """
    if not 0 <= heldout_fraction < 1:
        raise ValueError(
            f"heldout_fraction={heldout_fraction} must be at least 0 and below 1. 0.05 holds out one document in "
            "twenty, 0 none."
        )
    if heldout_fraction == 0:
        return documents, None
    threshold = int(heldout_fraction * 2**32)
    heldout = [_hash(text) < threshold for text in documents["text"]]
    if any(heldout) and not all(heldout):
        train, rest = (documents.select([i for i, out in enumerate(heldout) if out == side]) for side in (False, True))
        return train, rest
    return _split_texts(documents, heldout_fraction)


def cut_of(text: str, heldout_fraction: float) -> int:
    """Return where the held-out end of a text begins: at most `heldout_fraction` of the text, rounded, comes after the
    cut before it is moved back to the end of a line, or else of a word, if there is one nearby."""
    cut = len(text) - round(len(text) * heldout_fraction)
    reach = max(0, cut - _REACH)
    for boundary in ("\n", " "):
        end = text.rfind(boundary, reach, cut)
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
            desc="Cutting off what is held out",
        )
        if not len(parts):
            lengths = sum(len(text) for text in documents["text"])
            raise ValueError(
                f"heldout_fraction={heldout_fraction} of {len(documents)} documents with {lengths} characters leaves "
                "one side empty. Name a held-out source of its own (heldout_data), or set heldout_fraction=0 to train "
                "without evaluation."
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
        cut = cut_of(text, heldout_fraction)
        parts.append(text[cut:] if heldout else text[:cut])
    return {"text": [part for part in parts if part]}


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", errors="replace")).digest()[:4], "big")
