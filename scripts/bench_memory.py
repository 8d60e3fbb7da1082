"""Measured peak memory of one training step of a small Llama: every option of `ring_hf.memory` off and on.

Each case runs in a process of its own, one after the other: the model is built, a short step is taken (code, gradients
and buffers of a first run), and the growth of the process during the step is its figure. The loss of every case is
compared with that of the first.

    python scripts/bench_memory.py --output results/                     # 32K tokens, vocabulary 32,000, hidden 512
    python scripts/bench_memory.py --tokens 2048 --vocabulary 4096 --hidden 128 --layers 2
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from ring_hf.text import markdown_table
from scripts.bench_harness import PAGE, peak_bytes, report, return_freed_memory
from scripts.bench_training import model_config

NONE: dict[str, Any] = {"attention": "none", "ffn_block": None, "loss_block": None}
CASES: dict[str, dict[str, Any]] = {
    "none": {},
    "layers recomputed": {"attention": "recompute"},
    "attention saved": {"attention": "save"},
    "feed-forward in blocks": {"ffn_block": "auto"},
    "loss in blocks": {"loss_block": "auto"},
    "recomputed, both in blocks": {"attention": "recompute", "ffn_block": "auto", "loss_block": "auto"},
    "attention saved, both in blocks": {"attention": "save", "ffn_block": "auto", "loss_block": "auto"},
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768, help="tokens of the step, one sequence")
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--hidden", type=int, default=512, help="a multiple of 64; heads of 64, a quarter for keys")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", default="float32", help="of weights and activations")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, metavar="case", help="by name")
    parser.add_argument("--output", type=Path, help="folder for memory.json and memory.md")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one case, as JSON, in this process
    return parser.parse_args()


def run(job: dict[str, Any]) -> dict[str, float]:
    """Return the growth of this process in one step, in bytes, and its loss."""
    from transformers import LlamaForCausalLM

    import ring_hf

    return_freed_memory()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = LlamaForCausalLM(model_config(job, "ring_zigzag")).to(getattr(torch, job["dtype"])).train()
    ring_hf.memory.apply(model, **{**NONE, **CASES[job["case"]]})
    tokens = torch.randint(0, job["vocabulary"], (1, job["length"]), generator=torch.Generator().manual_seed(1))

    def step(length: int) -> float:
        part = tokens[:, :length]
        loss = model(input_ids=part, labels=part, use_cache=False).loss
        loss.backward()
        return loss.item()

    step(64)
    before = peak_bytes(reset=True)
    loss = step(job["length"])
    return {"memory": max(peak_bytes() - before, PAGE), "loss": loss}


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for case in tqdm(arguments.cases, desc="cases"):
        job = {"case": case, "length": arguments.tokens, "vocabulary": arguments.vocabulary}
        job |= {"hidden": arguments.hidden, "layers": arguments.layers, "dtype": arguments.dtype}
        command = [sys.executable, str(Path(__file__).resolve()), "--run", json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{case}: {done.stderr[-3000:]}")
        row = {"case": case, **json.loads(done.stdout.splitlines()[-1])}
        first = rows[0] if rows else row
        rows.append({**row, "ratio": first["memory"] / row["memory"], "difference": abs(row["loss"] - first["loss"])})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return Markdown; the first row over each."""
    cells = [["memory_options", "peak MiB", "less by", "loss, difference"]]
    for row in rows:
        figures = [f"{row['memory'] / 2**20:,.0f}", f"{row['ratio']:.1f}x", f"{row['difference']:.1e}"]
        cells.append([row["case"], *figures])
    return markdown_table(cells, padded=False)


def main() -> None:
    arguments = parse_arguments()
    if arguments.run:
        print(json.dumps(run(json.loads(arguments.run))))
        return
    rows = measure(arguments)
    sizes = f"{arguments.tokens:,} tokens, vocabulary {arguments.vocabulary:,}, hidden {arguments.hidden}, "
    sizes += f"{arguments.layers} layers, {arguments.dtype}; growth of a process of its own during one step"
    report(arguments.output, "memory", f"{sizes}\n\n{table(rows)}\n", rows)


if __name__ == "__main__":
    main()
