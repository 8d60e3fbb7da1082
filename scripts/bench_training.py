"""A training step of a small Llama through the unmodified Trainer: time and peak memory, every lever off and on.

One process with two threads beside two processes with one thread each that share the sequence; all variants of a
length run interleaved, the second step of a short run is timed, figures are medians. The levers: checkpointing
(none, full: that of the Trainer, saved: attention is kept and the rest computed again), the MLP in blocks, the loss in
blocks.

    python scripts/bench_training.py --output results/                       # 8K and 16K tokens, about 40 minutes
    python scripts/bench_training.py --lengths 32768 --vocabulary 32000 --layers 2 --only-memory
"""

import argparse
import gc
import itertools
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from ring_hf.text import markdown_table
from scripts.teams import PAGE, WorkerPool, give_memory_back, peak_bytes, report

CHECKPOINTING = ("none", "full", "saved")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384], help="tokens of a step")
    parser.add_argument("--processes", type=int, default=2, help="ranks that share the sequence, one thread each")
    parser.add_argument("--checkpointing", nargs="+", default=list(CHECKPOINTING), choices=CHECKPOINTING)
    parser.add_argument("--levers", nargs="+", default=["", "ffn", "loss", "ffn+loss"], help="in blocks: ffn, loss")
    parser.add_argument("--alone-too", action="store_true", help="every lever in one process as well, not only none")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each variant")
    parser.add_argument("--only-memory", action="store_true", help="one run of each variant, for its peak memory")
    parser.add_argument("--output", type=Path, help="folder for training.json and training.md")
    return parser.parse_args()


def worker(rank: int, processes: int, store: str, measures_memory: bool, jobs: Any, results: Any) -> None:
    """Ranks below `processes` share sequences; the last worker trains alone with as many threads."""
    if measures_memory:
        give_memory_back()
    shared = rank < processes
    torch.set_num_threads(1 if shared else processes)
    if shared:
        port = int(Path(f"{store}.port").read_text())
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ.update({key: str(value) for key, value in world.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"})
    while (job := jobs.get()) is not None:
        results.put(step(job, shared))


def step(job: dict[str, Any], shared: bool) -> dict[str, float]:
    """Trains for two steps; seconds of the second, and what the process grew by."""
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

    import ring_hf
    from ring_hf.memory import MemoryConfig, apply

    class Clock(TrainerCallback):
        """Notes when each step began and ended."""

        def __init__(self) -> None:
            self.began, self.took = 0.0, 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.took = time.perf_counter() - self.began

    set_seed(0)
    gc.collect()  # a Trainer is a cycle: the last one with its model would else be freed while this one is measured
    before = peak_bytes(reset=True)
    model = LlamaForCausalLM(model_config(job, "ring_zigzag" if shared else "sdpa"))
    blocks = {f"{name}_block": "auto" if name in job["levers"].split("+") else None for name in ("ffn", "loss")}
    attention = "save" if job["checkpointing"] == "saved" else "none"
    if attention == "save" or any(blocks.values()):
        apply(model, MemoryConfig(attention=attention, **blocks))
    rows = [{"input_ids": tokens, "labels": tokens} for tokens in sequences(job)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=job["steps"],
            per_device_train_batch_size=1,
            gradient_checkpointing=job["checkpointing"] == "full",
            gradient_checkpointing_kwargs={"use_reentrant": False},
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,  # a loss that was logged is that of all processes
            parallelism_config=ring_hf.ContextParallelConfig(context_parallel_size=job["processes"])
            if shared
            else None,
        )
        clock = Clock()
        collator = ring_hf.ContextParallelCollator(model) if shared else None
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[clock])  # type: ignore[arg-type]
        trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return {"seconds": clock.took, "memory": max(peak_bytes() - before, PAGE), "loss": loss}


def model_config(job: dict[str, Any], attention: str) -> Any:
    """A small Llama: heads of 64, one key/value head for four query heads."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=job["vocabulary"],
        hidden_size=job["hidden"],
        intermediate_size=job["hidden"] * 8 // 3 // 64 * 64,
        num_hidden_layers=job["layers"],
        num_attention_heads=job["hidden"] // 64,
        num_key_value_heads=max(1, job["hidden"] // 256),
        max_position_embeddings=job["length"],
        attn_implementation=attention,
    )


def sequences(job: dict[str, Any]) -> list[list[int]]:
    """As many random sequences as there are steps, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(job["vocabulary"], (job["length"],), generator=generator).tolist() for _ in range(job["steps"])
    ]


def start(processes: int, measures_memory: bool = False, target: Callable[..., None] | None = None) -> WorkerPool:
    """A team whose ranks meet at a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return WorkerPool(
        processes, measures_memory, target or worker, lambda store: Path(f"{store}.port").write_text(str(port))
    )


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per length and variant."""
    both = [(False, way, levers) for way in arguments.checkpointing for levers in arguments.levers]
    alone = both if arguments.alone_too else [(False, "none", "")]
    variants = [(True, way, levers) for _, way, levers in alone] + both
    memory = start(arguments.processes, measures_memory=True)
    timing = None if arguments.only_memory else start(arguments.processes)
    runs = 1 if arguments.only_memory else arguments.repeats + 1
    progress = tqdm(total=len(arguments.lengths) * len(variants) * runs, desc="training", disable=None)
    rows = []
    for length in arguments.lengths:
        jobs = [
            ({**vars(arguments), "length": length, "checkpointing": way, "levers": levers, "steps": 2}, single)
            for single, way, levers in variants
        ]
        seen: list[list[float]] = [[] for _ in jobs]
        peaks = [0.0 for _ in jobs]
        for repeat, (number, (job, single)) in itertools.product(range(runs), enumerate(jobs)):
            if repeat == 0:
                memory.run({**job, "length": 256, "steps": 1}, single)  # code and buffers of a first run
                peaks[number] = memory.run({**job, "steps": 1}, single)["memory"]
            else:
                assert timing is not None
                seen[number].append(timing.run(job, single)["seconds"])
            progress.update()
        for (job, single), seconds, peak in zip(jobs, seen, peaks, strict=True):
            row = {"length": length, "processes": 1 if single else arguments.processes}
            row |= {"checkpointing": job["checkpointing"], "levers": job["levers"] or "none", "memory": peak}
            if seconds:
                row["seconds"] = statistics.median(seconds)
                row["ratio"] = statistics.median(a / b for a, b in zip(seconds, seen[0], strict=True))
                row["runs"] = seconds
            rows.append({**row, "memory_ratio": peak / peaks[0]})
    progress.close()
    memory.stop()
    if timing is not None:
        timing.stop()
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; ratios are to the first row of a length."""
    cells = [["tokens", "processes", "checkpointing", "in blocks", "step s", "ratio", "tokens/s", "peak MiB", "ratio"]]
    for row in rows:
        time_of = ("-", "-", "-")
        if "seconds" in row:
            rate = f"{row['length'] / row['seconds']:,.0f}"
            time_of = (f"{row['seconds']:.2f}", f"{row['ratio']:.2f}", rate)
        line = [f"{row['length']:,}", str(row["processes"]), row["checkpointing"], row["levers"], *time_of]
        cells.append([*line, f"{row['memory'] / 2**20:,.0f}", f"{row['memory_ratio']:.2f}"])
    return markdown_table(cells, align="rrllr", padded=False)


def main() -> None:
    arguments = parse_arguments()
    rows = measure(arguments)
    sizes = f"{arguments.layers} layers, hidden {arguments.hidden}, vocabulary {arguments.vocabulary:,}, fp32"
    report(arguments.output, "training", f"{sizes}\n\n{table(rows)}\n", rows)


if __name__ == "__main__":
    main()
