"""Print the table of `docs/engines.md`: how far every engine is from one process.

    python -m tests.engines.report FOLDER

Launches the runs of `tests/engines` (all of them with RING_HF_ALL_CASES=1), or reads the results that are in FOLDER.
"""

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from ring_hf.text import markdown_table
from tests.engines.cases import CASES, family_of
from tests.engines.conftest import EngineLaunches
from tests.engines.jobs import EVALUATIONS, HALF, RESUMES
from tests.trainer.compare import compare_runs


def rows_of(launches: EngineLaunches) -> list[list[str]]:
    """Return a row per engine and kind of run: the number of runs and their worst differences."""
    references = launches.results("FSDP", 1)
    worst: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for case in CASES:
        run = launches.results(family_of(case.engine), case.run.cp * case.run.dp)[case.name]
        if case.run.broken is None and not case.run.bf16:
            kind = f"{case.memory_options or 'no'} memory options"
            worst[case.engine, kind].append(compare_runs(case.name, run, references[case.reference().name]))
    for resume in RESUMES:
        sizes = [cp * dp for cp, dp in (resume.before, resume.after)]
        whole, again = (launches.results(family_of(resume.engine), size)[resume.name] for size in sizes)
        tails: list[dict[str, Any]] = [
            {key: run[key][-HALF:] for key in ("loss", "grad_norm")} for run in (again["resumed"], whole["whole"])
        ]
        worst[resume.engine, "resumed"].append(compare_runs(resume.name, *tails))
    for engine, size in sorted(EVALUATIONS):
        ours = launches.results(family_of(engine), size)[f"evaluation on {engine}"]
        differences = [
            abs(value - references["evaluation on DDP"][key][name])
            for key, values in ours.items()
            if key not in ("ran", "seconds")
            for name, value in values.items()
        ]
        worst[engine, "evaluation"].append((max(differences), 0.0))
    rows = [["engine", "", "runs", "worst loss", "worst grad norm"]]
    for (engine, kind), pairs in sorted(worst.items()):
        loss, grad_norm = max(loss for loss, _ in pairs), max(norm for _, norm in pairs)
        norm = "" if kind == "evaluation" else f"{grad_norm:.1e}"
        rows.append([engine, kind, str(len(pairs)), f"{loss:.1e}", norm])
    return rows


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    print(markdown_table(rows_of(EngineLaunches(folder))))
