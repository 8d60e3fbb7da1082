"""Losses and grad norms of the Trainer: attention of a ring, emulated or in real processes, against plain attention.

A tiny Llama trains on random tokens with an unmodified Trainer, once with PyTorch's attention on whole sequences, once
with every rank's attention computed in turn from its own plan, and once as a user would, with `accelerate launch`. In
fp32 every step must have the same loss within 1e-5 and the same grad norm within 1e-4 (relative); a control, whose
halves of the sequence do not see each other, must fail. In bf16 (autocast, GPUs only) one process differs from itself
in fp32, and the ring may differ from that at most twice as much.

`accelerate launch` starts this module as a program: it trains once and writes the curves.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import ring_hf

from ..geometry import AttentionSpec, ShardedSequence
from ..launcher import accelerate_command
from .ring_emulation import Emulation, emulated_attention

ROOT = Path(ring_hf.__file__).resolve().parents[1]  # of a checkout that may not be installed
LOSS, GRAD_NORM = 1e-5, 1e-4  # relative, every step, in fp32
HALF = 2.0  # bf16: allowed difference over that of one process from fp32
STEPS, LEARNING_RATE = 20, 3e-4
EMULATED, CONTROL = "ring_emulated", "control, on purpose wrong: halves apart"


class Tokens(Dataset):
    """Random rows; the first label of each is ignored."""

    def __init__(self, num_rows: int, length: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.rows = torch.randint(1, 256, (num_rows, length), generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = self.rows[index].clone()
        labels[0] = -100
        return {"input_ids": self.rows[index], "labels": labels}


def register_emulated(layout: str, ranks: int, split_halves: bool = False) -> None:
    """Register `ring_emulated` with Transformers: a ring's attention on whole sequences.

    Args:
        split_halves: a deliberate mistake: the halves of a sequence do not see each other.
    """

    def attention(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        num_rows, _, length, _ = query.shape
        documents = ((0, length // 2, length),) * num_rows if split_halves else None
        sequence = ShardedSequence(layout, length, ranks, documents)
        query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, RoPE gives fp32
        out, _ = emulated_attention(query, key, value, Emulation(sequence, AttentionSpec(scale=scaling)))
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(EMULATED, attention)
    AttentionMaskInterface.register(EMULATED, lambda *args, **kwargs: None)


def train(attention: str, ranks: int, settings: dict[str, Any], bf16: bool = False) -> dict[str, list[float]]:
    """Return losses and grad norms of all steps; `ranks` processes share each sequence unless it is 1."""
    set_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 256}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, attn_implementation=attention))
    shared = ranks > 1
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=settings["steps"],
            per_device_train_batch_size=2,
            learning_rate=LEARNING_RATE,
            logging_steps=1,
            bf16=bf16,
            use_cpu=settings["device"] == "cpu",
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            parallelism_config=ring_hf.ContextParallelConfig(context_parallel_size=ranks) if shared else None,
        )
        collator: Any = ring_hf.ContextParallelCollator(model) if shared else default_data_collator
        if not shared:
            arguments._n_gpu = 1  # several GPUs in one process would mean DataParallel
        rows = Tokens(2 * settings["steps"], settings["length"])
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return {name: [float(entry[name]) for entry in steps] for name in ("loss", "grad_norm")}


def deviation(got: dict[str, list[float]], want: dict[str, list[float]]) -> dict[str, float]:
    """Return the largest relative difference of any step, by curve."""
    return {name: max(abs(a - b) / abs(b) for a, b in zip(got[name], want[name], strict=True)) for name in want}


def launch(processes: int, settings: dict[str, Any]) -> dict[str, list[float]]:
    """Train with `ring_zigzag` in processes that `accelerate launch` starts, and return the curves.

    Raises:
        RuntimeError: if the launch fails, with its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "curves.json"
        command = [*accelerate_command(processes), "-m", __spec__.name, str(output), json.dumps(settings)]
        cpu = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} if settings["device"] == "cpu" else {}
        path = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
        done = subprocess.run(
            command, env={**os.environ, **path, **cpu}, capture_output=True, text=True, timeout=900, check=False
        )
        if done.returncode:
            raise RuntimeError(f"accelerate launch failed with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        return json.loads(output.read_text())


def run(device: torch.device, tiny: bool, report_progress: Callable[[str, int], None]) -> dict[str, Any]:
    """Return the section: a row per run, with its largest differences and whether they are small enough."""
    settings = {"device": device.type, "steps": STEPS, "length": 64 if tiny else 1024}
    processes = 2 if device.type == "cpu" else torch.cuda.device_count()
    emulated = [("zigzag", 4)] if tiny else [("zigzag", 4), ("striped", 4), ("contiguous", 8)]
    halves = [] if device.type == "cpu" else emulated
    total = 2 + len(emulated) + (processes > 1) + len(halves) + bool(halves)
    report_progress("one process, sdpa", total)
    plain = train("sdpa", 1, settings)
    rows = []
    for layout, ranks in emulated:
        report_progress(f"{ranks} ranks emulated, {layout}", total)
        register_emulated(layout, ranks)
        rows.append(_row(f"{ranks} ranks emulated, {layout}, fp32", deviation(train(EMULATED, 1, settings), plain)))
    report_progress("control", total)
    register_emulated("zigzag", 4, split_halves=True)
    rows.append(_row(CONTROL, deviation(train(EMULATED, 1, settings), plain)))
    if processes > 1:
        report_progress(f"{processes} processes", total)
        difference = deviation(launch(processes, settings), plain)
        rows.append(_row(f"{processes} processes, ring_zigzag, fp32", difference))
    if halves:
        report_progress("one process, bf16", total)
        half_difference = deviation(train("sdpa", 1, settings, True), plain)
        allowed = {name: HALF * value for name, value in half_difference.items()}
        for layout, ranks in halves:
            report_progress(f"{ranks} ranks emulated, {layout}, bf16", total)
            register_emulated(layout, ranks)
            difference = deviation(train(EMULATED, 1, settings, True), plain)
            rows.append(_row(f"{ranks} ranks emulated, {layout}, bf16 against fp32", difference, allowed))
    ok = all(row["same"] != (row["run"] == CONTROL) for row in rows)
    return {"ok": ok, "steps": STEPS, "plain": plain, "rows": rows}


def _row(name: str, difference: dict[str, float], allowed: dict[str, float] | None = None) -> dict[str, Any]:
    allowed = allowed or {"loss": LOSS, "grad_norm": GRAD_NORM}
    same = all(difference[key] <= allowed[key] for key in allowed)
    return {"run": name, **difference, "allowed": allowed, "same": same}


def main() -> None:
    output, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    curves = train("ring_zigzag", int(os.environ["WORLD_SIZE"]), settings)
    if int(os.environ["RANK"]) == 0:
        output.write_text(json.dumps(curves))


if __name__ == "__main__":
    main()
