"""A few steps of the unmodified Trainer on one device: seconds and peak memory of a step, losses and grad norms.

The model is built from the keys of a `config.json`, with random weights in fp32, on the device itself; `bf16` is the
Trainer's autocast. Each step takes one row of random tokens, the same for every run of the same lengths.
"""

import dataclasses
import gc
import resource
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import ring_hf

from .. import memory

LEARNING_RATE = 1e-4
_FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}
RECOMPUTE = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in _FIELDS)


@dataclass(frozen=True)
class Run:
    """Model, data and settings of a run.

    Attributes:
        keys: of the model's `config.json`.
        attention: `attn_implementation`; ring_hf's own get its config and its collator, for one process.
        lengths: tokens of each step.
        options: of `ring_hf.memory.apply`; None for an unchanged model.
        recompute: the Trainer's gradient checkpointing.
        bf16: the Trainer's autocast.
        positions: of the tokens, if they are only a share of a sequence.
    """

    keys: Mapping[str, Any]
    attention: str
    lengths: tuple[int, ...]
    options: Mapping[str, Any] | None = None
    recompute: bool = False
    bf16: bool = True
    positions: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Steps:
    """Measurements of a run.

    Attributes:
        seconds: of each step.
        memory: peak in bytes, without the memory allocated before the model.
        curves: losses ("loss") and gradient norms ("grad_norm") as the Trainer logs them.
    """

    seconds: list[float]
    memory: int
    curves: dict[str, list[float]]


class Tokens(IterableDataset):
    """Random rows of given lengths in their order; a sampler would shuffle them."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(1)
        for length in self._run.lengths:
            tokens = torch.randint(self._run.keys["vocab_size"], (length,), generator=generator)
            row = {"input_ids": tokens, "labels": tokens.clone()}
            if self._run.positions is not None:
                row["position_ids"] = torch.tensor(self._run.positions[:length])
            yield row


class Clock(TrainerCallback):
    """Measures seconds from the begin of a step to its end, optimizer included; the device is idle at both."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: list[float] = []
        self._start = 0.0

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(self._now() - self._start)


def train(run: Run, device: torch.device) -> Steps:
    """Run all steps.

    Raises:
        torch.OutOfMemoryError: if they do not fit. Their memory is released only when the exception is no longer
            handled: call `free` then.
    """
    set_seed(0)
    allocated_before = _allocated(device)
    with tempfile.TemporaryDirectory() as folder:
        uses_ring = run.attention.startswith("ring_") and run.positions is None
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=len(run.lengths),
            per_device_train_batch_size=1,
            learning_rate=LEARNING_RATE,
            logging_steps=1,
            bf16=run.bf16,
            **{RECOMPUTE: run.recompute, f"{RECOMPUTE}_kwargs": {"use_reentrant": False}},
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type == "cuda",
            accelerator_config={"dispatch_batches": False},
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            parallelism_config=ring_hf.ContextParallelConfig(context_parallel_size=1) if uses_ring else None,
        )
        arguments._n_gpu = 1  # several GPUs in one process would mean DataParallel
        model = make_model(run, device)
        if run.options is not None:
            memory.apply(model, **run.options)
        collator: Any = ring_hf.ContextParallelCollator(model) if uses_ring else default_data_collator
        clock = Clock(device)
        trainer = Trainer(model, arguments, train_dataset=Tokens(run), data_collator=collator, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    curves = {name: [float(entry[name]) for entry in logged] for name in ("loss", "grad_norm")}
    return Steps(clock.seconds, _peak(device) - allocated_before, curves)


def make_model(run: Run, device: torch.device) -> Any:
    """Return a model with random weights in fp32, built on the device."""
    config = AutoConfig.for_model(**run.keys, max_position_embeddings=_positions(run), use_cache=False)
    with device:
        return AutoModelForCausalLM.from_config(config, attn_implementation=run.attention, dtype=torch.float32)


def _positions(run: Run) -> int:
    return max(run.lengths) if run.positions is None else max(run.positions) + 1


def free(device: torch.device) -> None:
    """Release the memory of a run: a Trainer and its model reference each other."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _allocated(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak(device: torch.device) -> int:
    """Return the peak in bytes of CUDA's allocator; on a CPU that of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
