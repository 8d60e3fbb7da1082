"""Print the table of `docs/faults.md`: what happens when a rank fails, by fault and engine.

    python -m tests.faults.report FOLDER [--cases "killed in forward" ...] [--engines DDP FSDP2 ZeRO-3]

Every case is two launches of the same command by `accelerate launch` on two CPU processes: the first with the fault,
the second without. FOLDER/results.jsonl gets one line a case; cases that are in it are not repeated, so start it again
after an interruption. The exit code is 1 if a case did not do what it should.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ring_hf.text import markdown_table
from tests.faults.injection import FAULTS
from tests.faults.outcomes import ENGINES, Outcome, play

ERRORS = re.compile(
    r"ring_hf: rank|^(?:\[rank\d\]: *)*[\w.]*(?:Error|Exception)\b|Signal \d+ \(SIG\w+\) received|disagree about"
)
OWN = "ring_hf: rank"  # lines of torch and the launcher say less


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the runs and of results.jsonl")
    parser.add_argument("--cases", nargs="+", choices=["none", *FAULTS], default=["none", *FAULTS], metavar="FAULT")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--keep", action="store_true", help="keep the folders of the runs")
    return parser.parse_args()


def summarize(engine: str, name: str, outcome: Outcome, reference: dict[str, Any] | None) -> dict[str, Any]:
    """Return a row of results.jsonl: measurements of a case, and what is wrong with it."""
    first, second, results = outcome.first, outcome.second, outcome.results
    assert second is not None
    losses = None if results is None else results["loss"]
    difference = None
    if losses is not None and reference is not None:
        difference = max(abs(a - b) for a, b in zip(losses, reference["loss"], strict=True))
    row = {
        "engine": engine,
        "fault": name,
        "codes": first.codes,
        "seconds": round(first.seconds, 1),
        "orphans": first.orphans,
        "lines": [re.sub(r"^(\[rank\d\]: *)+", "", line)[:400] for line in outcome.lines_of(ERRORS.pattern)][-12:],
        "checkpoints": outcome.checkpoints,
        "next start": None if results is None else results["start"],
        "worst loss": difference,
        "problems": find_problems(name, outcome, difference),
    }
    if row["problems"]:
        row["output"] = [text[-6000:] for text in (*first.output, *second.output)]
    return row


def find_problems(name: str, outcome: Outcome, difference: float | None) -> list[str]:
    """Return what a case did that it should not have done."""
    first, results, fault = outcome.first, outcome.results, FAULTS.get(name)
    if fault is None:
        return [] if first.codes == [0] * len(first.codes) else ["failed without a fault"]
    text = "\n".join(first.output)
    if fault.may_be_harmless and first.codes == [0] * len(first.codes) and not difference:
        return []
    whole = [int(checkpoint[11:]) for checkpoint, damage in outcome.checkpoints.items() if damage is None]
    last = max(whole, default=0)
    checks = {
        "exit code 0": 0 not in first.codes,
        "did not end": None not in first.codes and "hangs" not in text.splitlines()[-1:],
        "orphans": first.orphans == 0,
        f"no line with {fault.phase!r}": any(fault.phase in line for line in outcome.lines_of(ERRORS.pattern)),
        f"rank {fault.rank} is not named": re.search(rf"[Rr]ank {fault.rank}\b", text) is not None
        or f"rank      : {fault.rank}" in text,
        "the next start failed": results is not None,
        "the next start began elsewhere": results is None or results["start"] == last,
        "other checkpoints than expected": fault.next_step in (None, last),
        "the loss curve differs": not difference,
    }
    return [problem for problem, is_right in checks.items() if not is_right]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table, one row a case."""
    lines = [["fault", "engine", "exit code", "s", "the error (last lines)", "on disk", "next start from", "right"]]
    for row in rows:
        disk = [f"{name[11:]}: {damage or 'whole'}" for name, damage in row["checkpoints"].items()]
        own_lines = [line[line.index(OWN) :] for line in row["lines"] if OWN in line]  # two ranks may share a line
        other_lines = [line for line in row["lines"] if "ChildFailed" not in line and "Signal 15" not in line]
        text = " / ".join(line.replace("|", "/").strip()[:240] for line in (own_lines or other_lines)[-2:])
        loss = "" if row["worst loss"] is None else f", loss differs by {row['worst loss']:.1e}"
        start = "failed" if row["next start"] is None and row["fault"] != "none" else row["next start"]
        codes, right = ", ".join(map(str, row["codes"])), "; ".join(row["problems"]) or "yes"
        cells = [row["fault"], row["engine"], codes, f"{row['seconds']:.0f}", text, ", ".join(disk)]
        lines.append([*cells, f"{start}{loss}", right])
    return markdown_table(lines, align="l", padded=False)


def main() -> None:
    arguments = parse_arguments()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path = arguments.folder / "results.jsonl"
    done = {(row["engine"], row["fault"]) for row in read(path)}
    names = ["none", *(name for name in arguments.cases if name != "none")]  # the others are compared with its losses
    missing = [(engine, name) for engine in arguments.engines for name in names if (engine, name) not in done]
    progress = tqdm(missing, unit="case", desc="launching")
    for engine, name in progress:
        progress.set_postfix(case=f"{name}, {engine}")
        folder = arguments.folder / f"{engine} {name}"
        shutil.rmtree(folder, ignore_errors=True)  # of an interrupted report
        references = [row for row in read(path) if (row["engine"], row["fault"]) == (engine, "none")]
        outcome = play(folder.resolve(), engine, name, forked=False)
        row = summarize(engine, name, outcome, references[0]["results"] if references else None)
        if name == "none":
            row["results"] = outcome.results
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if not arguments.keep:
            shutil.rmtree(folder)
    rows = [row for row in read(path) if row["engine"] in arguments.engines and row["fault"] in names]
    print(table(rows))
    sys.exit(any(row["problems"] for row in rows))


if __name__ == "__main__":
    main()
