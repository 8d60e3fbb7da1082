"""A launcher for soaks: ranks are forked from one process that has imported everything, and end as any Python process.

A short launch by torchrun spends most of its time on imports. Here one server imports; each launch forks an agent from
it, and the agent forks the ranks. A rank runs the script as `__main__`, so that its objects live until the interpreter
shuts down, which then happens in full. Everything else is as with torchrun: the agent holds the store, ends all ranks
when one fails, and passes signals on.

    ForkedLaunches() as launches: launches.start(command, num_processes, environment, log)

Started as a program, this file is the server: each line of stdin is one launch, answered with the agent's pid.
"""

import gc
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ring_hf.launcher import free_port, rank_environment

IMPORTS = ("torch._dynamo", "torch.distributed", "transformers.trainer", "ring_hf.hf.trainer.parallelism_config")
PATIENCE = 30.0  # seconds between the signal and SIGKILL, as in torchrun


class ForkedLaunch:
    """A launch that runs, with what a soak needs of `subprocess.Popen`. The agent leads a session of its own."""

    def __init__(self, pid: int, code: Path) -> None:
        self.pid, self._code = pid, code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code of the agent: 0, or 1 if a rank failed.

        Raises:
            subprocess.TimeoutExpired: if it still runs.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._code.exists():
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self._code), timeout or 0.0)
            time.sleep(0.02)
        return int(self._code.read_text())


class ForkedLaunches:
    """The server; a context, at whose end it stops. Threads may share it."""

    def __enter__(self) -> "ForkedLaunches":
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._lock = threading.Lock()
        return self

    def __exit__(self, *_: Any) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()

    def start(self, command: list[str], num_processes: int, environment: dict[str, str], log: Path) -> ForkedLaunch:
        """Run a script and its arguments on `num_processes` ranks.

        Args:
            log: gets the output of all; the agent writes its exit code beside it.
        """
        assert self._server.stdin is not None and self._server.stdout is not None
        code = log.with_suffix(".code")
        request = {"command": command, "num_processes": num_processes, "environment": environment}
        with self._lock:
            print(json.dumps({**request, "log": str(log), "code": str(code)}), file=self._server.stdin, flush=True)
            answer = self._server.stdout.readline()
        if not answer:
            raise RuntimeError(f"The server of {Path(__file__).name} has ended; its error is above.")
        return ForkedLaunch(int(answer), code)


def serve() -> Path | None:
    """Fork an agent for each request.

    Returns:
        In a rank, the script that it has to run; None in the server, when there are no more requests.
    """
    for name in IMPORTS:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else every rank's collections copy the pages of all imports
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # agents are not waited for
    for line in iter(sys.stdin.readline, ""):
        pid = os.fork()
        if pid == 0:
            return run_agent(json.loads(line))
        print(pid, flush=True)
    return None


def run_agent(request: dict[str, Any]) -> Path:
    """Fork the ranks; return in them only, with the script."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    port, num_processes = free_port(), request["num_processes"]
    pids = []
    for rank in range(num_processes):
        pid = os.fork()
        if pid == 0:
            script, *_ = sys.argv = list(request["command"])
            os.environ.update(request["environment"])
            os.environ.update(rank_environment(rank, num_processes, port))
            elastic = {"RUN_ID": "forked", "RESTART_COUNT": "0", "MAX_RESTARTS": "0", "USE_AGENT_STORE": "True"}
            os.environ.update({f"TORCHELASTIC_{name}": value for name, value in elastic.items()})
            return Path(script)
        pids.append(pid)
    code = supervise(pids, port)
    Path(f"{request['code']}.part").write_text(str(code))
    os.rename(f"{request['code']}.part", request["code"])
    os._exit(code)


def supervise(pids: list[int], port: int) -> int:
    """Hold the store until all ranks have ended, and return the agent's exit code."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)  # after the forks: it has threads
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: received.append(number))
    running, deadline = dict(enumerate(pids)), float("inf")
    codes: dict[int, int] = {}
    while running:
        for rank, pid in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[rank] = os.waitstatus_to_exitcode(status)
                del running[rank]
        failed = any(codes.values())
        if deadline == float("inf") and (failed or received):
            deadline = time.monotonic() + PATIENCE
            send(running, received[0] if received else signal.SIGTERM)
        elif time.monotonic() > deadline:
            send(running, signal.SIGKILL)
        time.sleep(0.05)
    del store
    for rank, code in sorted(codes.items()):
        if code:
            print(f"  rank      : {rank}\n  exitcode  : {code}", flush=True)
    return int(any(codes.values()) or bool(received))


def send(running: dict[int, int], number: int) -> None:
    for pid in running.values():
        os.kill(pid, number)


if __name__ == "__main__":
    script = serve()
    if script is not None:
        sys.path.insert(0, str(script.resolve().parent))
        # As a module, so that the interpreter clears its names when it shuts down, as those of a script.
        spec = importlib.util.spec_from_file_location("__main__", script)
        assert spec is not None and spec.loader is not None
        sys.modules["__main__"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["__main__"])
