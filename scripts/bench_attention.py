"""Ring attention against one process with the same cores: time and peak memory, forward + backward, causal.

Two one-thread processes that share the sequence against one two-thread process running
`scaled_dot_product_attention` on all of it, interleaved so that a drifting machine hits both; medians and ratios.

    python scripts/bench_attention.py                       # 4K, 8K, 16K tokens, fp32 and bf16, a few minutes
    python scripts/bench_attention.py --lengths 16384 --layouts zigzag contiguous --dtypes bfloat16 --repeats 7
    python scripts/bench_attention.py --output results/     # also writes attention.json and attention.md there
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import threading
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


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class PeakMemory:
    """Largest growth of this process's resident memory while the block runs, sampled every 2 ms."""

    def __enter__(self) -> "PeakMemory":
        self.growth, self._done = 0, threading.Event()
        self._before = resident_bytes()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.growth = max(self.growth, resident_bytes() - self._before)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def run_once(job: dict[str, Any], rank: int, group: dist.ProcessGroup | None) -> dict[str, float]:
    """One forward and backward of this process's share; inputs and their gradients count as memory, too."""
    layout, dtype = job["layout"], getattr(torch, job["dtype"])
    tokens = job["length"] // (1 if layout == SINGLE else job["processes"])
    torch.manual_seed(rank)
    with PeakMemory() as memory:
        q, k, v = (
            torch.randn(1, heads, tokens, job["head_dim"]).to(dtype).requires_grad_()
            for heads in (job["heads"], job["kv_heads"], job["kv_heads"])
        )
        dout = torch.randn(q.shape).to(dtype)
        if group is not None:
            dist.barrier(group)
        begin = time.perf_counter()
        if layout == SINGLE:
            out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            out = context_attention(q, k, v, group=group, layout=layout, overlap=job["overlap"])
        forward = time.perf_counter() - begin
        out.backward(dout)
        if group is not None:
            dist.barrier(group)
        total = time.perf_counter() - begin
    return {"forward": forward, "total": total, "memory": float(memory.growth)}


def worker(rank: int, processes: int, store: str, jobs: Any, results: Any) -> None:
    """Ranks below `processes` form the ring with one thread each; the last worker is the single process."""
    torch.set_num_threads(1 if rank < processes else processes)
    group = None
    if rank < processes:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=processes)
        group = dist.group.WORLD
    while (job := jobs.get()) is not None:
        results.put((rank, run_once(job, rank, group)))


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    processes = arguments.processes
    store = f"/tmp/ring_hf_bench_{os.getpid()}"
    queues = [context.Queue() for _ in range(processes + 1)]
    results = context.Queue()
    workers = [
        context.Process(target=worker, args=(rank, processes, store, queues[rank], results), daemon=True)
        for rank in range(processes + 1)
    ]
    for process in workers:
        process.start()
    variants = [(SINGLE, True)] + [(layout, True) for layout in arguments.layouts]
    variants += [(layout, False) for layout in arguments.layouts if arguments.no_overlap]
    rows = []
    total = len(arguments.dtypes) * len(arguments.lengths) * (arguments.repeats + 1) * len(variants)
    progress = tqdm(total=total, desc="attention", disable=None)
    for dtype in arguments.dtypes:
        for length in arguments.lengths:
            seen: dict[tuple[str, bool], list[dict[str, float]]] = {variant: [] for variant in variants}
            for repeat in range(arguments.repeats + 1):
                for layout, overlap in variants:
                    job = {**vars(arguments), "length": length, "dtype": dtype, "layout": layout, "overlap": overlap}
                    ranks = [processes] if layout == SINGLE else range(processes)
                    for rank in ranks:
                        queues[rank].put(job)
                    answers = [results.get(timeout=1800)[1] for _ in ranks]
                    if repeat:
                        seen[layout, overlap].append({key: max(a[key] for a in answers) for key in answers[0]})
                    progress.update()
            single = seen[SINGLE, True]
            for (layout, overlap), runs in seen.items():
                row: dict[str, Any] = {"dtype": dtype, "length": length, "overlap": overlap}
                row["variant"] = layout if overlap else f"{layout}, no overlap"
                for key in ("forward", "total", "memory"):
                    row[key] = statistics.median(run[key] for run in runs)
                    # Run by run, so that both sides of a ratio saw the same machine.
                    ratios = [run[key] / max(base[key], 1e-9) for run, base in zip(runs, single, strict=True)]
                    row[f"{key}_ratio"] = statistics.median(ratios)
                rows.append(row)
    progress.close()
    for queue in queues:
        queue.put(None)
    for process in workers:
        process.join(10)
    Path(store).unlink(missing_ok=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| dtype | tokens | variant | forward s | forward + backward s | ratio | peak growth MiB | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['dtype']} | {row['length']:,} | {row['variant']} | {row['forward']:.3f} | {row['total']:.3f} | "
        f"{row['total_ratio']:.2f} | {row['memory'] / 2**20:.0f} | {row['memory_ratio']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    arguments = parse_arguments()
    rows = measure(arguments)
    setting = {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "command": " ".join(sys.argv),
    }
    text = f"{setting}\n\n{table(rows)}\n"
    print(text)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "attention.json").write_text(json.dumps({"setting": setting, "rows": rows}, indent=1))
        (arguments.output / "attention.md").write_text(text)


if __name__ == "__main__":
    main()
