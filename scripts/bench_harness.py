"""Processes that time and measure attention: a ring of one-thread processes beside one process with as many threads.

The variants of a comparison run interleaved, so that a machine whose speed drifts affects all of them; figures are
medians, ratios are taken run by run. Peak memory is the growth of a process, inputs and all gradients included.
"""

import argparse
import contextlib
import ctypes
import functools
import itertools
import json
import os
import platform
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
from ring_hf.geometry import Mask, ShardedSequence
from ring_hf.launcher import WorkerPool
from ring_hf.testing import dense_attention, dense_mask, forward_backward
from ring_hf.text import markdown_table
from scripts.baselines import BASELINES

Job = dict[str, Any]
Variants = dict[str, Job]
PAGE = 4096.0  # bytes
_TIMEOUT = 3600.0  # seconds
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


def add_options(parser: argparse.ArgumentParser, lengths: list[int], dtypes: list[str], repeats: int = 5) -> None:
    """Add the options that every comparison has."""
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths, help="global sequence lengths")
    parser.add_argument("--dtypes", nargs="+", default=dtypes, help="torch dtypes")
    parser.add_argument("--heads", type=int, default=8, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=2, help="key/value heads")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=repeats, help="timed runs of each variant, after one warm-up")
    parser.add_argument("--output", type=Path, help="folder for the results, as JSON and Markdown")


def return_freed_memory() -> None:
    """From now on map large blocks and unmap them when they are freed, so that peak memory is that of live tensors.

    Uses glibc's mallopt; does nothing elsewhere.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**16)


def peak_bytes(reset: bool = False) -> int:
    """Return this process's peak resident memory in bytes since the last reset, as Linux counts it."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def run_once(rank: int, job: Job) -> dict[str, float]:
    """Run one forward and backward of this process's share and return seconds and bytes.

    Memory includes the inputs and their gradients.
    """
    baseline, dtype, group = BASELINES[job["baseline"]], getattr(torch, job["dtype"]), _group()
    tokens = job["length"] // (1 if baseline.layout is None else job["processes"])
    torch.manual_seed(rank)
    before = peak_bytes(reset=True)
    q, k, v = (
        torch.randn(1, heads, tokens, job["head_dim"], dtype=dtype, requires_grad=True)
        for heads in (job["heads"], job["kv_heads"], job["kv_heads"])
    )
    dout = torch.randn(q.shape, dtype=dtype)
    if group is not None:
        dist.barrier(group)
    start = time.perf_counter()
    out = baseline.attend(q, k, v, group, job)
    forward, forward_peak = time.perf_counter() - start, peak_bytes() - before
    out.backward(dout)
    if group is not None:
        dist.barrier(group)
    total = time.perf_counter() - start
    # Growth within pages that existed before reads 0, which gives no ratio. The system counts in batches of pages, so
    # without the maximum the later figure may be the smaller one.
    forward_peak = max(forward_peak, int(PAGE))
    memory = {"forward_memory": forward_peak, "memory": max(peak_bytes() - before, forward_peak)}
    return {"forward": forward, "total": total, **memory}


def check_once(rank: int, job: Job) -> dict[str, float]:
    """Return the relative RMS of out, dq, dk and dv of this process's tokens against dense attention in fp64."""
    baseline, dtype, group = BASELINES[job["baseline"]], getattr(torch, job["dtype"]), _group()
    generator = torch.Generator().manual_seed(0)
    head_counts = job["heads"], job["kv_heads"], job["kv_heads"], job["heads"]
    shapes = [(1, heads, job["length"], job["head_dim"]) for heads in head_counts]
    whole = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    exact = functools.partial(
        dense_attention,
        visible_BSS=dense_mask(ShardedSequence("contiguous", job["length"], 1), Mask(), 1),
        scale=job["head_dim"] ** -0.5,
    )
    out, _, *grads = forward_backward(exact, *whole[:3], dout=whole[3])
    own, want = whole, [out, *grads]
    if baseline.layout is not None:
        cut = functools.partial(shard, layout=baseline.layout(job), num_ranks=job["processes"], rank=rank, dim=2)
        own, want = [cut(x) for x in own], [cut(x) for x in want]
    *qkv, dout = (x.to(dtype) for x in own)
    leaves = [x.detach().requires_grad_() for x in qkv]
    got = baseline.attend(*leaves, group, job)
    results = got.detach(), *torch.autograd.grad(got, leaves, dout)
    errors = [(a.double() - b).norm() / b.norm() for a, b in zip(results, want, strict=True)]
    return dict(zip(("out", "dq", "dk", "dv"), map(float, errors), strict=True))


def _group() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_initialized() else None


def initialize_attention(rank: int, processes: int, init_method: str, measures_memory: bool) -> None:
    """Make ranks below `processes` a gloo group of one-thread processes; the last rank is the single process."""
    if measures_memory:
        return_freed_memory()
    torch.set_num_threads(1 if rank < processes else processes)
    if rank < processes:
        dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=processes)


def new_store() -> str:
    """Return the `init_method` of a new process group: a file, since another program may take a free port."""
    return f"file://{tempfile.mkdtemp()}/store"


class ComparisonPool:
    """A ring of one-thread processes and the single process it is compared with, ready to run jobs.

    Args:
        processes: ranks of the ring.
        function: `function(rank, job)` runs a job in a worker and returns its figures; the single process has the
            rank `processes`.
        measures_memory: whether freed memory goes back to the system at once.
        initialize: called first in each worker, with the arguments of `initialize_attention`.
        address: where the ranks meet, for `initialize`; None for a new file.
    """

    def __init__(
        self,
        processes: int,
        function: Callable[[int, Job], dict[str, float]] = run_once,
        measures_memory: bool = False,
        initialize: Callable[[int, int, str, bool], None] = initialize_attention,
        address: str | None = None,
    ) -> None:
        self.processes, self._function = processes, function
        self._pool = WorkerPool(processes + 1, initialize, (processes, address or new_store(), measures_memory))

    def run(self, job: Job, alone: bool = False) -> dict[str, float]:
        """Return the slowest (or largest) figures of the ring, or with `alone` those of the single process."""
        ranks = [self.processes] if alone else range(self.processes)
        answers = self._pool.run(self._function, job, ranks=ranks, timeout=_TIMEOUT)
        return {key: max(answer[key] for answer in answers) for key in answers[0]}

    def stop(self) -> None:
        """End all processes."""
        self._pool.stop(patience=10)


def runs_alone(job: Job) -> bool:
    """Return whether a job is for the single process."""
    return BASELINES[job["baseline"]].layout is None


def measure(
    arguments: argparse.Namespace, variants: Variants, documents: tuple[int, ...] | None = None
) -> list[dict[str, Any]]:
    """Return one row per dtype, length and variant: medians, and ratios to the first variant.

    Args:
        variants: by name a job: `baseline`, a key of `BASELINES`, `settings` if it takes any, and `longest`, the
            length above which it is left out.
        documents: cumulative boundaries of packed documents.
    """
    timing = ComparisonPool(arguments.processes)
    memory = ComparisonPool(arguments.processes, measures_memory=True)
    problems = list(itertools.product(arguments.dtypes, arguments.lengths))
    progress = tqdm(total=len(problems) * (arguments.repeats + 1) * len(variants), desc="attention", disable=None)
    rows = []
    for dtype, length in problems:
        shape = {**vars(arguments), "length": length, "dtype": dtype, "documents": documents}
        jobs = [{**shape, "variant": name, **variant} for name, variant in variants.items()]
        jobs = [job for job in jobs if length <= job.get("longest", length)]
        runs: list[list[dict[str, float]]] = [[] for _ in jobs]
        for repeat in range(arguments.repeats + 1):
            for job, timed in zip(jobs, runs, strict=True):
                if repeat == 0:  # while the timing pool warms up, the other pool measures memory
                    # A first call loads code and makes buffers; documents compile code for each length.
                    memory.run(job if documents else {**job, "length": 256}, runs_alone(job))
                    job["peaks"] = memory.run(job, runs_alone(job))
                    timing.run(job, runs_alone(job))
                else:
                    timed.append(timing.run(job, runs_alone(job)))
                progress.update()
        for job, timed in zip(jobs, runs, strict=True):
            row = {key: job[key] for key in ("dtype", "length", "variant")}
            row |= {key: statistics.median(run[key] for run in timed) for key in ("forward", "total")}
            # Run by run, so that both sides of a ratio saw the same machine.
            for key in ("forward", "total"):
                row[f"{key}_ratio"] = statistics.median(a[key] / b[key] for a, b in zip(timed, runs[0], strict=True))
            row |= {key: job["peaks"][key] for key in ("forward_memory", "memory")}
            rows.append({**row, "memory_ratio": job["peaks"]["memory"] / jobs[0]["peaks"]["memory"]})
    progress.close()
    timing.stop()
    memory.stop()
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table with one line per row."""
    cells = [
        ["dtype", "tokens", "variant", "forward s", "ratio", "forward + backward s", "ratio", "peak MiB", "ratio"]
    ]
    for row in rows:
        line = [row["dtype"], f"{row['length']:,}", row["variant"]]
        line += [f"{row['forward']:.3f}", f"{row['forward_ratio']:.2f}"]
        line += [f"{row['total']:.3f}", f"{row['total_ratio']:.2f}"]
        cells.append([*line, f"{row['memory'] / 2**20:.0f}", f"{row['memory_ratio']:.2f}"])
    return markdown_table(cells, align="lrlr", padded=False)


def environment_info() -> dict[str, Any]:
    """Return date, versions, processor and command of this run, which every result states."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
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
    """Return the arguments without the folder of the results, which says nothing about them."""
    index = arguments.index("--output") if "--output" in arguments else len(arguments)
    return arguments[:index] + arguments[index + 2 :]


def report(folder: Path | None, name: str, text: str, rows: Any) -> None:
    """Print environment and text; with a folder also write `name.md` and `name.json` there."""
    info = environment_info()
    text = f"{', '.join(f'{key} {value}' for key, value in info.items())}\n\n{text}"
    print(text)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps({"setting": info, "rows": rows}, indent=1))
        (folder / f"{name}.md").write_text(text)
