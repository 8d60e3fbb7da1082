"""Runs the cases of `wrapper_cases` as a user's script does; rank 0 writes OUTPUT_FOLDER/results.json.

`accelerate launch ... tests/trainer/wrapper_script.py OUTPUT_FOLDER`. Two processes also resume from a checkpoint of
the launch with one process, in the folder `world1` next to theirs.
"""

import copy
import gc
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, set_seed

import ring_hf
from tests.trainer.cases import Case, build_model
from tests.trainer.train_script import curves
from tests.trainer.wrapper_cases import (
    MIDDLE,
    ROWS_PER_STEP,
    MovingAverage,
    StepCount,
    WrapperCase,
    wrapper_cases,
)


def arguments(case: WrapperCase, folder: Path, world_size: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder / case.name),
        max_steps=case.steps,
        per_device_train_batch_size=ROWS_PER_STEP // 2,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=4,
        learning_rate=case.learning_rate,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        parallelism_config=ring_hf.ContextParallelConfig(context_parallel_size=world_size) if world_size > 1 else None,
        **{"save_strategy": "no", **case.arguments},
    )


def train(case: WrapperCase, folder: Path, world_size: int) -> dict[str, Any]:
    """Run one case. Return the losses and grad norms of all steps, its evaluations, and the Trainer's best step."""
    torch.set_num_threads(1)
    set_seed(0)
    model = case.wrap(build_model(Case(case.name, "zigzag" if world_size > 1 else None)))
    args = arguments(case, folder, world_size)
    collator = ring_hf.ContextParallelCollator(model, inner=case.inner)
    callbacks, count = case.callbacks(), StepCount()
    trainer = case.trainer(
        model,
        args,
        train_dataset=case.data(),
        eval_dataset=case.eval_data(),
        data_collator=collator,
        callbacks=[*callbacks, count],
    )
    start_time = time.perf_counter()
    if case.evaluate_first:
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=checkpoint(case, folder))
    result: dict[str, Any] = {**curves(trainer), "evaluations": evaluation_losses(trainer)}
    result["steps"], result["best_step"] = count.steps, trainer.state.best_global_step
    result["num_trained"] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    result["final"] = final_losses(trainer)
    for callback in callbacks:
        if isinstance(callback, MovingAverage):
            result["average"] = copy.deepcopy(callback.losses)
            own_trainer = Trainer(callback.average, args, eval_dataset=case.eval_data(), data_collator=collator)
            result["average"]["by a Trainer of its own"] = [own_trainer.evaluate()["eval_loss"]]
            result["final again"] = final_losses(trainer)
    return {**result, "seconds": time.perf_counter() - start_time}


def evaluation_losses(trainer: Trainer) -> dict[str, list[float]]:
    """Return the losses of all evaluations so far, by the log key of their dataset."""
    losses: dict[str, list[float]] = {}
    for entry in trainer.state.log_history:
        for key, value in entry.items():
            if key.startswith("eval_") and key.endswith("loss"):
                losses.setdefault(key, []).append(value)
    return losses


def final_losses(trainer: Trainer) -> dict[str, float]:
    return {key: value for key, value in trainer.evaluate().items() if key.endswith("loss")}


def checkpoint(case: WrapperCase, folder: Path) -> str | None:
    """Return the checkpoint that the case resumes from, if any, without the optimizer's state if it forgets that."""
    if case.resume_from is None:
        return None
    source = folder.parent / case.resume_from / f"checkpoint-{MIDDLE}"
    if not case.forget_optimizer:
        return str(source)
    copy_folder = folder / f"{case.name}-rank{os.environ['RANK']}"
    shutil.copytree(source, copy_folder, ignore=shutil.ignore_patterns("optimizer.pt"))
    return str(copy_folder)


def main() -> None:
    gc.freeze()  # see tests/support/freeze.py
    folder = Path(sys.argv[1])
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    selection = os.environ.get("CASES")
    results: dict[str, Any] = {}
    for case in wrapper_cases(world_size):
        if selection is None or any(name in case.name for name in selection.split(",")):
            try:
                results[case.name] = train(case, folder, world_size)
            except ValueError as error:  # all ranks refuse together, so the other cases can run
                results[case.name] = {"refused": str(error)}
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
