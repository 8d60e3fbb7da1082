"""A Trainer in two processes that share sequences against a Trainer in one process, for families of `architectures`.

What the two ranks compute together is compared with Transformers' own "eager" attention on rank 0 (which takes softmax
in fp32: hence the tolerance), and with the ring backend in one process on rank 1.

Shapes: B rows, C tokens of a rank, S of the whole row, V words.
"""

import contextlib
import gc
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import transformers

from ring_hf.hf import context
from ring_hf.parallel import all_gather, join
from tests.harness import rms_ratio
from tests.hf.architectures import tiny
from tests.hf.trainer_step import MICRO_BATCHES, ForwardPass, Step, one_process, train_one_step

# By rank, the attention of the one process: relative RMS of logits, relative difference of the loss, and the worst
# relative RMS of any parameter's gradient.
BARS = {"eager": (2e-6, 2e-6, 2e-5), "ring_zigzag": (1e-6, 2e-6, 2e-6)}


@dataclass(frozen=True)
class Difference:
    """How far two processes are from one.

    Attributes:
        logits: relative RMS.
        loss: relative, as logged.
        gradient: the worst relative RMS of any parameter's gradient.
        parameter: the parameter that has it.
        is_counted: whether the Trainer told the one process the number of targets.
        aux_loss: of the one process, if the model has one.
    """

    logits: float
    loss: float
    gradient: float
    parameter: str
    is_counted: bool
    aux_loss: float | None

    def is_within(self, bar: tuple[float, float, float]) -> bool:
        return all(value <= limit for value, limit in zip((self.logits, self.loss, self.gradient), bar, strict=True))

    def __str__(self) -> str:
        return f"logits {self.logits:.1e}, loss {self.loss:.1e}, gradients {self.gradient:.1e} ({self.parameter})"


Results = dict[str, Difference | str]


def compare(
    rank: int, world_size: int, names: Sequence[str], settings: dict[str, Any], packing: bool = False
) -> Results:
    """Return the differences of each family from the reference of this rank, or the error.

    Args:
        names: of families.
        settings: changes of their configurations.
        packing: see `train_one_step`.
    """
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    with _quick_collection(), _quiet():
        return {name: _compare(rank, world_size, name, settings, packing) for name in names}


def _compare(rank: int, world_size: int, name: str, settings: dict[str, Any], packing: bool) -> Difference | str:
    attention = list(BARS)[rank]
    whole_model = tiny(name, attention, **settings)
    shared_model = tiny(name, "ring_zigzag", **settings)
    _forget_what_exists()

    def train_alone() -> Step:
        with one_process():
            return train_one_step(whole_model, None if attention == "eager" else 1, packing)

    def train_together() -> Step:
        return train_one_step(shared_model, world_size, packing)

    steps = []
    for run in (train_alone, train_together):
        step, error = _try(run)
        errors: list[str | None] = [None] * world_size
        dist.all_gather_object(errors, error)
        if step is None or any(errors):
            return str(error or f"on the other rank: {errors[1 - rank]}")
        steps.append(step)
    return _difference(*steps)


def _try(run: Callable[[], Step]) -> tuple[Step | None, str | None]:
    try:
        step = run()
        if len(step.passes) != MICRO_BATCHES:
            raise AssertionError(f"{len(step.passes)} forward passes, not {MICRO_BATCHES}: a trial step was taken")
    except Exception as problem:  # reported by both ranks, which go on with the next family together
        return None, f"{type(problem).__name__}: {problem}"
    finally:
        context.reset()
    return step, None


def _difference(whole: Step, shared: Step) -> Difference:
    pairs = [_logits(*passes) for passes in zip(whole.passes, shared.passes, strict=True)]
    worst = (0.0, "")
    for name, gradient in whole.gradients.items():
        worst = max(worst, (_apart(shared.gradients[name], gradient), name))
    return Difference(
        rms_ratio(torch.cat([together for _, together in pairs]), torch.cat([alone for alone, _ in pairs])),
        abs(shared.loss - whole.loss) / abs(whole.loss),
        *worst,
        is_counted=whole.passes[0].is_counted,
        aux_loss=whole.passes[0].aux_loss,
    )


def _logits(whole: ForwardPass, shared: ForwardPass) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of all real tokens of a micro-batch: of one process, and of all ranks together."""
    batch = shared.batch
    assert batch is not None and whole.batch is None
    segments = [batch.sequence.segments(rank) for rank in range(batch.sequence.num_ranks)]
    together_BSV = join(all_gather(shared.logits_BCV, batch.group), segments, 1)[:, : batch.unpadded_length]
    mask = whole.attention_mask
    is_real_BS = torch.ones(whole.logits_BCV.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    return whole.logits_BCV[is_real_BS], together_BSV[is_real_BS]


def _apart(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative RMS; NaN becomes infinite, and a gradient that is 0 but for rounding is compared with 1."""
    ratio = rms_ratio(got, want) if want.abs().max() > 1e-9 else got.abs().max().item()
    return ratio if ratio == ratio else float("inf")


def check(results: Sequence[Results], names: Sequence[str]) -> None:
    """Fail unless every family is as close to both references as the bar asks; name all that are not."""
    wrong = []
    for (reference, bar), differences in zip(BARS.items(), results, strict=True):
        for name in names:
            difference = differences[name]
            if isinstance(difference, str):
                wrong.append(f"{name}: {difference}")
            elif not difference.is_within(bar):
                wrong.append(f"{name} against {reference}: {difference}")
    assert not wrong, "\n".join(wrong)


@contextlib.contextmanager
def _quick_collection() -> Iterator[None]:
    """Every Trainer collects garbage when it starts, for a third of a second among all of Transformers' modules."""
    try:
        yield
    finally:
        gc.unfreeze()


def _forget_what_exists() -> None:
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The splits of a hundred models are no news."""
    logger = logging.getLogger("ring_hf")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
