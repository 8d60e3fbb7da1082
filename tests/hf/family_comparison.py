"""Compares a Trainer in two processes that share sequences with one in one process, for families of `model_families`.

The joint result of both ranks is compared with Transformers' own "eager" attention on rank 0 (whose softmax is fp32:
hence the tolerance), and with the ring backend in one process on rank 1.

Shapes: B rows, C tokens of a rank, S tokens of the whole row, V tokens of the vocabulary.
"""

import contextlib
import gc
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import transformers

from ring_hf.hf import context
from ring_hf.parallel import all_gather, join
from ring_hf.testing import rms_ratio
from ring_hf.verify.model_families import tiny
from tests.hf.trainer_step import MICRO_BATCHES, ForwardPass, Step, one_process, train_one_step

# By attention implementation of the one process, rank 0's first: the largest relative RMS of the logits, relative
# difference of the loss, and relative RMS of the gradient of any parameter.
TOLERANCES = {"eager": (2e-6, 2e-6, 2e-5), "ring_zigzag": (1e-6, 2e-6, 2e-6)}


@dataclass(frozen=True)
class Difference:
    """The difference between two processes and one.

    Attributes:
        logits: relative RMS.
        loss: relative difference of the logged loss.
        gradient: the largest relative RMS of any parameter's gradient.
        parameter: the name of that parameter.
        is_counted: whether the Trainer passed the number of targets to the model, in one process.
        aux_loss: of the one process, if the model has one.
    """

    logits: float
    loss: float
    gradient: float
    parameter: str
    is_counted: bool
    aux_loss: float | None

    def is_within(self, tolerances: tuple[float, float, float]) -> bool:
        """Return whether logits, loss and gradient are within their tolerances."""
        differences = (self.logits, self.loss, self.gradient)
        return all(value <= tolerance for value, tolerance in zip(differences, tolerances, strict=True))

    def __str__(self) -> str:
        return f"logits {self.logits:.1e}, loss {self.loss:.1e}, gradients {self.gradient:.1e} ({self.parameter})"


Results = dict[str, Difference | str]


def compare(
    rank: int, world_size: int, names: Sequence[str], settings: dict[str, Any], packing: bool = False
) -> Results:
    """Return for each family its difference from the reference of this rank, or the error.

    Args:
        rank: of this process; it selects the reference.
        world_size: ranks that share each sequence.
        names: of families.
        settings: fields of their configs.
        packing: see `train_one_step`.
    """
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    with _fast_garbage_collection(), _quiet():
        return {name: _compare(rank, world_size, name, settings, packing) for name in names}


def _compare(rank: int, world_size: int, name: str, settings: dict[str, Any], packing: bool) -> Difference | str:
    attention = list(TOLERANCES)[rank]
    whole_model = tiny(name, attention, **settings)
    shared_model = tiny(name, "ring_zigzag", **settings)
    _freeze_garbage_collection()

    def train_in_one_process() -> Step:
        with one_process():
            return train_one_step(whole_model, None if attention == "eager" else 1, packing)

    def train_together() -> Step:
        return train_one_step(shared_model, world_size, packing)

    steps = []
    for run in (train_in_one_process, train_together):
        step, error = _try(run)
        errors: list[str | None] = [None] * world_size
        dist.all_gather_object(errors, error)
        if step is None or any(errors):
            return str(error or f"on the other rank: {errors[1 - rank]}")
        steps.append(step)
    return _difference(whole=steps[0], shared=steps[1])


def _try(run: Callable[[], Step]) -> tuple[Step | None, str | None]:
    try:
        step = run()
        if len(step.passes) != MICRO_BATCHES:
            raise AssertionError(f"{len(step.passes)} forward passes, not {MICRO_BATCHES}: a trial step was taken")
    except Exception as error:  # both ranks report it and continue with the next family
        return None, f"{type(error).__name__}: {error}"
    finally:
        context.reset()
    return step, None


def _difference(whole: Step, shared: Step) -> Difference:
    whole_logits, shared_logits = [], []
    for whole_pass, shared_pass in zip(whole.passes, shared.passes, strict=True):
        whole_NV, shared_NV = _logits(whole_pass, shared_pass)
        whole_logits.append(whole_NV)
        shared_logits.append(shared_NV)
    largest = (0.0, "")
    for name, gradient in whole.gradients.items():
        largest = max(largest, (_relative_difference(shared.gradients[name], gradient), name))
    return Difference(
        logits=rms_ratio(torch.cat(shared_logits), torch.cat(whole_logits)),
        loss=abs(shared.loss - whole.loss) / abs(whole.loss),
        gradient=largest[0],
        parameter=largest[1],
        is_counted=whole.passes[0].is_counted,
        aux_loss=whole.passes[0].aux_loss,
    )


def _logits(whole: ForwardPass, shared: ForwardPass) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of the N real tokens of a micro-batch, [N, V]: of one process, and of all ranks."""
    metadata = shared.metadata
    assert metadata is not None and whole.metadata is None
    segments = [metadata.sequence.segments(rank) for rank in range(metadata.sequence.num_ranks)]
    shared_BSV = join(all_gather(shared.logits_BCV, metadata.group), segments, 1)[:, : metadata.unpadded_length]
    mask = whole.attention_mask
    is_real_BS = torch.ones(whole.logits_BCV.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    return whole.logits_BCV[is_real_BS], shared_BSV[is_real_BS]


def _relative_difference(gradient: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative RMS; infinity for NaN. If `expected` is 0 but for rounding, return the largest element."""
    ratio = rms_ratio(gradient, expected) if expected.abs().max() > 1e-9 else gradient.abs().max().item()
    return float("inf") if math.isnan(ratio) else ratio


def check(results: Sequence[Results], names: Sequence[str]) -> None:
    """Fail unless every family is within the tolerances of both references; the error names all others."""
    failures = []
    for (reference, tolerances), differences in zip(TOLERANCES.items(), results, strict=True):
        for name in names:
            difference = differences[name]
            if isinstance(difference, str):
                failures.append(f"{name}: {difference}")
            elif not difference.is_within(tolerances):
                failures.append(f"{name} against {reference}: {difference}")
    assert not failures, "\n".join(failures)


@contextlib.contextmanager
def _fast_garbage_collection() -> Iterator[None]:
    """Let Trainers collect garbage faster: each does so when it starts, which takes 0.3 s with all of Transformers."""
    try:
        yield
    finally:
        gc.unfreeze()


def _freeze_garbage_collection() -> None:
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Do not log the degrees of a hundred models."""
    logger = logging.getLogger("ring_hf")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
