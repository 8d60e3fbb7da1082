"""Trains whole runs, or goes on from their middle in other settings: `tests/faults/resume_script.py FOLDER`.

The launches with 4 and 1 processes go on from checkpoints of that with 2. Rank 0 writes FOLDER/worldN.json.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, set_seed

from ring_hf.hf import ContextParallelCollator
from tests.trainer.cases import Case, Rows, build_model
from tests.trainer.train_script import arguments, curves

HALF, STEPS, STEPS_PER_EPOCH = 4, 8, 6  # the checkpoint is inside of the first epoch


@dataclass(frozen=True)
class Resume:
    """A run that goes on from the middle of another one.

    Attributes:
        source: name of that run in `WHOLE`.
        layout: None for one process with sdpa.
        is_bitwise: whether nothing differs from the run that was not interrupted.
    """

    name: str
    source: str
    layout: str | None = "zigzag"
    cp: int = 2
    dp: int = 1
    is_bitwise: bool = False


ALL = bool(os.environ.get("RING_HF_ALL_CASES"))
WHOLE = ("plain", "streaming", "best model")  # on 2 processes that share each sequence
EVERY_RESUME = (
    Resume("the same", "plain", is_bitwise=True),
    Resume("layout striped", "plain", "striped"),
    Resume("ulysses", "plain", "ulysses"),
    Resume("cp 4", "plain", cp=4),
    Resume("dp 2 x cp 2", "plain", dp=2),
    Resume("one process", "plain", None, cp=1),
    Resume("streaming dataset", "streaming", is_bitwise=True),
    Resume("streaming dataset, cp 4", "streaming", cp=4),
    Resume("best model", "best model", is_bitwise=True),
)
RESUMES = tuple(resume for resume in EVERY_RESUME if ALL or resume.cp * resume.dp < 4)  # slow on two cores


class Stream(IterableDataset):
    """The rows of `Rows`, without a length."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        yield from self.rows.rows


def train(source: str, settings: Resume, folder: Path, checkpoint: Path | None) -> dict[str, Any]:
    torch.set_num_threads(1)
    set_seed(0)
    case = Case(settings.name, settings.layout, settings.cp, settings.dp, batch=4, steps=STEPS, resume=True)
    model = build_model(case)
    rows: Any = Rows(case.batch * STEPS_PER_EPOCH, "uneven")
    more: dict[str, Any] = {}
    if source == "streaming":
        rows, more["accelerator_config"] = Stream(rows), {"dispatch_batches": False}
    if source == "best model":  # the highest loss counts as best: that of the first checkpoint
        more |= {"eval_strategy": "steps", "eval_steps": HALF, "load_best_model_at_end": True}
        more |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = Trainer(
        model,
        arguments(case, folder, **more),
        train_dataset=rows,
        eval_dataset=Rows(3, "uneven", seed=2),
        data_collator=ContextParallelCollator(model),
    )
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    weights = sum(float(parameter.detach().double().square().sum()) for parameter in trainer.model.parameters())
    best = trainer.state.best_model_checkpoint
    return {**curves(trainer), "weights": weights, "best": None if best is None else Path(best).name}


def main() -> None:
    folder, world_size = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", "1"))
    results: dict[str, Any] = {}
    for source in WHOLE if world_size == 2 else ():
        results[source] = train(source, Resume(f"whole {source}", source), folder, None)
    for resume in RESUMES:
        if resume.cp * resume.dp == world_size:
            checkpoint = folder / f"whole {resume.source}" / f"checkpoint-{HALF}"
            results[f"{resume.name} resumed"] = train(resume.source, resume, folder, checkpoint)
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / f"world{world_size}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
