"""Ring attention against one process with the same cores: time and peak memory, forward + backward, causal.

Two one-thread processes that share the sequence against one two-thread process running
`scaled_dot_product_attention` on all of it, interleaved so that a drifting machine hits both; medians and ratios.
Peak memory is what a process grows by, inputs and all gradients included.

    python scripts/bench_attention.py                       # 4K, 8K, 16K tokens, fp32 and bf16, a few minutes
    python scripts/bench_attention.py --lengths 16384 --layouts zigzag contiguous --dtypes bfloat16 --repeats 7
    python scripts/bench_attention.py --output results/     # also writes attention.json and attention.md there
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ring_hf.parallel import context_attention

SINGLE = "sdpa, 1 process"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384], help="global sequence lengths")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="torch dtypes")
    parser.add_argument("--layouts", nargs="+", default=["zigzag", "contiguous"], help="ring layouts")
    parser.add_argument("--processes", type=int, default=2, help="ring size; the single process gets as many threads")
    parser.add_argument("--heads", type=int, default=8, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=2, help="key/value heads")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each variant, after one warm-up")
    parser.add_argument(
        "--no-overlap", action="store_true", help="also time the ring with exchange and compute in turn"
    )
    parser.add_argument("--output", type=Path, help="folder for attention.json and attention.md")
    return parser.parse_args()


def peak_bytes(reset: bool = False) -> int:
    """This process's peak resident memory since the last reset, as Linux counts it."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def run_once(job: dict[str, Any], rank: int, group: dist.ProcessGroup | None) -> dict[str, float]:
    """One forward and backward of this process's share; inputs and their gradients count as memory, too."""
    settings, dtype = job["settings"], getattr(torch, job["dtype"])
    tokens = job["length"] // (1 if settings is None else job["processes"])
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
    if settings is None:
        sizes = [b - a for a, b in itertools.pairwise(job.get("documents") or (0, tokens))]
        parts = zip(*(x.split(sizes, dim=2) for x in (q, k, v)), strict=True)
        alone = [scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts]
        out = torch.cat(alone, dim=2) if len(alone) > 1 else alone[0]
    else:
        out = context_attention(q, k, v, group=group, cu_seqlens=job.get("documents"), **settings)
    forward = time.perf_counter() - begin
    out.backward(dout)
    if group is not None:
        dist.barrier(group)
    total = time.perf_counter() - begin
    return {"forward": forward, "total": total, "memory": float(peak_bytes() - before)}


class Team:
    """A ring of one-thread processes and the single process it is compared with, ready to run jobs."""

    def __init__(self, processes: int, name: str, env: dict[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.processes = processes
        self.store = Path(tempfile.mkdtemp()) / name
        self.queues = [context.Queue() for _ in range(processes + 1)]
        self.results = context.Queue()
        os.environ.update(env)
        self.workers = []
        for rank, queue in enumerate(self.queues):
            arguments = (rank, processes, str(self.store), queue, self.results)
            self.workers.append(context.Process(target=worker, args=arguments, daemon=True))
            self.workers[-1].start()
        for key in env:
            del os.environ[key]

    def run(self, job: dict[str, Any]) -> dict[str, float]:
        """The slowest (or largest) figure of the processes that take part."""
        ranks = [self.processes] if job["settings"] is None else range(self.processes)
        for rank in ranks:
            self.queues[rank].put(job)
        answers = [self.results.get(timeout=1800) for _ in ranks]
        return {key: max(answer[key] for answer in answers) for key in answers[0]}

    def stop(self) -> None:
        for queue, process in zip(self.queues, self.workers, strict=True):
            queue.put(None)
            process.join(10)


def worker(rank: int, processes: int, store: str, jobs: Any, results: Any) -> None:
    """Ranks below `processes` form the ring with one thread each; the last worker is the single process."""
    torch.set_num_threads(1 if rank < processes else processes)
    group = None
    if rank < processes:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
        group = dist.group.WORLD
    while (job := jobs.get()) is not None:
        results.put(run_once(job, rank, group))


def measure(
    arguments: argparse.Namespace,
    variants: dict[str, dict[str, Any] | None],
    documents: tuple[int, ...] | None = None,
) -> list[dict[str, Any]]:
    """One row per dtype, length and variant: medians, and ratios to the first variant.

    Args:
        variants: by name the settings of `context_attention`, or None for one process.
        documents: cumulative boundaries of packed documents.
    """
    timing = Team(arguments.processes, "timing", {})
    # Large blocks straight from the system and back: peak memory is then what is alive, not what malloc keeps.
    memory = Team(arguments.processes, "memory", {"MALLOC_MMAP_THRESHOLD_": "65536"})
    rows = []
    total = len(arguments.dtypes) * len(arguments.lengths) * (arguments.repeats + 1) * len(variants)
    progress = tqdm(total=total, desc="attention", disable=None)
    for dtype, length in itertools.product(arguments.dtypes, arguments.lengths):
        shape = {**vars(arguments), "length": length, "dtype": dtype, "documents": documents}
        jobs = [{**shape, "variant": name, "settings": settings} for name, settings in variants.items()]
        runs: list[list[dict[str, float]]] = [[] for _ in jobs]
        for repeat in range(arguments.repeats + 1):
            for job, seen in zip(jobs, runs, strict=True):
                if repeat == 0:  # the warm-up of the timing team is when the other team measures memory
                    # What a first call brings in: code and buffers; for documents, compiled code for each length.
                    memory.run(job if documents else {**job, "length": 256})
                    job["peak"] = memory.run(job)["memory"]
                    timing.run(job)
                else:
                    seen.append(timing.run(job))
                progress.update()
        for job, seen in zip(jobs, runs, strict=True):
            row = {key: job[key] for key in ("dtype", "length", "variant")}
            row |= {key: statistics.median(run[key] for run in seen) for key in ("forward", "total")}
            # Run by run, so that both sides of a ratio saw the same machine.
            for key in ("forward", "total"):
                row[f"{key}_ratio"] = statistics.median(a[key] / b[key] for a, b in zip(seen, runs[0], strict=True))
            row |= {"memory": job["peak"], "memory_ratio": job["peak"] / jobs[0]["peak"]}
            rows.append(row)
    progress.close()
    timing.stop()
    memory.stop()
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| dtype | tokens | variant | forward s | ratio | forward + backward s | ratio | peak MiB | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['dtype']} | {row['length']:,} | {row['variant']} "
        f"| {row['forward']:.3f} | {row['forward_ratio']:.2f} | {row['total']:.3f} | {row['total_ratio']:.2f} "
        f"| {row['memory'] / 2**20:.0f} | {row['memory_ratio']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    arguments = parse_arguments()
    ring = {layout: {"layout": layout, "transport": "ring"} for layout in arguments.layouts}
    no_overlap = {f"{name}, no overlap": {**way, "overlap": False} for name, way in ring.items()}
    rows = measure(arguments, {SINGLE: None, **ring, **(no_overlap if arguments.no_overlap else {})})
    report(arguments.output, "attention", f"{table(rows)}\n", rows)


def report(folder: Path | None, name: str, text: str, rows: Any) -> None:
    """Prints the setting and the text; with a folder also writes `name.md` and `name.json` there."""
    setting = {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "command": " ".join(sys.argv),
    }
    text = f"{setting}\n\n{text}"
    print(text)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps({"setting": setting, "rows": rows}, indent=1))
        (folder / f"{name}.md").write_text(text)


if __name__ == "__main__":
    main()
