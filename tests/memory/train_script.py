"""Trains with memory options: `accelerate launch --num_processes 2 tests/memory/train_script.py OUTPUT.json`.

Rank 0 writes the losses, grad norms and evaluations of every case of `CASES`.
"""

import gc
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed import is_initialized
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, set_seed

import ring_hf
from tests.support.liger_stand_in import SETTINGS, liger
from tests.trainer.cases import Case, Rows, build_model
from tests.trainer.train_script import arguments, curves

OPTIONS = {"attention": "save", "ffn_block": 20, "loss_block": 20}
NO_BLOCKS = {"ffn_block": None, "loss_block": None}
BASE = Case("", "zigzag", 2, steps=4)


@dataclass(frozen=True)
class Run:
    """A case with memory options; `reference` is the run in one process that it is compared with.

    Attributes:
        find_unused: whether DDP looks for unused parameters, and so at the outputs of the model.
        weighted: whether every token has a weight of its own in the loss.
    """

    case: Case
    options: dict[str, Any] | None
    find_unused: bool = False
    liger: bool = False
    weighted: bool = False

    def reference(self) -> "Run":
        options = {"attention": "none", "ffn_block": None, "loss_block": 10**6} if self.weighted else None
        return Run(self.case.reference(), options, weighted=self.weighted)


CASES = {
    "zigzag": Run(BASE, OPTIONS),
    "zigzag, a rank without labels": Run(
        replace(BASE, data="hole", hole_layout="zigzag"), {**OPTIONS, "attention": "none"}, find_unused=True
    ),
    "zigzag, Liger's loss": Run(BASE, {"attention": "save", **NO_BLOCKS}, liger=True),
    "zigzag, weighted tokens": Run(BASE, OPTIONS, weighted=True),
    "ulysses, LoRA, offload": Run(replace(BASE, layout="ulysses", lora=True), {**OPTIONS, "offload": "all"}),
    "balanced, packed, weighted": Run(
        replace(BASE, layout="balanced", packing=True), {**OPTIONS, "attention": "recompute"}, weighted=True
    ),
}


class Weighted(Dataset):
    """Rows whose tokens have weights between 0 and 2."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        generator = torch.Generator().manual_seed(index)
        return {**row, "loss_weights": 2 * torch.rand(len(row["input_ids"]), generator=generator)}


def metrics(prediction: Any) -> dict[str, float]:
    logits, labels = torch.tensor(prediction.predictions).double(), torch.tensor(prediction.label_ids)
    is_counted = labels[:, 1:] != -100
    is_right = (logits[:, :-1].argmax(-1) == labels[:, 1:])[is_counted]
    return {"accuracy": is_right.double().mean().item(), "size": logits[:, :-1][is_counted].square().sum().item()}


def train(run: Run, folder: Path) -> dict[str, Any]:
    """Train four steps; with padding, also evaluate once with the logits and once without."""
    torch.set_num_threads(1)
    set_seed(0)
    case, weigh = run.case, Weighted if run.weighted else lambda rows: rows
    model = build_model(case)
    if run.options is not None:
        ring_hf.memory.apply(model, **run.options)
    args = arguments(replace(case, name="run"), folder)
    args.ddp_find_unused_parameters = run.find_unused
    args.remove_unused_columns = not run.weighted
    if run.liger:
        args.use_liger_kernel, args.liger_kernel_config = True, SETTINGS
    trainer = Trainer(
        model,
        args,
        train_dataset=weigh(Rows(case.batch * case.steps, case.data, case.hole_layout, case.hole_cp)),
        data_collator=ring_hf.ContextParallelCollator(model, packing=case.packing),
        compute_metrics=metrics,
    )
    trainer.train()
    result: dict[str, Any] = curves(trainer)
    if not case.packing:
        rows = weigh(Rows(4, "uneven", seed=2))
        evaluated = trainer.evaluate(rows)
        result["evaluation"] = [evaluated[f"eval_{name}"] for name in ("loss", "accuracy", "size")]
        trainer.compute_metrics = None
        result["loss alone"] = trainer.evaluate(rows)["eval_loss"]
    return result


def models_left() -> int:
    """Return how many models are still referenced when their Trainer is gone."""
    gc.collect()
    return sum(issubclass(type(x), PreTrainedModel) for x in gc.get_objects())


def main() -> None:
    path = Path(sys.argv[1])
    with liger():
        results = {name: {**train(run, path.parent), "models left": models_left()} for name, run in CASES.items()}
    if not is_initialized() or torch.distributed.get_rank() == 0:
        path.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
