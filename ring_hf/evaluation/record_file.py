"""A file of measurements that an interrupted run continues: a header line, then one JSON object for each.

The header holds the settings that decide about the results. A run with the same settings reads what is there and
computes the rest; a run with other settings is refused. A last line that was cut off when the run was killed does not
count.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_records(path: Path, header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the records of a file; none if there is no file.

    Args:
        path: of the file.
        header: the settings of this run.

    Raises:
        ValueError: if the file is of other settings.
    """
    if not path.exists():
        return []
    first, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
    own = _as_read(header)
    if first and json.loads(first) != own:
        raise ValueError(
            f"{path} holds results of other settings ({first}), not of {json.dumps(own)}. Name another output_dir, or "
            "delete the file."
        )
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break  # the run was killed while it wrote this line
    return records


def begin_file(path: Path, header: Mapping[str, Any], num_records: int) -> None:
    """Write the header of a new file, or drop what follows the first `num_records` records of an existing file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = lines[: 1 + num_records] or [json.dumps(_as_read(header))]
    path.write_text("\n".join(kept) + "\n", encoding="utf-8")


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _as_read(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return a header as a file gives it back: tuples become lists."""
    return dict(json.loads(json.dumps(header)))
