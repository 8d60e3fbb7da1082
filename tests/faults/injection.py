"""Faults that a training script injects into one of its ranks, by name.

Each is injected once: a file in the folder of the run says that it was, and the next start of the same command runs
without it. Before a fault, the rank reports where it is for a second and a half, as in steps that take seconds.
"""

import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils.data import get_worker_info
from transformers import TrainerCallback

from ring_hf.hf.trainer import fault_handling
from ring_hf.parallel import liveness, streams

STEP, SAVE_STEPS, STEPS = 5, 2, 6  # the fault, the checkpoints, and the end


@dataclass(frozen=True)
class Fault:
    """A fault.

    Attributes:
        rank: which has it.
        phase: words by which the error of another rank, or the launcher, names where it was.
        inject: installs it, of a `Run`.
        kills: whether the rank is killed and says nothing itself.
        next_step: the checkpoint from which the next start goes on; 0 if there is none, None if it depends on how far
            ahead batches are loaded.
        num_workers: of the data loader.
        may_be_harmless: whether training may also go on with the right losses.
    """

    rank: int
    phase: str
    inject: Callable[["Run"], None]
    kills: bool = False
    next_step: int | None = 4
    num_workers: int = 0
    may_be_harmless: bool = False


class Run:
    """The Trainer of a run, and when the fault happens in it. All ranks run the same code, one of them `is_faulty`."""

    def __init__(self, folder: Path, trainer: Any, is_faulty: bool) -> None:
        self.folder, self.trainer, self.is_faulty = folder, trainer, is_faulty
        self.step = 0  # of the Trainer, now
        self.is_saving = False
        self.seed = 0

    def is_due(self) -> bool:
        """Return whether the fault happens now; it does so once."""
        injected = self.folder / "injected"
        if not self.is_faulty or self.step != STEP or injected.exists():
            return False
        injected.touch()
        time.sleep(1.5)
        return True

    def at_layer(self, number: int, act: Callable[[Any], Any]) -> None:
        """Have `act(output)` replace the output of a decoder layer in the step of the fault."""

        def hook(module: Any, args: Any, output: Any) -> Any:
            return act(output) if self.trainer.model.training and self.is_due() else None

        self.trainer.model.model.layers[number].register_forward_hook(hook)


def kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(*_: Any) -> None:
    time.sleep(600)


def run_out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (injected).")


def in_forward(act: Callable[[Any], Any], layer: int = 1) -> Callable[[Run], None]:
    return lambda run: run.at_layer(layer, act)


def in_backward(act: Callable[[Any], Any]) -> Callable[[Run], None]:
    def inject(run: Run) -> None:
        def hook(module: Any, args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if tensor.requires_grad and run.step == STEP:
                tensor.register_hook(lambda gradient: act(gradient) if run.is_due() else None)

        run.trainer.model.model.layers[0].register_forward_hook(hook)

    return inject


def in_exchange(act: Callable[[Any], Any]) -> Callable[[Run], None]:
    def inject(run: Run) -> None:
        wait_works = streams.CommStream.wait_works

        def wait_or_fail(*args: Any) -> Any:
            if run.is_due():
                act(args)
            return wait_works(*args)

        streams.CommStream.wait_works = wait_or_fail  # type: ignore[method-assign]

    return inject


def in_collator(act: Callable[[Any], Any], in_worker: bool = False) -> Callable[[Run], None]:
    def inject(run: Run) -> None:
        collator, calls = run.trainer.data_collator, []

        def collate(features: Any) -> Any:
            calls.append(1)
            assert (get_worker_info() is not None) == in_worker
            if len(calls) == STEP:
                run.step = STEP
                if run.is_due():
                    features = act(features) or features
            return collator(features)

        run.trainer.data_collator = collate

    return inject


def while_saving(act: Callable[[Any], Any]) -> Callable[[Run], None]:
    """Act in the first `torch.save` of the second checkpoint, when half of the file is written."""

    def inject(run: Run) -> None:
        save, save_checkpoint = torch.save, run.trainer._save_checkpoint

        def save_half(value: Any, target: Any, *args: Any, **kwargs: Any) -> None:
            save(value, target, *args, **kwargs)
            if run.is_saving and run.is_due():
                with open(getattr(target, "name", target), "r+b") as file:
                    file.truncate(os.path.getsize(file.name) // 2)
                time.sleep(3 * liveness.INTERVAL)  # as a real checkpoint: the other rank reads this phase
                act(target)

        def note_saving(*args: Any, **kwargs: Any) -> None:
            run.is_saving = run.trainer.state.global_step == 2 * SAVE_STEPS
            run.step = STEP if run.is_saving else run.step
            save_checkpoint(*args, **kwargs)
            run.is_saving = False

        torch.save = save_half  # type: ignore[assignment]
        run.trainer._save_checkpoint = note_saving

    return inject


def fill_disk(run: Run) -> None:
    """Let no file grow beyond 4 KB from the second checkpoint on: the error of a full disk, from the system."""
    save_checkpoint = run.trainer._save_checkpoint

    def save(*args: Any, **kwargs: Any) -> None:
        if run.trainer.state.global_step == 2 * SAVE_STEPS:
            run.step = STEP
            if run.is_due():
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        save_checkpoint(*args, **kwargs)

    run.trainer._save_checkpoint = save


def other_rows(features: Any) -> Any:
    """Return another row than the other ranks read, as after random numbers that one rank drew alone."""
    return [{name: values[::-1] for name, values in row.items()} for row in features]


def seed_differently(run: Run) -> None:
    run.step = STEP
    run.seed = int(run.is_due())


class TakeAnotherPath(TrainerCallback):
    """A rank that waits for the others where they never come."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.run.is_due():
            dist.barrier()


def run_another_version(run: Run) -> None:
    run.step = STEP
    if run.is_due():
        mock.patch.object(fault_handling, "__version__", "0.0.9").start()


def multiply(factor: float) -> Callable[[Any], Any]:
    def act(output: Any) -> Any:
        return (output[0] * factor, *output[1:]) if isinstance(output, tuple) else output * factor

    return act


BEFORE_THE_MODEL = ("other version", "other seed")
FAULTS = {
    "killed in forward": Fault(1, "forward pass", in_forward(kill), kills=True),
    "killed in backward": Fault(1, "backward pass", in_backward(kill), kills=True),
    "killed in exchange": Fault(1, "exchange", in_exchange(kill), kills=True),
    "killed in collator": Fault(1, "collator", in_collator(kill), kills=True, next_step=None),
    "killed loader worker": Fault(1, "worker", in_collator(kill, True), num_workers=1, next_step=None),
    "killed while saving": Fault(0, "saving", while_saving(kill), kills=True, next_step=2),
    "rank 1 killed while saving": Fault(1, "saving", while_saving(kill), kills=True, next_step=2),
    "stalls in forward": Fault(1, "forward pass", in_forward(sleep)),
    "stalls in collator": Fault(1, "collator", in_collator(sleep), next_step=None),
    "stalls in loader worker": Fault(
        1, "worker of the data loader", in_collator(sleep, True), num_workers=1, next_step=None
    ),
    "stalls while saving": Fault(0, "saving", while_saving(sleep), next_step=2),
    "other batch": Fault(1, "disagree about the batch", in_collator(other_rows)),
    "other seed": Fault(1, "disagree about", seed_differently, next_step=0, may_be_harmless=True),
    "other path": Fault(1, "callbacks", lambda run: run.trainer.add_callback(TakeAnotherPath(run))),
    "other version": Fault(1, "disagree about the versions", run_another_version, next_step=0),
    "NaN in activations": Fault(1, "came up on rank 1", in_forward(multiply(float("nan")), layer=0)),
    "Inf in activations": Fault(1, "came up on rank 1", in_forward(multiply(float("inf")), layer=0)),
    "out of memory": Fault(1, "forward pass", in_forward(run_out_of_memory)),
    "full disk": Fault(0, "saving", fill_disk, next_step=2),
}
