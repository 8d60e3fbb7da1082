"""Runs training and evaluation cases as a user's script does, with an unmodified Trainer.

`accelerate launch ... tests/trainer/train_script.py OUTPUT_FOLDER`. Everything that a world size has to run happens in
one launch, since starting processes takes longer than most cases. Rank 0 writes OUTPUT_FOLDER/results.json.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed import all_gather_object, is_initialized
from transformers import Trainer, TrainingArguments, set_seed

import ring_hf  # noqa: F401 (registers the backends, as a user's script does)
from ring_hf.hf import ContextParallelCallback, ContextParallelCollator, ContextParallelConfig
from tests.trainer.broken import BROKEN
from tests.trainer.cases import Case, Rows, build_model, pad_with_dense_prefixes, reference_cases, world_cases
from tests.trainer.evaluation_cases import run_evaluations, run_more_evaluations


def arguments(case: Case, folder: Path, **more: Any) -> TrainingArguments:
    if case.checkpointing is not None:
        more["gradient_checkpointing"] = True
        more["gradient_checkpointing_kwargs"] = {"use_reentrant": case.checkpointing == "reentrant"}
    return TrainingArguments(
        output_dir=str(folder / case.name),
        max_steps=case.steps,
        per_device_train_batch_size=case.batch // case.dp // case.accumulation,
        gradient_accumulation_steps=case.accumulation,
        learning_rate=case.learning_rate,
        logging_steps=1,
        bf16=case.bf16,
        dataloader_num_workers=case.workers,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="steps" if case.resume else "no",
        save_steps=case.steps // 2,
        ddp_find_unused_parameters=False,
        remove_unused_columns=case.data != "prefix",
        parallelism_config=ContextParallelConfig(
            context_parallel_size=case.cp,
            ulysses_size=case.ulysses,
            inner_ring_size=case.inner,
            head_chunks=case.head_chunks,
            transport=case.transport,
        )
        if case.layout
        else None,
        **more,
    )


def train(case: Case, folder: Path) -> dict[str, Any]:
    """Run one case. Return the losses and grad norms of all steps, and the engine that ran."""
    torch.set_num_threads(case.threads)
    set_seed(0)
    model = build_model(case)
    collator: Any = ContextParallelCollator(model, packing=case.packing, prefix_lm=case.data == "prefix")
    if case.data == "prefix" and case.layout is None:
        collator = pad_with_dense_prefixes
    if case.broken is not None:
        collator = BROKEN[case.broken](collator)
    rows = Rows(case.batch * case.steps, case.data, case.hole_layout, case.hole_cp)
    callbacks = [ContextParallelCallback()] if case.workers else None  # in addition to that of the config
    args = arguments(case, folder)
    trainer = Trainer(model, args, train_dataset=rows, data_collator=collator, callbacks=callbacks)
    metrics = trainer.train().metrics
    result = {"engine": str(trainer.accelerator.distributed_type), **curves(trainer)}
    result["logged"] = sorted(trainer.state.log_history[-2])
    assert trainer.state.log_history[-1]["train_samples_per_second"] == metrics["train_samples_per_second"]
    result["sequences"] = metrics["train_samples_per_second"] * metrics["train_runtime"]
    if case.resume:
        result.update(resume(case, folder, trainer, rows))
    return result


def resume(case: Case, folder: Path, trained: Trainer, rows: Rows) -> dict[str, Any]:
    """Resume from the checkpoint in the middle, and save the final model for plain Transformers."""
    trained.save_model(str(folder / "saved"))
    model = build_model(case)
    trainer = Trainer(model, arguments(case, folder), train_dataset=rows, data_collator=ContextParallelCollator(model))
    trainer.train(resume_from_checkpoint=str(folder / case.name / f"checkpoint-{case.steps // 2}"))
    tokens = torch.tensor([rows[0]["input_ids"]])
    trained.model.eval()
    with torch.no_grad():
        logits = trained.accelerator.unwrap_model(trained.model)(input_ids=tokens).logits
    return {"resumed": curves(trainer), "tokens": tokens.tolist(), "logits_sum": logits.double().square().sum().item()}


def curves(trainer: Trainer) -> dict[str, list[float]]:
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return {"loss": [entry["loss"] for entry in steps], "grad_norm": [entry["grad_norm"] for entry in steps]}


def main() -> None:
    gc.freeze()  # see tests/support/freeze.py
    folder = Path(sys.argv[1])
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    cases = reference_cases() if world_size == 1 else world_cases(world_size)
    selection = os.environ.get("CASES")
    results: dict[str, Any] = {}
    for case in cases:
        if selection is None or any(name in case.name for name in selection.split(",")):
            began = time.perf_counter()
            results[case.name] = {**train(case, folder), "seconds": time.perf_counter() - began}
    if selection is None or selection == "evaluation":
        results["evaluation"] = run_evaluations(world_size, folder)
        results["more evaluation"] = run_more_evaluations(world_size, folder)
    processes: list[int] = [os.getpid()]
    if is_initialized():
        processes = [0] * world_size
        all_gather_object(processes, os.getpid())
    results["processes"] = processes
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
