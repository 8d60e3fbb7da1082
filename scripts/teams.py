"""Processes that time and measure attention: a ring of one-thread processes beside one process with as many threads.

The variants of a comparison run interleaved, so that a drifting machine hits all of them; figures are medians, ratios
are taken run by run. Peak memory is what a process grows by, inputs and all gradients included.
"""

import argparse
import contextlib
import ctypes
import functools
import itertools
import json
import multiprocessing
import os
import platform
import queue
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from ring_hf import shard
from ring_hf.text import markdown_table
from scripts.contenders import CONTENDERS, Attend

Variants = dict[str, dict[str, Any]]
PAGE = 4096.0
_PATIENCE = 3600.0
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


def add_options(parser: argparse.ArgumentParser, lengths: list[int], dtypes: list[str], repeats: int = 5) -> None:
    """The options that every comparison has."""
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths, help="global sequence lengths")
    parser.add_argument("--dtypes", nargs="+", default=dtypes, help="torch dtypes")
    parser.add_argument("--heads", type=int, default=8, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=2, help="key/value heads")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=repeats, help="timed runs of each variant, after one warm-up")
    parser.add_argument("--output", type=Path, help="folder for the results, as JSON and Markdown")


def give_memory_back() -> None:
    """From now on large blocks come straight from the system and go back there: peak memory is then what is alive, not
    what malloc keeps. (glibc's mallopt; elsewhere nothing happens.)"""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**16)


def peak_bytes(reset: bool = False) -> int:
    """This process's peak resident memory since the last reset, as Linux counts it."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def run_once(job: dict[str, Any], rank: int, group: dist.ProcessGroup | None) -> dict[str, float]:
    """One forward and backward of this process's share; inputs and their gradients count as memory, too."""
    contender, dtype = CONTENDERS[job["contender"]], getattr(torch, job["dtype"])
    tokens = job["length"] // (1 if contender.layout is None else job["processes"])
    torch.manual_seed(rank)
    before = peak_bytes(reset=True)
    q, k, v = (
        torch.randn(1, heads, tokens, job["head_dim"], dtype=dtype, requires_grad=True)
        for heads in (job["heads"], job["kv_heads"], job["kv_heads"])
    )
    dout = torch.randn(q.shape, dtype=dtype)
    if group is not None:
        dist.barrier(group)
    begin = time.perf_counter()
    out = contender.attend(q, k, v, group, job)
    forward, forward_peak = time.perf_counter() - begin, peak_bytes() - before
    out.backward(dout)
    if group is not None:
        dist.barrier(group)
    total = time.perf_counter() - begin
    # What stays within pages that were there before reads 0, which is no ratio.
    # The system counts in batches of pages: without the forward pass's the later figure may be the smaller.
    forward_peak = max(forward_peak, int(PAGE))
    memory = {"forward_memory": forward_peak, "memory": max(peak_bytes() - before, forward_peak)}
    return {"forward": forward, "total": total, **memory}


def check_once(job: dict[str, Any], rank: int, group: dist.ProcessGroup | None) -> dict[str, float]:
    """Relative RMS of out, dq, dk and dv of this process's tokens, against the textbook form in fp64."""
    contender, dtype = CONTENDERS[job["contender"]], getattr(torch, job["dtype"])
    generator = torch.Generator().manual_seed(0)
    wide = job["heads"], job["kv_heads"], job["kv_heads"], job["heads"]
    shapes = [(1, heads, job["length"], job["head_dim"]) for heads in wide]
    whole = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    def results(attend: Attend, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        inputs = [x.detach().clone().requires_grad_() for x in tensors[:3]]
        out = attend(*inputs, group, job)
        out.backward(tensors[3])
        return [out.detach(), *(x.grad for x in inputs if x.grad is not None)]

    mine, want = whole, results(CONTENDERS["standard"].attend, whole)
    if contender.layout is not None:
        deal = functools.partial(shard, layout=contender.layout(job), num_ranks=job["processes"], rank=rank, dim=2)
        mine, want = [deal(x) for x in mine], [deal(x) for x in want]
    got = results(contender.attend, [x.to(dtype) for x in mine])
    errors = [(a.double() - b).norm() / b.norm() for a, b in zip(got, want, strict=True)]
    return dict(zip(("out", "dq", "dk", "dv"), map(float, errors), strict=True))


def worker(rank: int, processes: int, store: str, measures_memory: bool, jobs: Any, results: Any) -> None:
    """Ranks below `processes` form the ring with one thread each; the last worker is the single process."""
    if measures_memory:
        give_memory_back()
    torch.set_num_threads(1 if rank < processes else processes)
    group = None
    if rank < processes:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
        group = dist.group.WORLD
    while (job := jobs.get()) is not None:
        results.put((check_once if job.get("check") else run_once)(job, rank, group))


class WorkerPool:
    """A ring of one-thread processes and the single process it is compared with, ready to run jobs."""

    def __init__(
        self,
        processes: int,
        measures_memory: bool = False,
        target: Callable[..., None] = worker,
        prepare: Callable[[Path], Any] | None = None,
    ) -> None:
        # Forked from a process that has imported the script and computed nothing: imports take longest.
        context = multiprocessing.get_context("forkserver")
        self.processes = processes
        self.store = Path(tempfile.mkdtemp()) / "store"
        if prepare is not None:
            prepare(self.store)
        self.queues = [context.Queue() for _ in range(processes + 1)]
        self.results = context.Queue()
        self.workers = []
        for rank, jobs in enumerate(self.queues):
            arguments = (rank, processes, str(self.store), measures_memory, jobs, self.results)
            self.workers.append(context.Process(target=target, args=arguments, daemon=True))
            self.workers[-1].start()

    def run(self, job: dict[str, Any], alone: bool = False) -> dict[str, float]:
        """The slowest (or largest) figure of the ring, or that of the single process."""
        ranks = [self.processes] if alone else range(self.processes)
        for rank in ranks:
            self.queues[rank].put(job)
        answers = [self._answer(job) for _ in ranks]
        return {key: max(answer[key] for answer in answers) for key in answers[0]}

    def _answer(self, job: dict[str, Any]) -> dict[str, float]:
        waited = 0.0
        while waited < _PATIENCE:
            try:
                return self.results.get(timeout=5)  # type: ignore[no-any-return]
            except queue.Empty:
                waited += 5
                if dead := [n for n, process in enumerate(self.workers) if not process.is_alive()]:
                    raise RuntimeError(f"process {dead} died while running {job}") from None
        raise TimeoutError(f"no answer within {_PATIENCE:.0f} s to {job}")

    def stop(self) -> None:
        for jobs, process in zip(self.queues, self.workers, strict=True):
            jobs.put(None)
            process.join(10)


def alone(job: dict[str, Any]) -> bool:
    """Whether a job is for the single process."""
    return CONTENDERS[job["contender"]].layout is None


def measure(
    arguments: argparse.Namespace, variants: Variants, documents: tuple[int, ...] | None = None
) -> list[dict[str, Any]]:
    """One row per dtype, length and variant: medians, and ratios to the first variant.

    Args:
        variants: by name a job: `contender`, a key of `CONTENDERS`, `settings` if it takes any, and `longest`, the
            length above which it is left out.
        documents: cumulative boundaries of packed documents.
    """
    timing, memory = WorkerPool(arguments.processes), WorkerPool(arguments.processes, measures_memory=True)
    problems = list(itertools.product(arguments.dtypes, arguments.lengths))
    progress = tqdm(total=len(problems) * (arguments.repeats + 1) * len(variants), desc="attention", disable=None)
    rows = []
    for dtype, length in problems:
        shape = {**vars(arguments), "length": length, "dtype": dtype, "documents": documents}
        jobs = [{**shape, "variant": name, **variant} for name, variant in variants.items()]
        jobs = [job for job in jobs if length <= job.get("longest", length)]
        runs: list[list[dict[str, float]]] = [[] for _ in jobs]
        for repeat in range(arguments.repeats + 1):
            for job, seen in zip(jobs, runs, strict=True):
                if repeat == 0:  # the warm-up of the timing team is when the other team measures memory
                    # What a first call brings in: code and buffers; for documents, compiled code for each length.
                    memory.run(job if documents else {**job, "length": 256}, alone(job))
                    job["peaks"] = memory.run(job, alone(job))
                    timing.run(job, alone(job))
                else:
                    seen.append(timing.run(job, alone(job)))
                progress.update()
        for job, seen in zip(jobs, runs, strict=True):
            row = {key: job[key] for key in ("dtype", "length", "variant")}
            row |= {key: statistics.median(run[key] for run in seen) for key in ("forward", "total")}
            # Run by run, so that both sides of a ratio saw the same machine.
            for key in ("forward", "total"):
                row[f"{key}_ratio"] = statistics.median(a[key] / b[key] for a, b in zip(seen, runs[0], strict=True))
            row |= {key: job["peaks"][key] for key in ("forward_memory", "memory")}
            rows.append({**row, "memory_ratio": job["peaks"]["memory"] / jobs[0]["peaks"]["memory"]})
    progress.close()
    timing.stop()
    memory.stop()
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one line per row."""
    cells = [
        ["dtype", "tokens", "variant", "forward s", "ratio", "forward + backward s", "ratio", "peak MiB", "ratio"]
    ]
    for row in rows:
        line = [row["dtype"], f"{row['length']:,}", row["variant"]]
        line += [f"{row['forward']:.3f}", f"{row['forward_ratio']:.2f}"]
        line += [f"{row['total']:.3f}", f"{row['total_ratio']:.2f}"]
        cells.append([*line, f"{row['memory'] / 2**20:.0f}", f"{row['memory_ratio']:.2f}"])
    return markdown_table(cells, align="lrlr", padded=False)


def setting() -> dict[str, Any]:
    """What a result must say about where it comes from."""
    found = Path("/proc/cpuinfo")
    lines = found.read_text().splitlines() if found.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "command": shlex.join([Path(sys.argv[0]).name, *_without_output(sys.argv[1:])]),
    }


def _without_output(arguments: list[str]) -> list[str]:
    """Where results went says nothing about them."""
    place = arguments.index("--output") if "--output" in arguments else len(arguments)
    return arguments[:place] + arguments[place + 2 :]


def report(folder: Path | None, name: str, text: str, rows: Any) -> None:
    """Prints the setting and the text; with a folder also writes `name.md` and `name.json` there."""
    said = setting()
    text = f"{', '.join(f'{key} {value}' for key, value in said.items())}\n\n{text}"
    print(text)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps({"setting": said, "rows": rows}, indent=1))
        (folder / f"{name}.md").write_text(text)
