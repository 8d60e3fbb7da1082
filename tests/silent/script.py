"""Run cases one after the other in one launch, each in a separate process.

    accelerate launch ... tests/silent/script.py MODE FOLDER CASE [CASE ...]

Importing torch and Transformers takes longer than most cases, so the launched processes import once and fork a child
for every case. The child starts without any configuration, and may hang, be killed or leave its process group broken.
Each rank writes FOLDER/CASE.rank0.json (a `Record`), and its output to FOLDER/CASE.rank0.log.
"""

import faulthandler
import gc
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import deepspeed  # noqa: F401 (Accelerate imports it in each child)
import psutil
from transformers import set_seed

import ring_hf  # noqa: F401 (registers the backends, as a user's script does)
from tests.silent.cases import BY_NAME, Case
from tests.silent.setting import Setting

GRACE = 10.0  # seconds after which a rank no longer waits for another


def await_file(path: Path, seconds: float) -> bool:
    """Return whether the file exists before the timeout."""
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return path.exists()


class Rank:
    """This process among those of its launch."""

    def __init__(self, mode: str, folder: Path) -> None:
        self.mode = mode
        self.folder = folder
        self.index = int(os.environ.get("RANK", "0"))
        self.count = int(os.environ.get("WORLD_SIZE", "1"))

    def path(self, case: Case, kind: str, index: int | None = None) -> Path:
        return self.folder / f"{case.name}.rank{self.index if index is None else index}.{kind}"

    def run(self, case: Case) -> None:
        """Fork a child for the case, and wait for it and for the other ranks."""
        child = os.fork()
        if child == 0:
            self._run_in_child(case)
        deadline = time.monotonic() + case.timeout + 2 * GRACE
        show_workers = deadline - 2 * GRACE - 4
        while (exit_status := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > show_workers:  # show where the workers of a data loader are
                for worker in psutil.Process(child).children(recursive=True):
                    worker.send_signal(signal.SIGUSR1)
                    time.sleep(0.5)  # so that their lines do not mix
                show_workers = float("inf")
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                exit_status = os.waitpid(child, 0)
                break
            time.sleep(0.02)
        result = self.path(case, "json")
        if not result.exists():
            result.write_text(json.dumps({"error": self._describe_exit(case, exit_status[1])}))
        for index in range(self.count):
            await_file(self.path(case, "json", index), case.timeout + 3 * GRACE)

    def _describe_exit(self, case: Case, status: int) -> str:
        code = os.waitstatus_to_exitcode(status)
        stack = self.path(case, "stack")
        lines = stack.read_text().splitlines() if stack.exists() else []
        if lines and "Timeout" in lines[0]:
            workers = self.path(case, "workers").read_text()
            details = f", its workers:\n{workers}" if workers else ""
            return f"Hang: still in {_innermost(lines)} after {case.timeout} s{details}"
        return f"Killed: {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"

    def _run_in_child(self, case: Case) -> None:
        log = os.open(self.path(case, "log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if self.count > 1:
            self._rendezvous(case)
        workers = self.path(case, "workers").open("w")
        faulthandler.register(signal.SIGUSR1, file=workers)  # inherited by workers of a data loader
        stack = self.path(case, "stack").open("w")
        faulthandler.dump_traceback_later(case.timeout, exit=True, file=stack)
        case_folder = self.folder / f"{case.name}.rank{self.index}"
        case_folder.mkdir(exist_ok=True)
        setting = Setting(self.mode, case_folder)
        set_seed(0)
        try:
            case.run(setting)
        except Exception as error:
            import traceback

            traceback.print_exc()
            setting.record.fail(error)
        setting.record.write(self.path(case, "json"))
        if setting.record.error is None:  # other ranks may still have to receive from this one
            for index in range(self.count):
                await_file(self.path(case, "json", index), GRACE)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def _rendezvous(self, case: Case) -> None:
        """Agree with the children of other ranks on a port for this case."""
        path = self.path(case, "port", 0)
        if self.index == 0:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                partial = path.with_suffix(".partial")
                partial.write_text(str(probe.getsockname()[1]))
            partial.rename(path)
        await_file(path, case.timeout)
        os.environ["MASTER_PORT"] = path.read_text()
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)


def _innermost(lines: list[str]) -> str:
    """Return the innermost frames of the main thread in a traceback of `faulthandler`."""
    start = max(i for i, line in enumerate(lines) if "most recent call first" in line)
    frames = [line.split() for line in lines[start + 1 :] if line.startswith("  File")]
    names = [f"{Path(frame[1].strip(',').strip(chr(34))).name}:{frame[-1]}" for frame in frames]
    return " < ".join(names[:6])


def main() -> None:
    gc.freeze()  # see tests/support/freeze.py
    mode, folder, *names = sys.argv[1:]
    rank = Rank(mode, Path(folder))
    for name in names:
        rank.run(BY_NAME[name])


if __name__ == "__main__":
    main()
