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
    python scripts/soak_exit.py --forked --at-once 3 --load 0    # much faster: see below

A launch by torchrun spends most of its time on imports. With --forked, ranks are forked from a process that has
imported everything, and shut their interpreters down as always (`forked_launch.py`). With --at-once, launches are the
load of each other.

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
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from cpu_engines import ENGINES, environment_of
from forked_launch import ForkedLaunches
from tqdm import tqdm

from ring_hf.launcher import end_orphans
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
    parser.add_argument("--at-once", type=int, default=1, help="launches that run at the same time (default: 1)")
    parser.add_argument("--forked", action="store_true", help="fork the ranks instead of starting torchrun")
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


class Torchrun:
    """Starts launches as `ForkedLaunches` does, by torchrun."""

    def start(
        self, command: list[str], num_processes: int, environment: dict[str, str], log: Path
    ) -> subprocess.Popen[bytes]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc_per_node", str(num_processes)]
        with log.open("w") as file:
            environment = {**os.environ, **environment}
            return subprocess.Popen([*launcher, *command], env=environment, stdout=file, stderr=subprocess.STDOUT)


def launch(
    launches: Torchrun | ForkedLaunches, case: str, engine: str, ending: str, without_shutdown: bool, timeout: float
) -> dict[str, Any]:
    """Launch once; return the launcher's exit code, those of failed ranks, what was left behind, seconds."""
    num_processes, ulysses_size = CASES[case]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment_of(engine)}
    environment["RING_HF_WITHOUT_SHUTDOWN"] = str(int(without_shutdown))
    folder = Path(tempfile.mkdtemp())
    command = [str(ROOT / "scripts/train_and_exit.py"), str(folder), str(ulysses_size), engine, ending]
    start, log = time.perf_counter(), folder / "output.log"
    process = launches.start(command, num_processes, environment, log)
    code: int | str | None = "timeout"
    is_interrupted = False
    while time.perf_counter() - start < timeout:
        if ending == "interrupt" and not is_interrupted and STARTED in read_log(log):
            process.send_signal(signal.SIGINT)
            is_interrupted = True
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(0.2)
            break
    else:
        process.terminate()  # torchrun ends its ranks
        process.wait()
    output, seconds = read_log(log), time.perf_counter() - start
    result = {
        "code": code,
        "ranks": [int(rank_code) for rank_code in re.findall(r"exitcode\s*: (-?\d+)", output)],
        "aborted": ABORT.search(output) is not None,
        "warned": WARNINGS.search(output) is not None,
        "orphans": end_orphans(str(folder), [process.pid], patience=5),
        "saved": (folder / "model.safetensors").exists() and (folder / "config.json").exists(),
        "seconds": round(seconds, 1),
    }
    shutil.rmtree(folder)
    return {**result, "output": "" if is_right({"ending": ending, **result}) else output[-3000:]}


def read_log(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def is_right(row: dict[str, Any]) -> bool:
    """Return whether a launch ended as its ending should."""
    is_expected = isinstance(row["code"], int) and (row["code"] != 0) == (row["ending"] in FAILING)
    is_saved = row["saved"] == (row["ending"] == "save")
    return is_expected and is_saved and not (row["aborted"] or row["warned"] or row["orphans"])


def read(path: Path) -> list[dict[str, Any]]:
    # Of files of earlier versions.
    before = {"engine": "DDP", "ending": "save", "warned": False, "orphans": 0, "at_once": 1, "forked": False}
    return [before | json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table with one row for all launches that differ in nothing but their number."""
    keys = ("case", "engine", "ending", "load", "at_once", "forked", "without_shutdown")
    lines = [["case", "engine", "ending", "load", "at once", "ranks by", "exit hook", "launches", "right", *FLAGS]]
    lines[0].append("seconds, median")
    for key in sorted({tuple(row[name] for name in keys) for row in results}):
        rows = [row for row in results if tuple(row[name] for name in keys) == key]
        counts = [sum(map(is_right, rows)), *(sum(bool(row[name]) for row in rows) for name in FLAGS)]
        seconds = statistics.median(row["seconds"] for row in rows)
        forked, without_shutdown = key[5:]
        words = ["fork" if forked else "torchrun", "no" if without_shutdown else "yes"]
        cells = [*key[:5], *words, len(rows), *counts, f"{seconds:.1f}"]
        lines.append(list(map(str, cells)))
    return markdown_table(lines, align="lllrrllr", padded=False)


def main() -> None:
    arguments = parse_arguments()
    names = ("load", "at_once", "forked", "without_shutdown")
    conditions = {name: getattr(arguments, name) for name in names}
    keys = ("case", "engine", "ending", "run")
    rows = [row for row in read(arguments.output) if conditions.items() <= row.items()]
    done = {tuple(row[key] for key in keys) for row in rows}
    # The cases alternate, so that an interrupted soak has as many launches of each.
    planned = itertools.product(range(arguments.runs), arguments.cases, arguments.engines, arguments.endings)
    missing = [(*planned_launch, run) for run, *planned_launch in planned if (*planned_launch, run) not in done]
    failures = 0
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(tqdm(total=len(missing), unit="launch", desc="launching"))
        stack.enter_context(load(arguments.load if missing else 0))
        launches = stack.enter_context(ForkedLaunches()) if arguments.forked and missing else Torchrun()
        pool = ThreadPoolExecutor(arguments.at_once)
        stack.callback(pool.shutdown, cancel_futures=True)
        options = (arguments.without_shutdown, arguments.timeout)
        running = {pool.submit(launch, launches, *key[:3], *options): key for key in missing}
        for future in as_completed(running):
            row = {**dict(zip(keys, running[future], strict=True)), **conditions, **future.result()}
            failures += not is_right(row)
            progress.set_postfix(case=row["case"], engine=row["engine"], ending=row["ending"], failed=failures)
            progress.update()
            with arguments.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
    results = read(arguments.output)
    print(table(results))
    sys.exit(any(not is_right(row) for row in results if not row["without_shutdown"]))


if __name__ == "__main__":
    main()
