"""Exit codes of many launches of a plain Trainer script on a loaded machine.

Each launch trains a tiny Llama for two steps on processes that share each sequence, and saves it
(`train_and_exit.py`). The test is the end of the processes: a thread of gloo that still holds tensors while the
interpreter shuts down aborts the process, and the launcher then kills the other ranks, one of which may be writing
the model. This is frequent only on a loaded machine, so busy processes run beside the launches.

    python scripts/soak_exit.py                                  # 50 launches of each case, load 4, about an hour
    python scripts/soak_exit.py --without-shutdown               # the same without the exit hook, to compare
    python scripts/soak_exit.py --runs 3 --cases cp2             # a first look

The results are written after every launch, one JSON line each, and launches that are in the file already are not
repeated: start it again after an interruption. The exit code is 1 if any launch with the hook did not end with 0.
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ring_hf.text import markdown_table

ROOT = Path(__file__).resolve().parents[1]
CASES = {"cp2": (2, 1), "ring2xulysses2": (4, 2)}  # (processes, ulysses_size)
FLAGS = ("aborted", "saved")
ABORT = "terminate called without an active exception"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50, help="launches of each case (default: 50)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument("--load", type=int, default=4, help="busy processes beside the launches (default: 4)")
    parser.add_argument("--without-shutdown", action="store_true", help="switch the exit hook off, for comparison")
    parser.add_argument("--timeout", type=float, default=300, help="seconds after which a launch counts as hanging")
    parser.add_argument(
        "--output", type=Path, default=Path("soak_exit.jsonl"), help="results (default: soak_exit.jsonl)"
    )
    return parser.parse_args()


@contextlib.contextmanager
def load(num_processes: int) -> Iterator[None]:
    """Keep `num_processes` processes busy inside the context."""
    busy = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(num_processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def launch(case: str, without_shutdown: bool, timeout: float) -> dict[str, Any]:
    """Launch once; return the launcher's exit code, those of failed ranks, whether a model was saved, seconds."""
    num_processes, ulysses_size = CASES[case]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    environment["RING_HF_WITHOUT_SHUTDOWN"] = str(int(without_shutdown))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        command += [str(num_processes), str(ROOT / "scripts/train_and_exit.py"), folder, str(ulysses_size)]
        start = time.perf_counter()
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            output, _ = process.communicate(timeout=timeout)
            code = process.returncode
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its ranks
            output, _ = process.communicate()
            code = "timeout"
        saved = (Path(folder) / "model.safetensors").exists() and (Path(folder) / "config.json").exists()
    return {
        "code": code,
        "ranks": [int(rank_code) for rank_code in re.findall(r"exitcode\s*: (-?\d+)", output)],
        "aborted": ABORT in output,
        "saved": saved,
        "seconds": round(time.perf_counter() - start, 1),
        "output": "" if code == 0 else output[-3000:],
    }


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table with one row per case, load, and with or without the hook."""
    lines = [["case", "load", "exit hook", "launches", "exit code 0", "aborted", "model saved", "seconds, median"]]
    for key in sorted({(row["case"], row["load"], row["without_shutdown"]) for row in results}):
        rows = [row for row in results if (row["case"], row["load"], row["without_shutdown"]) == key]
        counts = [sum(row["code"] == 0 for row in rows), *(sum(row[name] for row in rows) for name in FLAGS)]
        seconds = statistics.median(row["seconds"] for row in rows)
        cells = [key[0], key[1], "no" if key[2] else "yes", len(rows), *counts, f"{seconds:.1f}"]
        lines.append(list(map(str, cells)))
    return markdown_table(lines, align="lrlr", padded=False)


def main() -> None:
    arguments = parse_arguments()
    conditions = {"load": arguments.load, "without_shutdown": arguments.without_shutdown}
    done = {(row["case"], row["run"]) for row in read(arguments.output) if conditions.items() <= row.items()}
    # The cases alternate, so that an interrupted soak has as many launches of each.
    missing = [(case, run) for run in range(arguments.runs) for case in arguments.cases if (case, run) not in done]
    progress, failures = tqdm(missing, unit="launch", desc="launching"), 0
    with load(arguments.load if missing else 0), progress:
        for case, run in progress:
            result = launch(case, arguments.without_shutdown, arguments.timeout)
            failures += result["code"] != 0
            progress.set_postfix(case=case, failed=failures)
            with arguments.output.open("a") as file:
                file.write(json.dumps({"case": case, "run": run, **conditions, **result}) + "\n")
    results = read(arguments.output)
    print(table(results))
    sys.exit(any(row["code"] != 0 for row in results if not row["without_shutdown"]))


if __name__ == "__main__":
    main()
