"""The one harness of all tests: gloo processes, launched commands, and numerical comparison.

`run_distributed` keeps its worker processes between calls, and forks them from a server that has imported everything
(imports cost more than most tests); the first traceback of any worker fails the test, and a hang fails it after a
timeout. In workers, as in the tests' own process, `torch.empty` is filled with NaN, so that a buffer nobody received
shows up.
"""

import atexit
import functools
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ring_hf.parallel import buffers

ROOT = Path(__file__).resolve().parents[1]
_FORKS = multiprocessing.get_context("forkserver")
# In the server, which runs no code of torch: a process that has cannot be forked safely.
_FORKS.set_forkserver_preload(
    ["tests.harness", "torch._dynamo", "transformers.trainer", "ring_hf.hf.trainer.parallelism_config"]
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def poison_empty() -> None:
    """Makes `torch.empty`, `empty_like`, `Tensor.new_empty` and the buffers of exchanges NaN where they can be."""
    with torch.device("meta"):
        torch.empty(0)  # torch now remembers the true functions as those that a device context redirects

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() and x.device.type == "cpu" else x

        return made

    torch.empty = poisoned(torch.empty)
    torch.empty_like = poisoned(torch.empty_like)
    torch.Tensor.new_empty = poisoned(torch.Tensor.new_empty)  # type: ignore[method-assign]
    acquire = buffers.Pool.acquire

    @functools.wraps(acquire)
    def poisoned_acquire(*args: Any) -> buffers.Buffer:
        buffer = acquire(*args)
        if buffer.flat.is_floating_point():
            buffer.flat.fill_(torch.nan)
        return buffer

    buffers.Pool.acquire = poisoned_acquire  # type: ignore[method-assign]


def _worker(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    poison_empty()
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=300))
    while True:
        try:
            fn, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, fn(rank, world_size, *args)))
        except BaseException:
            pipe.send((False, f"rank {rank} of {world_size}:\n{traceback.format_exc()}"))


class _Workers:
    def __init__(self, world_size: int) -> None:
        port = free_port()
        self.processes, self.pipes = [], []
        for rank in range(world_size):
            ours, theirs = _FORKS.Pipe()
            process = _FORKS.Process(target=_worker, args=(rank, world_size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def run(self, fn: Callable[..., Any], args: tuple, timeout: float) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((fn, args))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        while len(results) < len(self.pipes):
            waiting = [rank for rank in range(len(self.pipes)) if rank not in results]
            ready = wait([self.pipes[rank] for rank in waiting], timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"{fn.__name__}: ranks {waiting} did not answer in {timeout:g} s")
            for rank in waiting:
                if self.pipes[rank] not in ready:
                    continue
                try:
                    fine, result = self.pipes[rank].recv()
                except EOFError:
                    fine, result = False, f"rank {rank} died"
                if not fine:
                    raise RuntimeError(result)
                results[rank] = result
        return [results[rank] for rank in range(len(self.pipes))]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


_POOL: dict[int, _Workers] = {}


def run_distributed(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Runs `fn(rank, world_size, *args)` in `world_size` gloo processes and returns their results in rank order.

    `fn` must be a module-level function and everything picklable. Raises `RuntimeError` with the first worker's
    traceback, or `TimeoutError`; either way the workers are replaced.
    """
    if world_size not in _POOL:
        _POOL[world_size] = _Workers(world_size)
    try:
        return _POOL[world_size].run(fn, args, timeout)
    except BaseException:
        _POOL.pop(world_size).stop()
        raise


@atexit.register
def stop_workers() -> None:
    while _POOL:
        _POOL.popitem()[1].stop()


def accelerate_launch(
    command: Sequence[str], num_processes: int, env: dict[str, str] | None = None, timeout: float = 280
) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` on CPU as a user types it; raises `AssertionError` with the output if it fails."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    launcher += ["--dynamo_backend", "no", "--num_processes", str(num_processes)]
    launcher += ["--multi_gpu", "--main_process_port", str(free_port())] if num_processes > 1 else ["--cpu"]
    return run_command([*launcher, *command], {"ACCELERATE_USE_CPU": "true", **(env or {})}, timeout)


def launch_forked(
    words: Sequence[str], num_processes: int = 1, env: dict[str, str] | None = None, timeout: float = 280
) -> str:
    """Run a script and its arguments as `accelerate_launch` does, in processes that need not import anything first.

    For cases whose claim is the result and not the launch. Return the output of all ranks; raise `AssertionError`
    with it if one fails, or `TimeoutError`.
    """
    environment = _environment({"ACCELERATE_USE_CPU": "true", **(env or {})})
    if num_processes > 1:
        world = str(num_processes)
        environment |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
        environment["MASTER_PORT"] = str(free_port())
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"rank{rank}") for rank in range(num_processes)]
        processes = []
        for rank, log in enumerate(logs):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if num_processes > 1 else {}
            processes.append(_FORKS.Process(target=_run_script, args=(list(words), {**environment, **ranks}, log)))
            processes[-1].start()
        running, deadline = set(processes), time.monotonic() + timeout
        try:
            while running and all(process.exitcode in (None, 0) for process in processes):
                if not wait([process.sentinel for process in running], max(0.0, deadline - time.monotonic())):
                    raise TimeoutError(f"{' '.join(words)}: {len(running)} ranks did not end in {timeout:g} s")
                running = {process for process in running if process.exitcode is None}
        finally:
            for process in running:
                process.kill()
                process.join()
        output = "".join(log.read_text() for log in logs if log.exists())
    codes = [process.exitcode for process in processes]
    assert not any(codes), f"{' '.join(words)}: exit codes {codes}\n{output[-12000:]}"
    return output


def _run_script(words: list[str], environment: dict[str, str], log: Path) -> None:
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = words
    script = Path(words[0]).resolve()
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
    atexit._run_exitfuncs()  # as at the end of a program; a forked process would leave them out


def _environment(more: dict[str, str] | None) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **(more or {})}


def run_command(
    command: Sequence[str], env: dict[str, str] | None = None, timeout: float = 280
) -> subprocess.CompletedProcess[str]:
    """A command run at the root, one thread per process; raises `AssertionError` with the output if it fails."""
    done = subprocess.run(command, env=_environment(env), cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-12000:]}"
    return done


def rms_ratio(got: torch.Tensor, want: torch.Tensor) -> float:
    """Root mean square of the difference over that of `want`, both in fp64."""
    got, want = got.double(), want.double()
    scale = want.square().mean().sqrt().item()
    apart = (got - want).square().mean().sqrt().item()
    return apart / scale if scale else apart


def assert_close(
    name: str, got: torch.Tensor, want: torch.Tensor, rms: float | None = None, max_abs: float | None = None
) -> float:
    """Fails unless `got` is as close to `want` as asked (relative RMS, largest difference). Returns the RMS ratio."""
    assert rms is not None or max_abs is not None, "nothing to compare with"
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    ratio = rms_ratio(got, want)
    apart = (got.double() - want.double()).abs().max().item() if got.numel() else 0.0
    print(f"{name}: max diff {apart:.3e}, rms ratio {ratio:.3e}")
    # Written so that NaN fails.
    assert rms is None or ratio <= rms, f"{name}: rms ratio {ratio:.3e} is above {rms:.1e} (max diff {apart:.3e})"
    assert max_abs is None or apart <= max_abs, f"{name}: max diff {apart:.3e} is above {max_abs:.1e}"
    return ratio
