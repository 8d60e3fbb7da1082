"""Runs the Trainer with levers pulled: `accelerate launch --num_processes 2 tests/memory/train_script.py OUTPUT.json`.

Rank 0 writes the losses, grad norms and evaluations of every case of `CASES`.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed import is_initialized
from transformers import Trainer, set_seed

import ring_hf
from tests.liger_stand_in import SETTINGS, liger
from tests.trainer.cases import Case, Rows, build_model
from tests.trainer.train_script import arguments, curves

LEVERS = {"attention": "save", "ffn_block": 20, "loss_block": 20}
LIGER = "zigzag, Liger's loss"
BASE = Case("", "zigzag", 2, steps=4)
# The case, its levers, and whether DDP looks for unused parameters (and so at the outputs of the model).
CASES: dict[str, tuple[Case, dict[str, Any], bool]] = {
    "zigzag": (BASE, LEVERS, False),
    "zigzag, a rank without labels": (
        replace(BASE, data="hole", hole_layout="zigzag"),
        {**LEVERS, "attention": "none"},
        True,
    ),
    "ulysses, LoRA, offload": (replace(BASE, layout="ulysses", lora=True), {**LEVERS, "offload": "all"}, False),
    LIGER: (BASE, {"attention": "save", "ffn_block": None, "loss_block": None}, False),
    "balanced, packed": (replace(BASE, layout="balanced", packing=True), {**LEVERS, "attention": "recompute"}, False),
}


def metrics(prediction: Any) -> dict[str, float]:
    logits, labels = torch.tensor(prediction.predictions).double(), torch.tensor(prediction.label_ids)
    counted = labels[:, 1:] != -100
    right = (logits[:, :-1].argmax(-1) == labels[:, 1:])[counted]
    return {"accuracy": right.double().mean().item(), "size": logits[:, :-1][counted].square().sum().item()}


def run(
    case: Case, levers: dict[str, Any] | None, find_unused: bool, folder: Path, use_liger: bool = False
) -> dict[str, Any]:
    """Four steps; with padding also an evaluation that asks for the logits, and one that does not."""
    torch.set_num_threads(1)
    set_seed(0)
    model = build_model(case)
    if levers is not None:
        ring_hf.memory.apply(model, **levers)
    args = arguments(replace(case, name="run"), folder)
    args.ddp_find_unused_parameters = find_unused
    if use_liger:
        args.use_liger_kernel, args.liger_kernel_config = True, SETTINGS
    trainer = Trainer(
        model,
        args,
        train_dataset=Rows(case.batch * case.steps, case.data, case.hole_layout, case.hole_cp),
        data_collator=ring_hf.ContextParallelCollator(model, packing=case.packing),
        compute_metrics=metrics,
    )
    trainer.train()
    result: dict[str, Any] = curves(trainer)
    if not case.packing:
        rows = Rows(4, "uneven", seed=2)
        evaluated = trainer.evaluate(rows)
        result["evaluation"] = [evaluated[f"eval_{name}"] for name in ("loss", "accuracy", "size")]
        trainer.compute_metrics = None
        result["loss alone"] = trainer.evaluate(rows)["eval_loss"]
    return result


def main() -> None:
    path = Path(sys.argv[1])
    with liger():
        results = {name: run(*case, path.parent, name == LIGER) for name, case in CASES.items()}
    if not is_initialized() or torch.distributed.get_rank() == 0:
        path.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
