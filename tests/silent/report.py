"""Launch cases, compare two processes with one, and print the outcome of each.

    python -m tests.silent.report FOLDER [--items 1 2] [--cases NAME ...] [--again]

Results in FOLDER are reused, so a table can be completed in several short runs.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ring_hf.text import markdown_table
from tests.silent.cases import ANY_STEP, CASES, CONSTRUCTION, FIRST_STEP, Case
from tests.support.harness import accelerate_launch, launch_forked

MODES = {"reference": 1, "alone": 1, "shared": 2}
MAX_LOSS, MAX_GRAD_NORM = 1e-5, 1e-4  # relative, over all steps
MOMENTS = (CONSTRUCTION, FIRST_STEP, ANY_STEP)
CURVES = ("loss", "grad_norm", "eval_loss", "outputs")

Ranks = list[dict[str, Any]]  # the records of a case, by rank


def launch(folder: Path, mode: str, cases: Sequence[Case], again: bool = False) -> dict[str, Ranks]:
    """Run the cases without results in `folder` in one launch, and return the records of all cases."""
    results_folder = folder / mode
    results_folder.mkdir(parents=True, exist_ok=True)
    for case in cases if again else ():
        for path in results_folder.glob(f"{case.name}.rank*.*"):
            path.unlink()
    missing = [case for case in cases if not (results_folder / f"{case.name}.rank0.json").exists()]
    if missing:
        seconds = 60 + sum(case.timeout for case in missing)
        command = ["tests/silent/script.py", mode, str(results_folder), *(case.name for case in missing)]
        start = accelerate_launch if MODES[mode] > 1 else launch_forked
        start(command, MODES[mode], timeout=seconds)
    return {case.name: read_records(results_folder, case.name, MODES[mode]) for case in cases}


def read_records(folder: Path, name: str, num_ranks: int) -> Ranks:
    return [json.loads((folder / f"{name}.rank{rank}.json").read_text()) for rank in range(num_ranks)]


@dataclass(frozen=True)
class Difference:
    """How far a run is from its reference: the worst relative difference of each curve.

    Attributes:
        first_step: the first step (from 1) whose loss or grad norm differs; None if there is none.
    """

    loss: float
    grad_norm: float
    eval_loss: float
    outputs: float
    first_step: int | None

    @property
    def is_exact(self) -> bool:
        others = max(self.loss, self.eval_loss, self.outputs)
        return others <= MAX_LOSS and self.grad_norm <= MAX_GRAD_NORM

    def __str__(self) -> str:
        values = {"loss": self.loss, "grad norm": self.grad_norm, "eval loss": self.eval_loss, "outputs": self.outputs}
        text = ", ".join(f"{name} {value:.1e}" for name, value in values.items() if value)
        return f"{text or 'no difference'}{f', from step {self.first_step}' if self.first_step else ''}"


def compare_records(run: dict[str, Any], reference: dict[str, Any]) -> Difference:
    """Compare the record of rank 0 with that of one process."""
    differences = {name: _relative_differences(run[name], reference[name]) for name in CURVES}
    steps = zip(differences["loss"], differences["grad_norm"], strict=False)
    wrong_steps = [i for i, (loss, grad_norm) in enumerate(steps, 1) if loss > MAX_LOSS or grad_norm > MAX_GRAD_NORM]
    worst = {name: max(values, default=0.0) for name, values in differences.items()}
    return Difference(**worst, first_step=wrong_steps[0] if wrong_steps else None)


def _relative_differences(ours: list[float], theirs: list[float]) -> list[float]:
    """Return relative differences, which are infinite where a value is missing or not finite."""
    pairs = list(zip(ours, theirs, strict=False))
    values = [abs(a - b) / max(abs(b), 1e-12) for a, b in pairs]
    finite = [value if math.isfinite(value) else math.inf for value in values]
    return finite + [math.inf] * abs(len(ours) - len(theirs))


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case in one mode.

    Attributes:
        verdict: "exact", "wrong", "refused", "hangs", "dies", "fails", "ranks disagree" or "no reference".
        moment: when it was refused.
    """

    verdict: str
    detail: str
    moment: str = ANY_STEP

    def is_expected(self, case: Case) -> bool:
        in_time = MOMENTS.index(self.moment) <= MOMENTS.index(case.latest)
        return self.verdict in case.expected.split(" or ") and (self.verdict == "exact" or in_time)


def classify(ranks: Ranks, reference: Ranks) -> Outcome:
    """Return the outcome of a case by its records. It is refused if every rank raised the same ValueError."""
    errors = [record["error"] for record in ranks]
    if not any(errors):
        if reference[0]["error"]:
            return Outcome("no reference", reference[0]["error"])
        difference = compare_records(ranks[0], reference[0])
        steps, expected_steps = len(ranks[0]["loss"]), len(reference[0]["loss"])
        if steps != expected_steps:
            return Outcome("wrong", f"{steps} steps instead of {expected_steps}")
        seconds = ranks[0]["seconds"]
        return Outcome("exact" if difference.is_exact else "wrong", f"{difference} ({seconds} s)")
    if any("Hang:" in str(error) for error in errors):
        verdict = "hangs"
    elif any("Killed:" in str(error) for error in errors):
        verdict = "dies"
    elif len(set(errors)) == 1 and str(errors[0]).startswith("ValueError"):
        verdict = "refused"
    elif len(set(errors)) == 1:
        verdict = "fails"
    else:
        verdict = "ranks disagree"
    if len(set(errors)) == 1:
        return Outcome(verdict, f"{_describe_stage(ranks[0])}: {errors[0]}", _moment(ranks[0]))
    details = [f"rank {rank}, {_describe_stage(record)}: {record['error']}" for rank, record in enumerate(ranks)]
    return Outcome(verdict, "; ".join(details))


def _moment(record: dict[str, Any]) -> str:
    if record.get("stage") == "construction":
        return CONSTRUCTION
    return FIRST_STEP if record.get("stage") == "training" and not record["loss"] else ANY_STEP


def _describe_stage(record: dict[str, Any]) -> str:
    if "stage" not in record:
        return "without an end"
    if record["stage"] != "training":
        return f"at {record['stage']}" if record["stage"] == "construction" else record["stage"]
    return f"after {len(record['loss'])} steps, {record['seconds']} s"


def format_table(cases: Sequence[Case], results: dict[str, dict[str, Ranks]], width: int = 300) -> str:
    """Return a Markdown table with a row for each case."""
    rows = [["case", "listed", "expected", "two processes", "", "one process"]]
    for case in cases:
        reference = results["reference"][case.name]
        shared = classify(results["shared"][case.name], reference)
        alone = classify(results["alone"][case.name], reference) if case.alone else None
        emphasis = "" if shared.is_expected(case) and (alone is None or alone.is_expected(case)) else "**"
        detail = shared.detail.replace("\n", " ").replace("|", "/")[:width]
        ring_alone = "" if alone is None else f"{alone.verdict}: {alone.detail[:60]}"
        listed = "yes" if case.listed else ""
        verdict = f"{emphasis}{shared.verdict}{emphasis}"
        rows.append([case.name, listed, case.expected, verdict, detail, ring_alone])
    return markdown_table(rows, align="l", padded=False)


def run_cases(cases: Sequence[Case], folder: Path, again: bool = False) -> dict[str, dict[str, Ranks]]:
    """Return all records by mode and name."""
    return {
        mode: launch(folder, mode, [case for case in cases if mode != "alone" or case.alone], again) for mode in MODES
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--items", type=int, nargs="*")
    parser.add_argument("--cases", nargs="*")
    parser.add_argument("--again", action="store_true", help="run cases again that have results")
    parser.add_argument("--width", type=int, default=300)
    options = parser.parse_args()
    cases = [
        case
        for case in CASES
        if (options.items is None or case.item in options.items)
        and (options.cases is None or case.name in options.cases)
        and (not case.needs_trl or find_spec("trl") is not None)
    ]
    print(format_table(cases, run_cases(cases, options.folder.resolve(), options.again), options.width))


if __name__ == "__main__":
    main()
