"""The cost of the run-time checks: the message of every forward pass, and the trial step before the first one.

Two processes share each sequence of a small Llama, through the Trainer. The message is timed inside the steps of that
one run; its seconds contain the wait for the slower rank, so the shortest of all steps is given too. The trial step is
switched on (`verify=True`), though such a model needs none.

    python scripts/bench_checks.py --output results/
    python scripts/bench_checks.py --lengths 1024 --steps 4
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from ring_hf.launcher import free_port
from ring_hf.text import markdown_table
from scripts.bench_harness import ComparisonPool, Job, report
from scripts.bench_training import initialize_trainer, model_config, sequences


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384], help="tokens")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps; the first is not counted")
    parser.add_argument("--processes", type=int, default=2, help="ranks that share the sequence, one thread each")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--output", type=Path, help="folder for checks.json and checks.md")
    return parser.parse_args()


class Stopwatch:
    """Replaces a function and records the seconds of every call."""

    def __init__(self, owner: Any, name: str) -> None:
        self.seconds: list[float] = []
        self._function = getattr(owner, name)
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return self._function(*args, **kwargs)
        finally:
            self.seconds.append(time.perf_counter() - start)


def train(rank: int, job: Job) -> dict[str, float]:
    """Return seconds: medians of a step and of the message in it, the shortest message, the trial step."""
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

    import ring_hf
    from ring_hf.hf.trainer import model_guard, trainer_hooks

    steps: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            steps.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps[-1] += time.perf_counter()

    set_seed(0)
    messages, trials = Stopwatch(model_guard, "exchange_messages"), Stopwatch(trainer_hooks, "run_trial")
    model = LlamaForCausalLM(model_config(job, "ring_zigzag"))
    rows = [{"input_ids": tokens, "labels": tokens} for tokens in sequences(job)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=job["steps"],
            per_device_train_batch_size=1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            parallelism_config=ring_hf.ContextParallelConfig(context_parallel_size=job["processes"], verify=True),
        )
        collator = ring_hf.ContextParallelCollator(model)
        Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[Clock()]).train()  # type: ignore[arg-type]
    setattr(model_guard, "exchange_messages", messages._function)  # noqa: B010
    setattr(trainer_hooks, "run_trial", trials._function)  # noqa: B010
    in_steps = messages.seconds[-len(steps) + 1 :]
    return {
        "step": statistics.median(steps[1:]),
        "message": statistics.median(in_steps),
        "shortest": min(in_steps),
        "trial": trials.seconds[0],
    }


def table(rows: list[dict[str, Any]]) -> str:
    cells = [["tokens", "step s", "message ms (median)", "shortest ms", "share of a step", "trial step s", "in steps"]]
    for row in rows:
        message = [
            f"{row['message'] * 1e3:.2f}",
            f"{row['shortest'] * 1e3:.2f}",
            f"{row['message'] / row['step']:.2%}",
        ]
        trial = [f"{row['trial']:.2f}", f"{row['trial'] / row['step']:.2f}"]
        cells.append([f"{row['length']:,}", f"{row['step']:.3f}", *message, *trial])
    return markdown_table(cells, align="r", padded=False)


def main() -> None:
    arguments = parse_arguments()
    pool = ComparisonPool(arguments.processes, train, initialize=initialize_trainer, address=str(free_port()))
    rows = []
    for length in tqdm(arguments.lengths, desc="checks", disable=None):
        job = {**{key: value for key, value in vars(arguments).items() if key != "output"}, "length": length}
        pool.run({**job, "length": 256})  # code and buffers of a first run
        rows.append({"length": length, **pool.run(job)})
    pool.stop()
    sizes = f"{arguments.processes} processes, {arguments.layers} layers, hidden {arguments.hidden}, fp32"
    report(arguments.output, "checks", f"{sizes}\n\n{table(rows)}\n", rows)


if __name__ == "__main__":
    main()
