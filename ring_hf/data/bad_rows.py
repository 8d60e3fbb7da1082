"""Rows that cannot be used: an error that names them, or, with `errors="skip"`, a count of them by kind.

A row that is left out stays in the cached dataset until `drop_bad_rows`, with its kind and message, so that a run that
reads the cache reports the same numbers as the one that filled it.
"""

import logging
from collections import Counter

import numpy as np
from datasets import Dataset, Value

from .source_spec import ERRORS

logger = logging.getLogger("ring_hf")

# Columns of a dataset that may hold bad rows: null in those that are good.
BAD_ROW_FEATURES = {"error": Value("string"), "message": Value("string")}
GOOD = {"error": None, "message": None}


class RowError(ValueError):
    """A row that cannot be used.

    Args:
        kind (`str`): what is counted, such as `no JSON`.
        message (`str`): the cause and the way out, without the location of the row.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(kind, message)  # both, so that the error can be sent between processes
        self.kind, self.message = kind, message

    def __str__(self) -> str:
        return self.message


def check_errors(errors: str) -> None:
    """Raise `ValueError` if `errors` is neither `raise` nor `skip`."""
    if errors not in ERRORS:
        raise ValueError(f"errors={errors!r} is unknown. Set it to raise (a bad row ends the run) or skip.")


def bad_row(error: RowError, location: str, errors: str) -> dict[str, str]:
    """Return the columns of a row that is left out; `location` is empty if its whole file is.

    Raises:
        ValueError: instead, unless `errors` is `skip`.
    """
    message = f"{location}: {error.message}" if location else error.message
    if errors != "skip":
        raise ValueError(message)
    return {"error": error.kind, "message": message}


def drop_bad_rows(rows: Dataset, name: str) -> Dataset:
    """Return the good rows, without the columns of `BAD_ROW_FEATURES`; one warning counts the others by kind.

    Raises:
        ValueError: if no row is good.
    """
    kinds: Counter[str] = Counter()
    good = [np.empty(0, dtype=np.int64)]
    start, first = 0, ""
    for batch in rows.select_columns(list(BAD_ROW_FEATURES)).with_format("arrow").iter(batch_size=10_000):
        errors = batch["error"]
        good.append(start + np.flatnonzero(errors.is_null().to_numpy()))
        if errors.null_count < len(errors):
            kinds.update(errors.drop_null().to_pylist())
            first = first or batch["message"].drop_null()[0].as_py()
        start += len(errors)
    rows_without_errors = rows.remove_columns(list(BAD_ROW_FEATURES))
    if not kinds:
        return rows_without_errors
    summary = (
        f"{kinds.total()} of {len(rows)} rows of {name} are left out: "
        f"{', '.join(f'{count} {kind}' for kind, count in kinds.most_common())}; the first is {first}"
    )
    indices = np.concatenate(good)
    if not len(indices):
        raise ValueError(f"{summary} Nothing is left. Repair the rows, or name another source.")
    logger.warning("%s", summary)
    return rows_without_errors.select(indices)
