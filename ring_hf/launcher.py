"""Processes with ranks on this machine: one launcher for `ring-hf verify`, the benchmarks and the tests.

`WorkerPool` keeps processes that run functions and tells the caller which rank failed, died or does not answer.
`accelerate_command` starts scripts as users do. No function here imports torch.
"""

import contextlib
import multiprocessing
import multiprocessing.context
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

_pipe_to_caller: Connection | None = None  # of a worker


class WorkerError(RuntimeError):
    """A worker raised an exception or died.

    Attributes:
        rank: of the worker.
        status: the last text that it passed to `report_status`, or "starting".
        reason: type and text of its exception in one line.
    """

    def __init__(self, rank: int, num_workers: int, status: str, reason: str, details: str) -> None:
        super().__init__(f"rank {rank} of {num_workers}:\n{details}")
        self.rank, self.status, self.reason = rank, status, reason


class WorkerTimeout(TimeoutError):
    """Workers did not answer in time.

    Attributes:
        statuses: by rank, the last text that a silent worker passed to `report_status`, or "starting".
    """

    def __init__(self, function_name: str, statuses: dict[int, str], timeout: float) -> None:
        super().__init__(f"{function_name}: ranks {list(statuses)} did not answer in {timeout:g} s")
        self.statuses = statuses


def free_port() -> int:
    """Return a TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return the environment variables by which a launcher tells a process its rank on one machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def accelerate_command(num_processes: int) -> list[str]:
    """Return `accelerate launch` with the options of one machine; the script (or `-m module`) is to follow."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--num_processes", str(num_processes)]
    return command + (["--multi_gpu", "--main_process_port", str(free_port())] if num_processes > 1 else ["--cpu"])


def end_orphans(argument: str | None = None, sessions: Sequence[int | None] = (), patience: float = 10) -> int:
    """Kill the processes that a launch has left behind.

    Args:
        argument: in their command line.
        sessions: ids of the sessions that they may belong to instead.
        patience: seconds in which they may still end by themselves.

    Returns:
        How many there were.
    """
    import psutil  # comes with Accelerate

    deadline = time.monotonic() + patience
    while True:
        processes = [
            process
            for process in psutil.process_iter(["cmdline", "status"])
            if argument in (process.info["cmdline"] or []) or _session_of(process.pid) in sessions
            if process.info["status"] != psutil.STATUS_ZOMBIE
        ]
        if not processes or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return len(processes)


def _session_of(pid: int) -> int:
    """Return the session of a process; -1 if it has ended."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


def report_status(text: str) -> None:
    """In a worker, tell the caller what comes next; a timeout or an error then names it."""
    if _pipe_to_caller is not None:
        _pipe_to_caller.send(("status", text))


class WorkerPool:
    """Processes with ranks from 0 on that run functions until the pool is stopped.

    Args:
        num_workers: how many.
        initialize: called in each worker as `initialize(rank, *arguments)` before its first function.
        arguments: of `initialize`, picklable.
        context: of multiprocessing. The default forks from a process that has imported the main script and has
            computed nothing, since imports take longest.
    """

    def __init__(
        self,
        num_workers: int,
        initialize: Callable[..., None],
        arguments: Sequence[Any] = (),
        context: multiprocessing.context.BaseContext | None = None,
    ) -> None:
        context = context or multiprocessing.get_context("forkserver")
        self.processes: list[Any] = []
        self._pipes: list[Connection] = []
        for rank in range(num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(  # type: ignore[attr-defined]
                target=_serve, args=(rank, initialize, tuple(arguments), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.processes.append(process)
            self._pipes.append(ours)

    def run(
        self, function: Callable[..., Any], *arguments: Any, timeout: float, ranks: Sequence[int] | None = None
    ) -> list[Any]:
        """Call `function(rank, *arguments)` in workers and return the results in the order of `ranks`.

        Args:
            function: of a module, so that it can be pickled.
            timeout: seconds until all must have answered.
            ranks: of the workers; None for all.

        Raises:
            WorkerError: if a worker raises an exception or dies.
            WorkerTimeout: if one does not answer in time. After either, stop the pool.
        """
        ranks = range(len(self._pipes)) if ranks is None else ranks
        for rank in ranks:
            self._pipes[rank].send((function, arguments))
        return receive_results([self._pipes[rank] for rank in ranks], ranks, len(self._pipes), function, timeout)

    def stop(self, patience: float = 0.0) -> None:
        """End the workers: those that have not returned `patience` seconds after their pipe was closed are killed."""
        for pipe in self._pipes:
            pipe.close()
        deadline = time.monotonic() + patience
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()


def receive_results(
    pipes: Sequence[Connection],
    ranks: Sequence[int],
    num_workers: int,
    function: Callable[..., Any],
    timeout: float,
) -> list[Any]:
    """Return what each of `pipes` sends as ("done", result), in their order; see `WorkerPool.run`.

    Raises:
        WorkerError: if a pipe brings an exception or ends.
        WorkerTimeout: if results are missing after `timeout` seconds.
    """
    statuses = dict.fromkeys(ranks, "starting")
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(results) < len(ranks):
        pending = {pipe: rank for rank, pipe in zip(ranks, pipes, strict=True) if rank not in results}
        ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
        if not ready:
            silent = {rank: statuses[rank] for rank in pending.values()}
            raise WorkerTimeout(function.__name__, silent, timeout)
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pending[pipe]
            try:
                kind, value = pipe.recv()
            except EOFError:
                kind, value = "failed", ("the process ended", f"rank {rank} died")
            if kind == "failed":
                raise WorkerError(rank, num_workers, statuses[rank], *value)
            if kind == "done":
                results[rank] = value
            else:
                statuses[rank] = value
    return [results[rank] for rank in ranks]


def _serve(rank: int, initialize: Callable[..., None], arguments: tuple[Any, ...], pipe: Connection) -> None:
    global _pipe_to_caller
    _pipe_to_caller = pipe
    try:
        initialize(rank, *arguments)
    except BaseException as error:
        _send_failure(pipe, error)
        return
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("done", function(rank, *arguments)))
        except BaseException as error:
            _send_failure(pipe, error)


def _send_failure(pipe: Connection, error: BaseException) -> None:
    pipe.send(("failed", (f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))))
