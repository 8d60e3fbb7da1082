"""Trains with one fault: `accelerate launch ... tests/faults/train_script.py FOLDER ENGINE FAULT TIMEOUT`.

The fault is a name of `injection.FAULTS`, or "none". The same command goes on from the last whole checkpoint, without
the fault. Rank 0 writes FOLDER/results.json at the end.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from ring_hf.hf import ContextParallelCollator, ContextParallelConfig
from tests.engines.cases import EngineCase, build_model, engine_arguments
from tests.faults.injection import BEFORE_THE_MODEL, FAULTS, SAVE_STEPS, STEPS, Run
from tests.trainer.cases import Case, Rows
from tests.trainer.train_script import arguments, curves

CASE = Case("run", "zigzag", 2, accumulation=1, batch=2, steps=STEPS, threads=1)


class CountSteps(TrainerCallback):
    """Tells a run which step is trained, and notes the first one."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.start: int | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = state.global_step if self.start is None else self.start
        self.run.step = state.global_step + 1


def main() -> None:
    folder, engine, name, timeout = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    rank = int(os.environ["RANK"])
    fault = FAULTS.get(name)
    run = Run(folder, None, fault is not None and fault.rank == rank)
    if fault is not None and name in BEFORE_THE_MODEL:
        fault.inject(run)
    torch.set_num_threads(1)
    with engine_arguments(engine) as more:
        model = build_model(EngineCase(engine, CASE), folder)
        if run.seed:
            torch.manual_seed(run.seed)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
        args = arguments(CASE, folder, **more)
        args.ddp_timeout, args.seed = timeout, run.seed
        args.save_strategy, args.save_steps = "steps", SAVE_STEPS
        args.dataloader_num_workers = 0 if fault is None else fault.num_workers
        args.parallelism_config = ContextParallelConfig(context_parallel_size=2)
        trainer = Trainer(
            model, args, train_dataset=Rows(2 * STEPS, "uneven"), data_collator=ContextParallelCollator(model)
        )
        steps = CountSteps(run)
        trainer.add_callback(steps)
        run.trainer = trainer
        if fault is not None and name not in BEFORE_THE_MODEL:
            fault.inject(run)
        has_checkpoints = any((folder / CASE.name).glob("checkpoint-*"))
        trainer.train(resume_from_checkpoint=has_checkpoints)
    if rank == 0:
        (folder / "results.json").write_text(json.dumps({"start": steps.start, **curves(trainer)}))


if __name__ == "__main__":
    main()
