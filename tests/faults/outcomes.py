"""Start a run with a fault, wait for its processes, and start the same command again."""

import json
import multiprocessing
import os
import re
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ring_hf.hf import find_damage
from ring_hf.launcher import accelerate_command, end_orphans, free_port, rank_environment
from tests.engines.cases import family_of
from tests.engines.conftest import ENVIRONMENTS
from tests.support.harness import _FORKS, ROOT, _environment, _run_script

ENGINES = ("DDP", "FSDP2", "ZeRO-3")
SCRIPT = "tests/faults/train_script.py"
TIMEOUT = 5  # the ddp_timeout of all runs, in seconds
LIMIT = 120.0  # seconds after which a start counts as hanging


@dataclass
class Start:
    """How one start of the command ended.

    Attributes:
        codes: exit codes of the ranks, or of the launcher alone.
        seconds: until the last process had ended.
        output: of each rank, or of all together.
        orphans: the number of its processes that were still alive then.
    """

    codes: list[int | None]
    seconds: float
    output: list[str]
    orphans: int


@dataclass
class Outcome:
    """A run with a fault, and the next start of the same command.

    Attributes:
        checkpoints: by name, the damage of each after the fault; None if it is whole.
        results: of the script, by the next start; None if it failed.
    """

    first: Start
    checkpoints: dict[str, str | None]
    second: Start | None = None
    results: dict[str, Any] | None = field(default=None)

    def lines_of(self, pattern: str) -> list[str]:
        """Return the lines of the first start in which a pattern is."""
        return [line for text in self.first.output for line in text.splitlines() if re.search(pattern, line)]


def play(folder: Path, engine: str, fault: str, forked: bool, again: bool = True) -> Outcome:
    """Run a case.

    Args:
        folder: of the run; it must not exist.
        forked: start the ranks without a launcher, forked from a process that has imported everything; then each
            rank ends by itself, since no launcher ends the others.
        again: start the command a second time.
    """
    folder.mkdir(parents=True)
    command = [SCRIPT, str(folder), engine, fault, str(TIMEOUT)]
    start = _start_forked if forked else _start_launcher
    outcome = Outcome(start(command, engine), {})
    for checkpoint in sorted(folder.glob("run/checkpoint-*")):
        outcome.checkpoints[checkpoint.name] = find_damage(checkpoint)
    if again:
        outcome.second = start(command, engine)
    results = folder / "results.json"
    outcome.results = json.loads(results.read_text()) if results.exists() else None
    return outcome


def _environment_of(engine: str) -> dict[str, str]:
    return _environment({"ACCELERATE_USE_CPU": "true", **ENVIRONMENTS.get(family_of(engine), {})})


def _start_launcher(command: list[str], engine: str) -> Start:
    start_time, log = time.perf_counter(), Path(command[1], "launch.log")
    with log.open("w") as file:  # no pipe: a process that is left over would keep it open
        process = subprocess.Popen(
            [*accelerate_command(2), *command],
            env=_environment_of(engine),
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        process.wait(LIMIT)
        hangs = ""
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        hangs = "\nhangs"
    seconds = time.perf_counter() - start_time
    output = log.read_text(errors="replace") + hangs
    return Start([process.returncode], seconds, [output], end_orphans(command[1]))


def _start_forked(command: list[str], engine: str) -> Start:
    start_time, port = time.perf_counter(), free_port()
    logs = [Path(command[1], f"rank{rank}.log") for rank in range(2)]
    processes = []
    for rank, log in enumerate(logs):
        environment = {**_environment_of(engine), **rank_environment(rank, 2, port)}
        processes.append(_FORKS.Process(target=_run_as_main, args=(command, environment, log)))
        processes[-1].start()
    for process in processes:
        process.join(max(0.0, start_time + LIMIT - time.perf_counter()))
    seconds, codes = time.perf_counter() - start_time, [process.exitcode for process in processes]
    pids = [process.pid for process in processes]
    for process in processes:
        process.kill()
        process.join()
    orphans = sum(code is None for code in codes) + end_orphans(sessions=pids)
    return Start(codes, seconds, [log.read_text(errors="replace") for log in logs], orphans)


def _run_as_main(command: list[str], environment: dict[str, str], log: Path) -> None:
    """Run the script with the interpreter's own handling of exceptions, which a forked process skips."""
    import sys

    os.setsid()  # of all its workers
    multiprocessing.set_start_method("fork", force=True)  # as in a script that was started
    try:
        _run_script(command, environment, log)
    except Exception as error:
        sys.last_type = type(error)
        sys.excepthook(type(error), error, error.__traceback__)
        sys.stderr.flush()
        os._exit(1)
