"""Train for 1,000 steps of random lengths, packings, layouts and algorithms, and compare every loss with one process.

Four processes on the CPU train a tiny Llama in fp64. Every step draws how many ranks share a sequence (2 with 2
replicas, or 4), the layout, the algorithm, lengths, packing and memory options. A second copy of the model takes the
same steps on whole sequences (`sdpa`) in every process, so the two losses must agree to rounding throughout. Memory,
file descriptors and threads of each process are recorded every 100 steps: none may grow.

    python scripts/soak_training.py                                  # 1,000 steps, about 20 minutes on two cores
    python scripts/soak_training.py --steps 20 --output soak.jsonl   # a first look

A line a step goes to the output, and weights beside it every 50 steps: start the same command again after an
interruption. The exit code is 1 if a loss differs by more than 1e-9, or memory, descriptors or threads grow.
"""

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ring_hf
from ring_hf.geometry import RingOptions
from ring_hf.hf import context
from ring_hf.hf.trainer import exact_evaluation
from ring_hf.hf.trainer.exact_evaluation import Evaluator
from ring_hf.launcher import WorkerPool, free_port, rank_environment
from ring_hf.parallel import register_group
from ring_hf.text import format_bytes, markdown_table

WORLD, EVERY, TOLERANCE = 4, 50, 1e-9
LAYOUTS = ("contiguous", "zigzag", "striped", "balanced")
# Transport, inner ring, ulysses_size and head_chunks, by ranks that share a sequence.
ALGORITHMS = {
    2: [("ring", 1, 1, 1), ("allgather", 1, 1, 1), ("direct", 1, 1, 1), ("auto", 1, 2, 1), ("auto", 1, 2, 2)],
    4: [
        *(("ring", 1, 1, 1), ("allgather", 1, 1, 1), ("direct", 1, 1, 1), ("double_ring", 2, 1, 1)),
        *(("ring", 1, 2, 1), ("direct", 1, 2, 1), ("ring", 1, 2, 2), ("auto", 1, 4, 1)),
    ],
}
MEASURES = ("rss", "descriptors", "threads")
# How much a process may grow after its first 100 steps, in bytes and numbers: the allocator keeps some more.
GROWTH = {"rss": 64 * 2**20, "descriptors": 0, "threads": 0}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--max-length", type=int, default=256, help="tokens of the longest row (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="of the steps (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("soak_training.jsonl"), help="a line a step")
    return parser.parse_args()


@contextlib.contextmanager
def keep_double() -> Iterator[None]:
    """Inside, fp64 stays fp64 where models cast to fp32 (norms, logits), so that rounding hides nothing."""
    cast_to_float, cast = torch.Tensor.float, torch.Tensor.to

    def to_float(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return x if x.dtype == torch.float64 else cast_to_float(x, *args, **kwargs)

    def to(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        is_cast = x.dtype == torch.float64 and torch.float32 in (*args, *kwargs.values())
        return x if is_cast else cast(x, *args, **kwargs)

    with mock.patch.multiple(torch.Tensor, float=to_float, to=to):
        yield


class Trainee:
    """The two copies of the model in one process, and their optimizers."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        shape: dict[str, Any] = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
        self.models = {}
        for name, attention in (("shared", "ring_zigzag"), ("whole", "sdpa")):
            torch.manual_seed(0)
            config = LlamaConfig(**shape, attn_implementation=attention, use_cache=False)
            self.models[name] = LlamaForCausalLM(config).double().train()
        ring_hf.guard_model(self.models["shared"])
        self.optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-3) for name, model in self.models.items()}
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
        assert dist.group.WORLD is not None
        self.groups = {2: (mesh["cp"].get_group(), mesh["dp"].get_group()), 4: (dist.group.WORLD, None)}

    def activate(self, cp: int, options: RingOptions) -> context.ProcessContext:
        group, replicas = self.groups[cp]
        process = context.ProcessContext(
            size=cp,
            rank=self.rank % cp,
            num_replicas=WORLD // cp,
            replica=self.rank // cp,
            group=register_group(group),
            replica_group=None if replicas is None else register_group(replicas),
            options=options,
        )
        context.activate(process)
        exact_evaluation.activate(Evaluator(process))
        return process

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "state.pt", weights_only=True)
        for name in self.models:
            self.models[name].load_state_dict(state[name])
            self.optimizers[name].load_state_dict(state[f"{name} optimizer"])

    def save(self, folder: Path, step: int) -> None:
        state: dict[str, Any] = {"step": step}
        for name in self.models:
            state |= {name: self.models[name].state_dict(), f"{name} optimizer": self.optimizers[name].state_dict()}
        torch.save(state, folder / "state.tmp")
        (folder / "state.tmp").replace(folder / "state.pt")


_trainee: Trainee | None = None


def start(rank: int, port: int) -> None:
    global _trainee
    os.environ.update(rank_environment(rank, WORLD, port))
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=timedelta(seconds=300))
    _trainee = Trainee(rank)


def resume(rank: int, folder: Path) -> None:
    assert _trainee is not None
    _trainee.load(folder)


def save(rank: int, folder: Path, step: int) -> None:
    assert _trainee is not None
    if rank == 0:
        _trainee.save(folder, step)


def draw(step: int, seed: int, max_length: int) -> dict[str, Any]:
    """Return what a step does: plain values, the same in every process."""
    numbers = random.Random(f"{seed} {step}")
    cp = numbers.choice(sorted(ALGORITHMS))
    transport, inner, ulysses, chunks = numbers.choice(ALGORITHMS[cp])
    layout = "ulysses" if ulysses == cp else f"ring_{numbers.choice(LAYOUTS)}"
    rows = [numbers.randint(2, max_length) for _ in range(WORLD // cp * numbers.randint(1, 3))]
    return {
        "cp": cp,
        "layout": layout,
        "transport": transport,
        "inner_ring_size": inner,
        "ulysses_size": ulysses,
        "head_chunks": chunks,
        "overlap": numbers.random() < 0.7,
        "packing": numbers.random() < 0.5,
        "checkpointing": numbers.random() < 0.3,
        "lengths": rows,
    }


def train_step(rank: int, step: int, seed: int, max_length: int) -> dict[str, Any]:
    """Take a step of both copies. Return both losses, and what this process uses."""
    assert _trainee is not None
    settings = draw(step, seed, max_length)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    examples = []
    for length in settings["lengths"]:
        tokens = torch.randint(1, 128, (9,), generator=generator).repeat(length)[:length].tolist()
        prompt = int(torch.randint(0, length, (), generator=generator))
        examples.append({"input_ids": tokens, "labels": [-100] * prompt + tokens[prompt:]})
    names = ("transport", "inner_ring_size", "ulysses_size", "head_chunks", "overlap")
    process = _trainee.activate(settings["cp"], RingOptions(**{name: settings[name] for name in names}))
    shared, whole = _trainee.models["shared"], _trainee.models["whole"]
    shared.set_attn_implementation(settings["layout"])
    verb = "enable" if settings["checkpointing"] else "disable"
    names = (f"activation_checkpointing_{verb}", f"gradient_checkpointing_{verb}")  # the name until Transformers 5.23
    next(getattr(shared, name) for name in names if hasattr(shared, name))()
    ring_hf.guard_model(shared).recheck_next_forward()
    per_replica = len(examples) // process.num_replicas
    own = examples[process.replica * per_replica :][:per_replica]
    counts = [sum(label != -100 for row in examples for label in row["labels"][1:])]
    count = torch.tensor(float(max(1, *counts)), dtype=torch.float64)
    collator = ring_hf.ContextParallelCollator(shared, packing=settings["packing"])
    with keep_double():
        loss = shared(**collator(own), num_items_in_batch=count).loss
        loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    for parameter in shared.parameters():
        dist.all_reduce(parameter.grad)
    reference = 0.0
    with context.whole_sequences(), keep_double():
        for row in examples:
            tensors = {name: torch.tensor([values]) for name, values in row.items()}
            row_loss = whole(**tensors, num_items_in_batch=count).loss
            row_loss.backward()
            reference += float(row_loss.detach())
    for optimizer in _trainee.optimizers.values():
        optimizer.step()
        optimizer.zero_grad()
    usage = psutil.Process()
    measured = (usage.memory_info().rss, usage.num_fds(), usage.num_threads())
    return {"loss": float(total), "reference": reference, **dict(zip(MEASURES, measured, strict=True))}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def find_growth(rows: list[dict[str, Any]]) -> list[str]:
    """Return what grew in a process from its 100th step (or the middle of a shorter run) to its last one."""
    problems = []
    for start_step in sorted({row["started"] for row in rows}):
        run = [row for row in rows if row["started"] == start_step]
        early, late = run[min(100, len(run) // 2) - 1 if len(run) > 1 else 0], run[-1]
        for name in MEASURES:
            growth = max(b - a for a, b in zip(early[name], late[name], strict=True))
            if growth > GROWTH[name]:
                problems.append(f"{name} grew by {growth} from step {early['step']} to {late['step']}")
    return problems


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table: the largest of all processes at step 1, 100, 200 and so on, and the worst loss."""
    lines = [["step", "memory", "descriptors", "threads", "worst loss difference so far"]]
    worst = 0.0
    for row in rows:
        worst = max(worst, abs(row["loss"] - row["reference"]))
        if row["step"] == 1 or row["step"] % 100 == 0 or row is rows[-1]:
            cells = [f"{row['step']:,}", format_bytes(max(row["rss"])), *(str(max(row[m])) for m in MEASURES[1:])]
            lines.append([*cells, f"{worst:.1e}"])
    return markdown_table(lines, padded=False)


def main() -> None:
    arguments = parse_arguments()
    folder = arguments.output.with_suffix(".weights")
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "state.pt"
    done = int(torch.load(state, weights_only=True)["step"]) if state.exists() else 0
    rows = [row for row in read(arguments.output) if row["step"] <= done]
    arguments.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if done < arguments.steps:
        pool = WorkerPool(WORLD, start, (free_port(),))
        try:
            if done:
                pool.run(resume, folder, timeout=120)
            run_steps(pool, arguments, folder, done)
        finally:
            pool.stop()
    rows = read(arguments.output)
    print(table(rows))
    differences = [abs(row["loss"] - row["reference"]) for row in rows]
    problems = find_growth(rows)
    if not all(math.isfinite(x) and x <= TOLERANCE for x in differences):
        problems.append(f"a loss differs by {max(differences):.1e}")
    print("\n".join(problems) or "nothing grows, and all losses are those of one process")
    if not problems:
        shutil.rmtree(folder)
    sys.exit(bool(problems))


def run_steps(pool: WorkerPool, arguments: argparse.Namespace, folder: Path, done: int) -> None:
    progress = tqdm(range(done + 1, arguments.steps + 1), initial=done, total=arguments.steps, unit="step")
    worst = 0.0
    for step in progress:
        results = pool.run(train_step, step, arguments.seed, arguments.max_length, timeout=120)
        row = {"step": step, "started": done, **draw(step, arguments.seed, arguments.max_length)}
        row |= {name: results[0][name] for name in ("loss", "reference")}
        row |= {name: [result[name] for result in results] for name in MEASURES}
        worst = max(worst, abs(row["loss"] - row["reference"]))
        progress.set_postfix(worst=f"{worst:.1e}", memory=format_bytes(max(row["rss"])))
        with arguments.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if step % EVERY == 0 or step == arguments.steps:
            pool.run(save, folder, step, timeout=120)


if __name__ == "__main__":
    main()
