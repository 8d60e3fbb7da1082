"""The harness of all tests: gloo processes, launched commands, and scripts as modules.

`run_distributed` keeps its worker processes between calls, and forks them from a server that has imported everything
(imports cost more than most tests); the first traceback of any worker fails the test, and a hang fails it after a
timeout. In workers, as in the tests' own process, `torch.empty` is filled with NaN, so that a buffer nobody received
shows up.
"""

import atexit
import importlib.util
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from ring_hf.launcher import WorkerPool, accelerate_command, free_port, rank_environment
from ring_hf.testing import poison_empty

ROOT = Path(__file__).resolve().parents[2]
_FORKS = multiprocessing.get_context("forkserver")
# The server only imports: a process that has run code of torch cannot be forked safely.
_FORKS.set_forkserver_preload(
    [
        "tests.support.harness",
        "torch._dynamo",
        "transformers.trainer",
        "ring_hf.hf.trainer.parallelism_config",
        "trl",
        "deepspeed",  # Accelerate imports it wherever it unwraps a model
        "tests.support.freeze",
    ]
)


def _initialize(rank: int, world_size: int, port: int) -> None:
    os.environ.update(rank_environment(rank, world_size, port))
    torch.set_num_threads(1)
    poison_empty()
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=300))


def start_workers(world_size: int) -> WorkerPool:
    """Start gloo processes of one group, forked from the server that has imported everything."""
    return WorkerPool(world_size, _initialize, (world_size, free_port()), _FORKS)


_POOLS: dict[int, WorkerPool] = {}


def run_distributed(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Run `fn(rank, world_size, *args)` in `world_size` gloo processes and return their results in rank order.

    `fn` must be a module-level function and everything picklable.

    Raises:
        RuntimeError: with the first worker's traceback.
        TimeoutError: if a worker does not answer. In both cases the workers are replaced.
    """
    if world_size not in _POOLS:
        _POOLS[world_size] = start_workers(world_size)
    try:
        return _POOLS[world_size].run(fn, world_size, *args, timeout=timeout)
    except BaseException:
        _POOLS.pop(world_size).stop()
        raise


@atexit.register
def stop_workers() -> None:
    while _POOLS:
        _POOLS.popitem()[1].stop()


def accelerate_launch(
    command: Sequence[str], num_processes: int, env: dict[str, str] | None = None, timeout: float = 280
) -> subprocess.CompletedProcess[str]:
    """Run `accelerate launch` on the CPU as a user types it; raise `AssertionError` with the output if it fails."""
    launcher = accelerate_command(num_processes)
    return run_command([*launcher, *command], {"ACCELERATE_USE_CPU": "true", **(env or {})}, timeout)


def launch_forked(
    command: Sequence[str], num_processes: int = 1, env: dict[str, str] | None = None, timeout: float = 280
) -> str:
    """Run a script and its arguments as `accelerate_launch` does, in forked processes that have imported everything.

    For cases whose claim is the result and not the launch.

    Returns:
        The output of all ranks.

    Raises:
        AssertionError: if a rank fails, with the output of all.
        TimeoutError: if a rank does not end in time.
    """
    environment = _environment({"ACCELERATE_USE_CPU": "true", **(env or {})})
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"rank{rank}") for rank in range(num_processes)]
        processes = []
        for rank, log in enumerate(logs):
            ranks = rank_environment(rank, num_processes, port) if num_processes > 1 else {}
            processes.append(_FORKS.Process(target=_run_script, args=(list(command), {**environment, **ranks}, log)))
            processes[-1].start()
        running, deadline = set(processes), time.monotonic() + timeout
        try:
            while running and all(process.exitcode in (None, 0) for process in processes):
                if not wait([process.sentinel for process in running], max(0.0, deadline - time.monotonic())):
                    raise TimeoutError(f"{' '.join(command)}: {len(running)} ranks did not end in {timeout:g} s")
                running = {process for process in running if process.exitcode is None}
        finally:
            for process in running:
                process.kill()
                process.join()
        output = "".join(log.read_text() for log in logs if log.exists())
    codes = [process.exitcode for process in processes]
    assert not any(codes), f"{' '.join(command)}: exit codes {codes}\n{output[-12000:]}"
    return output


def _run_script(command: list[str], environment: dict[str, str], log: Path) -> None:
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = command
    script = Path(command[0]).resolve()
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
    atexit._run_exitfuncs()  # as at the end of a program; a forked process skips them


def _environment(overrides: dict[str, str] | None) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **(overrides or {})}


def load_script(name: str) -> ModuleType:
    """Execute `scripts/NAME.py` without its `main` and return its definitions: scripts are programs, no package."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_command(
    command: Sequence[str], env: dict[str, str] | None = None, timeout: float = 280
) -> subprocess.CompletedProcess[str]:
    """Run a command at the root, one thread per process; raise `AssertionError` with the output if it fails."""
    done = subprocess.run(command, env=_environment(env), cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-12000:]}"
    return done
