"""A training step of a small Llama through the unmodified Trainer: time and peak memory of all memory options.

One process with two threads beside two processes with one thread each that share the sequence; all variants of a
length run interleaved, the second step of a short run is timed, figures are medians. The options: checkpointing
(none, full: that of the Trainer, saved: attention is kept and the rest computed again), the MLP in blocks, the loss in
blocks.

    python scripts/bench_training.py --output results/                       # 8K and 16K tokens, about 40 minutes
    python scripts/bench_training.py --lengths 32768 --vocabulary 32000 --layers 2 --only-memory
"""

import argparse
import gc
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from ring_hf.launcher import free_port, rank_environment
from ring_hf.text import markdown_table
from scripts.bench_harness import PAGE, ComparisonPool, Job, peak_bytes, report, return_freed_memory

CHECKPOINTING = ("none", "full", "saved")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384], help="tokens of a step")
    parser.add_argument("--processes", type=int, default=2, help="ranks that share the sequence, one thread each")
    parser.add_argument("--checkpointing", nargs="+", default=list(CHECKPOINTING), choices=CHECKPOINTING)
    parser.add_argument(
        "--memory-options", nargs="+", default=["", "ffn", "loss", "ffn+loss"], help="in blocks: ffn, loss"
    )
    parser.add_argument("--alone-too", action="store_true", help="every lever in one process as well, not only none")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each variant")
    parser.add_argument("--only-memory", action="store_true", help="one run of each variant, for its peak memory")
    parser.add_argument("--output", type=Path, help="folder for training.json and training.md")
    return parser.parse_args()


def initialize_trainer(rank: int, processes: int, port: str, measures_memory: bool) -> None:
    """Make ranks below `processes` share sequences; the last rank trains alone with as many threads."""
    if measures_memory:
        return_freed_memory()
    torch.set_num_threads(1 if rank < processes else processes)
    if rank < processes:
        os.environ.update({**rank_environment(rank, processes, int(port)), "ACCELERATE_USE_CPU": "true"})


def train_steps(rank: int, job: Job) -> dict[str, float]:
    """Train for two steps and return the seconds of the second, the growth of the process in bytes, and the loss."""
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

    import ring_hf
    from ring_hf.memory import MemoryConfig, apply

    class Clock(TrainerCallback):
        """Measures the seconds of the last step."""

        def __init__(self) -> None:
            self.start, self.seconds = 0.0, 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.start

    shared = rank < job["processes"]
    set_seed(0)
    gc.collect()  # else the last Trainer, a reference cycle, and its model are freed during the measurement
    before = peak_bytes(reset=True)
    model = LlamaForCausalLM(model_config(job, "ring_zigzag" if shared else "sdpa"))
    blocks = {
        f"{name}_block": "auto" if name in job["memory_options"].split("+") else None for name in ("ffn", "loss")
    }
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
    return {"seconds": clock.seconds, "memory": max(peak_bytes() - before, PAGE), "loss": loss}


def model_config(job: dict[str, Any], attention: str) -> Any:
    """Return a small Llama: heads of 64, one key/value head for four query heads."""
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
    """Return as many random sequences as there are steps, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(job["vocabulary"], (job["length"],), generator=generator).tolist() for _ in range(job["steps"])
    ]


def start_pool(processes: int, measures_memory: bool = False) -> ComparisonPool:
    """Start processes for `train_steps`."""
    return ComparisonPool(processes, train_steps, measures_memory, initialize_trainer, str(free_port()))


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per length and variant."""
    both = [
        (False, checkpointing, memory_options)
        for checkpointing in arguments.checkpointing
        for memory_options in arguments.memory_options
    ]
    single_process = both if arguments.alone_too else [(False, "none", "")]
    variants = [(True, checkpointing, memory_options) for _, checkpointing, memory_options in single_process] + both
    memory = start_pool(arguments.processes, measures_memory=True)
    timing = None if arguments.only_memory else start_pool(arguments.processes)
    runs = 1 if arguments.only_memory else arguments.repeats + 1
    progress = tqdm(total=len(arguments.lengths) * len(variants) * runs, desc="training", disable=None)
    rows = []
    options = vars(arguments)
    for length in arguments.lengths:
        jobs = [
            (
                {
                    **options,
                    "length": length,
                    "checkpointing": checkpointing,
                    "memory_options": memory_options,
                    "steps": 2,
                },
                single,
            )
            for single, checkpointing, memory_options in variants
        ]
        timed: list[list[float]] = [[] for _ in jobs]
        peaks = [0.0 for _ in jobs]
        for repeat, (number, (job, single)) in itertools.product(range(runs), enumerate(jobs)):
            if repeat == 0:
                memory.run({**job, "length": 256, "steps": 1}, single)  # code and buffers of a first run
                peaks[number] = memory.run({**job, "steps": 1}, single)["memory"]
            else:
                assert timing is not None
                timed[number].append(timing.run(job, single)["seconds"])
            progress.update()
        for (job, single), seconds, peak in zip(jobs, timed, peaks, strict=True):
            row = {"length": length, "processes": 1 if single else arguments.processes}
            row |= {
                "checkpointing": job["checkpointing"],
                "memory_options": job["memory_options"] or "none",
                "memory": peak,
            }
            if seconds:
                row["seconds"] = statistics.median(seconds)
                row["ratio"] = statistics.median(a / b for a, b in zip(seconds, timed[0], strict=True))
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
        time_cells = ("-", "-", "-")
        if "seconds" in row:
            rate = f"{row['length'] / row['seconds']:,.0f}"
            time_cells = (f"{row['seconds']:.2f}", f"{row['ratio']:.2f}", rate)
        line = [f"{row['length']:,}", str(row["processes"]), row["checkpointing"], row["memory_options"], *time_cells]
        cells.append([*line, f"{row['memory'] / 2**20:,.0f}", f"{row['memory_ratio']:.2f}"])
    return markdown_table(cells, align="rrllr", padded=False)


def main() -> None:
    arguments = parse_arguments()
    rows = measure(arguments)
    sizes = f"{arguments.layers} layers, hidden {arguments.hidden}, vocabulary {arguments.vocabulary:,}, fp32"
    report(arguments.output, "training", f"{sizes}\n\n{table(rows)}\n", rows)


if __name__ == "__main__":
    main()
