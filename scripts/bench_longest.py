"""A very long sequence trained end to end: a full optimizer step through the Trainer, its loss checked.

Two processes share one sequence of random tokens, with every memory option on: attention saved, the rest of a layer
recomputed, MLP and loss in blocks. Its loss is compared with that of plain Transformers in one process: the same
weights, PyTorch's attention, a forward pass without gradients, the head and the loss in blocks of tokens.

    python scripts/bench_longest.py --output results/                # 256K tokens, hidden 128, 2 layers
    python scripts/bench_longest.py --length 8192
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn.functional import cross_entropy

from scripts.bench_harness import report
from scripts.bench_training import model_config, sequences, start_pool

BAR = 1e-5  # relative: that of training in fp32


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2**18, help="tokens")
    parser.add_argument("--processes", type=int, default=2, help="ranks that share the sequence, one thread each")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--output", type=Path, help="folder for longest.json and longest.md")
    return parser.parse_args()


def loss_alone(job: dict[str, Any]) -> float:
    """Return the loss of one process before the step."""
    from transformers import LlamaForCausalLM, set_seed

    set_seed(0)
    model = LlamaForCausalLM(model_config(job, "sdpa"))
    tokens = torch.tensor(sequences(job)[0])
    with torch.no_grad():
        hidden = model.model(input_ids=tokens[None], use_cache=False).last_hidden_state[0, :-1]
        total = torch.zeros((), dtype=torch.float64)
        for block, labels in zip(hidden.split(4096), tokens[1:].split(4096), strict=True):
            total += cross_entropy(model.lm_head(block).float(), labels, reduction="none").double().sum()
    return float(total / (len(tokens) - 1))


def main() -> None:
    arguments = parse_arguments()
    job = {**vars(arguments), "steps": 1, "checkpointing": "saved", "memory_options": "ffn+loss"}
    torch.set_num_threads(arguments.processes)
    pool = start_pool(arguments.processes, measures_memory=True)
    pool.run({**job, "length": 256})
    start = time.perf_counter()
    row = pool.run(job)
    row["whole"] = time.perf_counter() - start
    pool.stop()
    row["loss_alone"] = loss_alone(job)
    row["difference"] = abs(row["loss"] - row["loss_alone"]) / row["loss_alone"]
    text = (
        f"{arguments.length:,} tokens, {arguments.processes} processes, {arguments.layers} layers, hidden "
        f"{arguments.hidden}, vocabulary {arguments.vocabulary:,}, fp32: step {row['seconds']:.0f} s, peak of a "
        f"process {row['memory'] / 2**20:,.0f} MiB\nloss {row['loss']:.9f}, of one process {row['loss_alone']:.9f}, "
        f"relative difference {row['difference']:.1e}\n"
    )
    report(arguments.output, "longest", text, [{**{key: job[key] for key in job if key != "output"}, **row}])
    if row["difference"] > BAR:
        raise SystemExit(f"The losses differ by {row['difference']:.1e} (relative), more than {BAR:.0e}.")


if __name__ == "__main__":
    main()
