"""The evaluation cases: dataset lengths that leave a ragged last batch, batch sizes, meshes, and patterns of labels.

One process evaluates with a batch of `dp * batch` rows. The launched processes must return its loss, predictions and
labels.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import EvalPrediction, Trainer, TrainingArguments

from ring_hf.hf import ContextParallelCollator, ContextParallelConfig
from tests.trainer.cases import STATIC, Case, Rows, build_model

LENGTHS = range(1, 8)
BATCHES = (1, 2)
LABELS = ("all", "uneven", "hole")
CP = 2
MESHES = {2: (1,), 4: (2,)}  # world size: numbers of replicas
OTHER_ALGORITHMS = {2: ("balanced", None), 4: ("zigzag", 2)}  # layout and ulysses_size
METRICS = ("accuracy", "rows", "tokens", "labels", "logits", "inputs", "loss")
NUM_PREDICTED_ROWS = 5  # rows for predict(): ragged for a batch of 2 and for 2 replicas


def checksum_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """A `compute_metrics` that returns order-sensitive checksums of its input. Next-token accuracy needs whole rows in
    order."""
    logits, labels = torch.tensor(prediction.predictions).double(), torch.tensor(prediction.label_ids)
    is_target = labels[:, 1:] != -100
    is_correct = logits[:, :-1].argmax(-1) == labels[:, 1:]
    weights = torch.arange(1, labels.numel() + 1, dtype=torch.double).reshape(labels.shape)
    is_labelled = (labels != -100).double()
    return {
        "accuracy": is_correct[is_target].double().mean().item(),
        "rows": float(len(labels)),
        "tokens": float(labels.shape[1]),
        "labels": (weights * labels * is_labelled).sum().item(),
        "logits": (weights[..., None] * logits * is_labelled[..., None]).sum().item() / weights.sum().item(),
        "inputs": float(torch.tensor(prediction.inputs).double().clamp(min=0).sum()),
    }


def align_predictions(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A `preprocess_logits_for_metrics` that depends on other tokens: shift predictions to the labels they predict."""
    predictions = logits.argmax(-1).roll(1, dims=1)
    predictions[:, 0] = labels[:, 0]
    return predictions


def run_evaluations(world_size: int, folder: Path) -> dict[str, Any]:
    """Return all losses and predictions of this launch, by a key that does not depend on the number of processes."""
    results: dict[str, Any] = {}
    for num_replicas in MESHES.get(world_size, (1, 2)):
        for batch in BATCHES:
            for labels in LABELS:
                layouts = STATIC if labels == "hole" else ("zigzag",)
                for layout in layouts:
                    key = f"dp{num_replicas}-batch{batch}-{labels}-{layout}"
                    config = ContextParallelConfig(context_parallel_size=CP) if world_size > 1 else None
                    results |= _evaluate(key, num_replicas, batch, labels, layout, config, folder)
    return results


def run_more_evaluations(world_size: int, folder: Path) -> dict[str, Any]:
    """Return the results of other algorithms with all processes in one replica, by the key of their reference."""
    if world_size == 1:
        return {}
    layout, ulysses_size = OTHER_ALGORITHMS[world_size]
    config = ContextParallelConfig(context_parallel_size=world_size, ulysses_size=ulysses_size)
    return _evaluate("dp1-batch2-uneven-zigzag", 1, 2, "uneven", layout, config, folder)


def _evaluate(
    key: str,
    num_replicas: int,
    batch: int,
    labels: str,
    layout: str,
    config: ContextParallelConfig | None,
    folder: Path,
) -> dict[str, Any]:
    is_reference = config is None
    model = build_model(Case("evaluation", None if is_reference else layout))
    args = TrainingArguments(
        output_dir=str(folder / "evaluation"),
        per_device_eval_batch_size=batch * num_replicas if is_reference else batch,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        include_for_metrics=["inputs"],
        parallelism_config=config,
    )
    collator = ContextParallelCollator(model)
    trainer = Trainer(model, args, data_collator=collator)
    results: dict[str, Any] = {}
    for length in LENGTHS:
        rows = Rows(length, labels, layout if labels == "hole" else None, CP, seed=length)
        results[f"{key}-length{length}"] = {"loss": trainer.evaluate(rows)["eval_loss"]}
    rows = Rows(NUM_PREDICTED_ROWS, labels, layout if labels == "hole" else None, CP)
    trainer.compute_metrics = checksum_metrics
    metrics = trainer.predict(rows).metrics
    results[f"{key}-predict"] = {name[5:]: value for name, value in metrics.items() if name[5:] in METRICS}
    trainer.compute_metrics, trainer.preprocess_logits_for_metrics = None, align_predictions
    output = trainer.predict(rows)
    is_target = torch.tensor(output.label_ids) != -100
    is_correct = torch.tensor(output.predictions) == torch.tensor(output.label_ids)
    results[f"{key}-preprocess"] = {"accuracy": is_correct[is_target].double().mean().item()}
    packed_trainer = Trainer(build_model(Case("", None if is_reference else layout)), args, data_collator=None)
    packed_trainer.data_collator = ContextParallelCollator(packed_trainer.model, packing=True)
    packed_trainer.args.prediction_loss_only = True
    packed_trainer.args.include_for_metrics = []
    for length in (3, 5):
        rows = Rows(length, labels, layout if labels == "hole" else None, CP, seed=length)
        results[f"{key}-packed-length{length}"] = {"loss": packed_trainer.evaluate(rows)["eval_loss"]}
    return results
