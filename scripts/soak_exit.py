"""Exit codes of many launches of a plain Trainer script on a loaded machine, by engine and by how the script ends.

Each launch trains a tiny Llama for two steps on processes that share each sequence, and then saves it, just ends,
evaluates, raises on one rank, or gets a Ctrl-C (`train_and_exit.py`); or it generates. The test is the end of the
processes: a thread of gloo that still holds tensors while the interpreter shuts down aborts the process, and the
launcher then kills the other ranks, one of which may be writing the model. This is frequent only on a loaded machine,
so busy processes run beside the launches.

    python scripts/soak_exit.py                                  # 50 launches of each case, load 4, about an hour
    python scripts/soak_exit.py --without-shutdown               # the same without the exit hook, to compare
    python scripts/soak_exit.py --runs 3 --cases cp2             # a first look
    python scripts/soak_exit.py --engines FSDP2 ZeRO-3           # other engines
    python scripts/soak_exit.py --endings raise interrupt        # other endings

The results are written after every launch, one JSON line each, and launches that are in the file already are not
repeated: start it again after an interruption. A launch is right if its exit code is 0 (after "raise" and
"interrupt": if it is not), no rank aborts, nothing warns of groups, threads or memory that were left behind, and no
process is left. The exit code is 1 if a launch with the hook was not right.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from cpu_engines import ENGINES, environment_of
from tqdm import tqdm

from ring_hf.text import markdown_table

ROOT = Path(__file__).resolve().parents[1]
CASES = {"cp2": (2, 1), "cp4": (4, 1), "ring2xulysses2": (4, 2)}  # (processes, ulysses_size)
ENDINGS = ("save", "end", "evaluate", "generate", "raise", "interrupt")
FAILING = ("raise", "interrupt")
FLAGS = ("aborted", "warned", "orphans", "saved")
ABORT = re.compile(r"terminate called|Fatal Python error|SIGABRT|SIGSEGV")
# Of torch for groups of NCCL, of multiprocessing, and of Python's own shutdown.
WARNINGS = re.compile(r"NOT been destroyed|leaked \w+|Exception ignored in|ResourceWarning|did not end in order")
STARTED = "'loss'"  # in the output of a training that may be interrupted


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50, help="launches of each case (default: 50)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["DDP"], help="default: DDP")
    parser.add_argument("--endings", nargs="+", choices=ENDINGS, default=["save"], help="default: save")
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


def launch(case: str, engine: str, ending: str, without_shutdown: bool, timeout: float) -> dict[str, Any]:
    """Launch once; return the launcher's exit code, those of failed ranks, what was left behind, seconds."""
    num_processes, ulysses_size = CASES[case]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment_of(engine)}
    environment["RING_HF_WITHOUT_SHUTDOWN"] = str(int(without_shutdown))
    folder = Path(tempfile.mkdtemp())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    command += [str(ROOT / "scripts/train_and_exit.py"), str(folder), str(ulysses_size), engine, ending]
    start, log = time.perf_counter(), folder / "output.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    code: int | str | None = "timeout"
    is_interrupted = False
    while time.perf_counter() - start < timeout:
        if ending == "interrupt" and not is_interrupted and STARTED in log.read_text(errors="replace"):
            process.send_signal(signal.SIGINT)
            is_interrupted = True
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(0.2)
            break
    else:
        process.terminate()  # torchrun ends its ranks
        process.wait()
    output, seconds = log.read_text(errors="replace"), time.perf_counter() - start
    result = {
        "code": code,
        "ranks": [int(rank_code) for rank_code in re.findall(r"exitcode\s*: (-?\d+)", output)],
        "aborted": ABORT.search(output) is not None,
        "warned": WARNINGS.search(output) is not None,
        "orphans": end_orphans(str(folder)),
        "saved": (folder / "model.safetensors").exists() and (folder / "config.json").exists(),
        "seconds": round(seconds, 1),
    }
    shutil.rmtree(folder)
    return {**result, "output": "" if is_right({"ending": ending, **result}) else output[-3000:]}


def end_orphans(argument: str) -> int:
    """Kill all processes with this argument; return how many there were five seconds after the launcher's end."""
    deadline = time.monotonic() + 5
    while True:
        processes = [p for p in psutil.process_iter(["cmdline"]) if argument in (p.info["cmdline"] or [])]
        alive = [process for process in processes if process.status() != psutil.STATUS_ZOMBIE]
        if not alive or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    for process in alive:
        process.kill()
    return len(alive)


def is_right(row: dict[str, Any]) -> bool:
    """Return whether a launch ended as its ending should."""
    is_expected = isinstance(row["code"], int) and (row["code"] != 0) == (row["ending"] in FAILING)
    is_saved = row["saved"] == (row["ending"] == "save")
    return is_expected and is_saved and not (row["aborted"] or row["warned"] or row["orphans"])


def read(path: Path) -> list[dict[str, Any]]:
    before = {"engine": "DDP", "ending": "save", "warned": False, "orphans": 0}  # of files of earlier versions
    return [before | json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table with one row per case, engine, ending, load, and with or without the hook."""
    keys = ("case", "engine", "ending", "load", "without_shutdown")
    lines = [["case", "engine", "ending", "load", "exit hook", "launches", "right", *FLAGS, "seconds, median"]]
    for key in sorted({tuple(row[name] for name in keys) for row in results}):
        rows = [row for row in results if tuple(row[name] for name in keys) == key]
        counts = [sum(map(is_right, rows)), *(sum(bool(row[name]) for row in rows) for name in FLAGS)]
        seconds = statistics.median(row["seconds"] for row in rows)
        cells = [*key[:4], "no" if key[4] else "yes", len(rows), *counts, f"{seconds:.1f}"]
        lines.append(list(map(str, cells)))
    return markdown_table(lines, align="lllrlr", padded=False)


def main() -> None:
    arguments = parse_arguments()
    conditions = {"load": arguments.load, "without_shutdown": arguments.without_shutdown}
    keys = ("case", "engine", "ending", "run")
    rows = [row for row in read(arguments.output) if conditions.items() <= row.items()]
    done = {tuple(row[key] for key in keys) for row in rows}
    # The cases alternate, so that an interrupted soak has as many launches of each.
    launches = itertools.product(range(arguments.runs), arguments.cases, arguments.engines, arguments.endings)
    missing = [(*launch, run) for run, *launch in launches if (*launch, run) not in done]
    progress, failures = tqdm(missing, unit="launch", desc="launching"), 0
    with load(arguments.load if missing else 0), progress:
        for case, engine, ending, run in progress:
            result = launch(case, engine, ending, arguments.without_shutdown, arguments.timeout)
            row = {"case": case, "engine": engine, "ending": ending, "run": run, **conditions, **result}
            failures += not is_right(row)
            progress.set_postfix(case=case, engine=engine, ending=ending, failed=failures)
            with arguments.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
    results = read(arguments.output)
    print(table(results))
    sys.exit(any(not is_right(row) for row in results if not row["without_shutdown"]))


if __name__ == "__main__":
    main()
