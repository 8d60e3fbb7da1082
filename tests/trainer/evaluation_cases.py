"""The evaluation matrix: dataset lengths that leave a ragged last batch, batch sizes, meshes, and which labels count.

One process evaluates with `dp * batch` rows at once; the launched processes must return its loss, predictions and
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
MORE = {2: ("balanced", None), 4: ("zigzag", 2)}  # layout and ulysses_size
METRICS = ("accuracy", "rows", "tokens", "labels", "logits", "inputs", "loss")
PREDICTED = 5  # rows for predict(): ragged for a batch of 2 and for 2 replicas


def sums(prediction: EvalPrediction) -> dict[str, float]:
    """Order-sensitive numbers of everything that `compute_metrics` sees: next-token accuracy needs whole rows in
    order."""
    logits, labels = torch.tensor(prediction.predictions).double(), torch.tensor(prediction.label_ids)
    counted = labels[:, 1:] != -100
    right = logits[:, :-1].argmax(-1) == labels[:, 1:]
    weights = torch.arange(1, labels.numel() + 1, dtype=torch.double).reshape(labels.shape)
    real = (labels != -100).double()
    return {
        "accuracy": right[counted].double().mean().item(),
        "rows": float(len(labels)),
        "tokens": float(labels.shape[1]),
        "labels": (weights * labels * real).sum().item(),
        "logits": (weights[..., None] * logits * real[..., None]).sum().item() / weights.sum().item(),
        "inputs": float(torch.tensor(prediction.inputs).double().clamp(min=0).sum()),
    }


def argmax(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A `preprocess_logits_for_metrics` that looks across tokens: predictions aligned with the labels they predict."""
    predictions = logits.argmax(-1).roll(1, dims=1)
    predictions[:, 0] = labels[:, 0]
    return predictions


def run_evaluations(world_size: int, folder: Path) -> dict[str, Any]:
    """All losses and predictions of this launch, by a key that names the case without its mesh's rank numbers."""
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
    """One replica of all processes with other algorithms, under the key of the one-process evaluation to compare
    with."""
    if world_size == 1:
        return {}
    layout, ulysses_size = MORE[world_size]
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
    alone = config is None
    model = build_model(Case("evaluation", None if alone else layout))
    args = TrainingArguments(
        output_dir=str(folder / "evaluation"),
        per_device_eval_batch_size=batch * num_replicas if alone else batch,
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
    rows = Rows(PREDICTED, labels, layout if labels == "hole" else None, CP)
    trainer.compute_metrics = sums
    metrics = trainer.predict(rows).metrics
    results[f"{key}-predict"] = {name[5:]: value for name, value in metrics.items() if name[5:] in METRICS}
    trainer.compute_metrics, trainer.preprocess_logits_for_metrics = None, argmax
    output = trainer.predict(rows)
    counted = torch.tensor(output.label_ids) != -100
    right = torch.tensor(output.predictions) == torch.tensor(output.label_ids)
    results[f"{key}-preprocess"] = {"accuracy": right[counted].double().mean().item()}
    packed = Trainer(build_model(Case("", None if alone else layout)), args, data_collator=None)
    packed.data_collator = ContextParallelCollator(packed.model, packing=True)
    packed.args.prediction_loss_only, packed.args.include_for_metrics = True, []
    for length in (3, 5):
        rows = Rows(length, labels, layout if labels == "hole" else None, CP, seed=length)
        results[f"{key}-packed-length{length}"] = {"loss": packed.evaluate(rows)["eval_loss"]}
    return results
