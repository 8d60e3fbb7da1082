"""Print the resume matrix of `docs/faults.md`: the worst difference from a run that was not interrupted.

    RING_HF_ALL_CASES=1 python -m tests.faults.resume_report FOLDER

Without the variable, nothing runs on 4 processes. Runs `resume_script.py` on 2, 4 and 1 processes under DDP, or reads
the results that are in FOLDER. The engines have a matrix of their own: `python -m tests.engines.report`.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from ring_hf.text import markdown_table
from tests.faults.resume_script import ALL, HALF, RESUMES, STEPS, Resume
from tests.support.harness import launch_forked

WORLD_SIZES = (2, 4, 1) if ALL else (2, 1)  # the others go on from the checkpoints of the first


class Difference(NamedTuple):
    """The worst differences of the second half of a run.

    Attributes:
        loss: absolute.
        grad_norm, weights: relative; of the sum of squares of the weights in the end.
    """

    loss: float
    grad_norm: float
    weights: float


def run(folder: Path) -> dict[str, Any]:
    """Return the results of all launches by name of the run, launching what is missing."""
    results: dict[str, Any] = {}
    for world_size in WORLD_SIZES:
        path = folder / f"world{world_size}.json"
        if not path.exists():
            launch_forked(["tests/faults/resume_script.py", str(folder)], world_size, timeout=300)
        results |= json.loads(path.read_text())
    return results


def compare(results: dict[str, Any], resume: Resume) -> Difference:
    """Return how far a resumed run is from the run that was not interrupted."""
    whole, resumed = results[resume.source], results[f"{resume.name} resumed"]
    assert len(whole["loss"]) == STEPS and len(resumed["loss"]) in (STEPS, STEPS - HALF)
    loss = max(abs(a - b) for a, b in zip(whole["loss"][HALF:], resumed["loss"][-HALF:], strict=True))
    pairs = zip(whole["grad_norm"][HALF:], resumed["grad_norm"][-HALF:], strict=True)
    grad_norm = max(abs(a - b) / abs(a) for a, b in pairs)
    return Difference(loss, grad_norm, abs(whole["weights"] - resumed["weights"]) / whole["weights"])


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    results = run(folder.resolve())
    rows = [["continued with", "worst loss", "worst grad norm", "weights"]]
    for resume in RESUMES:
        rows.append([resume.name, *(f"{value:.1e}" for value in compare(results, resume))])
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
