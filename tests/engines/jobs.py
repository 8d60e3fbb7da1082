"""Evaluation and checkpoints on an engine; see `train_script.py`.

Both begin with training: upstream, FSDP2 and DeepSpeed evaluate only models that they have prepared for training.
"""

import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from transformers import Trainer, set_seed

from ring_hf import memory
from ring_hf.hf import ContextParallelCollator, ContextParallelConfig
from tests.engines.cases import ALL, AT_LOADING, MEMORY_OPTIONS, EngineCase, build_model, engine_arguments, state_of
from tests.trainer.broken import BROKEN
from tests.trainer.cases import Case, Rows
from tests.trainer.evaluation_cases import checksum_metrics
from tests.trainer.train_script import arguments, curves

EVALUATED = range(1, 8)  # rows; many leave a ragged last batch
BATCHES = (1, 2)
HALF = 5  # steps until the checkpoint
_RUN = Case("", "zigzag", 2, steps=2 * HALF)


@dataclass(frozen=True)
class Resume:
    """Train to the end with a checkpoint in the middle, and resume from there, possibly with another mesh.

    Attributes:
        before, after: cp and dp of the first and the resumed run.
        checkpoint_of: the folder of the launch whose checkpoint is resumed from; default: its own.
        sharded: whether FSDP writes checkpoints as SHARDED_STATE_DICT.
    """

    engine: str
    before: tuple[int, int]
    after: tuple[int, int]
    memory_options: str = "all"
    checkpoint_of: str | None = None
    sharded: bool = False

    @property
    def name(self) -> str:
        cp, dp = self.after
        kind = "-sharded" if self.sharded else ""
        return f"{self.engine}{kind}: cp {self.before[0]} dp {self.before[1]} -> cp {cp} dp {dp}"


_EVERY_RESUME = [
    Resume("FSDP2", (2, 1), (2, 1)),
    Resume("FSDP2", (2, 1), (2, 1), sharded=True),
    Resume("ZeRO-2", (2, 1), (2, 1)),
    Resume("ZeRO-3", (2, 1), (2, 1)),
    Resume("FSDP2", (2, 2), (4, 1)),
    Resume("ZeRO-3", (2, 2), (4, 1)),
    Resume("FSDP2", (2, 1), (2, 2), checkpoint_of="FSDP-2"),
    Resume("FSDP2", (2, 1), (4, 1), checkpoint_of="FSDP-2", sharded=True),
]
_EVERY_EVALUATION = {("FSDP2", 2), ("FSDP2", 4), ("ZeRO-3", 2), ("ZeRO-3", 4), ("ZeRO-2", 2)}
# Four processes of DeepSpeed are slow on two cores.
RESUMES = [case for case in _EVERY_RESUME if ALL or (case.engine, case.before) != ("ZeRO-3", (2, 2))]
EVALUATIONS = {pair for pair in _EVERY_EVALUATION if ALL or pair != ("ZeRO-3", 4)}


# Memory options, block (in tokens) and data of the runs whose collectives are counted, by name.
COUNTED = {"plain": ("", 20, "uneven"), "saved": ("saved", 20, "uneven")}
COUNTED |= {f"{data}, blocks of {block}": ("all", block, data) for data in ("uneven", "hole") for block in (20, 5)}


class CollectiveCounter(TorchDispatchMode):
    """Context that counts the operators of `torch.distributed` by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


def count(engine: str, folder: Path) -> dict[str, Any]:
    """Return the number of collectives in two optimizer steps, by run and operator."""
    results: dict[str, Any] = {}
    for name, (memory_options, block, data) in COUNTED.items():
        run = replace(_RUN, name=f"{engine} {name}", data=data, hole_layout="zigzag", steps=2)
        with engine_arguments(engine) as more:
            trainer = make_trainer(EngineCase(engine, run, memory_options=memory_options), folder, more, block)
            with CollectiveCounter() as collectives:
                trainer.train()
        results[name] = dict(collectives.counts)
    return results


class MeanOfShards(Trainer):
    """Weighs every shard alike, however many targets it has."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        logits, labels = outputs.logits.float().flatten(0, 1), inputs["shift_labels"].flatten()
        loss = torch.nn.functional.cross_entropy(logits, labels)
        return (loss, outputs) if return_outputs else loss


class SumOverShards(MeanOfShards):
    """Divides the sum over a shard by the number of targets of all ranks."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        mean, outputs = super().compute_loss(model, inputs, True)
        num_targets = (inputs["shift_labels"] != -100).sum()
        loss = mean * num_targets / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


class OwnBackward(SumOverShards):
    """Runs a backward pass of its own, whose gradients ZeRO does not keep in `parameter.grad`."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        outputs.logits.float().logsumexp(-1).mean().backward(retain_graph=True)
        return (loss, outputs) if return_outputs else loss


TRIALS = {"backward of its own": OwnBackward, "mean of shards": MeanOfShards, "sum over shards": SumOverShards}


def take_trials(engine: str, folder: Path) -> dict[str, Any]:
    """Return "trained" or the error of the trial step for wrong and right losses, in fp32 and bf16."""
    results: dict[str, Any] = {}
    for dtype in ("fp32", "bf16"):
        for name, trainer_class in TRIALS.items():
            run = replace(_RUN, name=f"{engine} {name} {dtype}", steps=2, bf16=dtype == "bf16")
            with engine_arguments(engine) as more:
                trainer = make_trainer(EngineCase(engine, run), folder, more, trainer_class=trainer_class)
                try:
                    trainer.train()
                    results[f"{name} {dtype}"] = "trained"
                except ValueError as error:
                    results[f"{name} {dtype}"] = str(error)
    return results


def loop(engine: str, folder: Path) -> dict[str, Any]:
    """Return the losses of a loop without a Trainer, as in `docs/training_loop.md`."""
    case = EngineCase(engine, replace(_RUN, name=f"loop on {engine}") if engine != "DDP" else _RUN.reference())
    set_seed(0)
    more: dict[str, Any]
    with engine_arguments(engine) as more:
        plugins: dict[str, Any] = {}
        if "deepspeed" in more:
            config = {**more["deepspeed"], "gradient_accumulation_steps": 1, "train_micro_batch_size_per_gpu": 2}
            config["gradient_clipping"] = 0.0  # else Accelerate clips at 1
            plugins["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=config)
        if "fsdp" in more:
            settings = {**more["fsdp_config"], "fsdp_version": more["fsdp_config"]["version"]}
            del settings["version"]
            plugins["fsdp_plugin"] = FullyShardedDataParallelPlugin(**settings)
        if case.run.layout is not None:
            plugins["parallelism_config"] = ContextParallelConfig(context_parallel_size=case.run.cp)
        PartialState(cpu=True)
        accelerator = Accelerator(**plugins)
        model: Any = build_model(case, folder)
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=3e-4)
        loader: Any = DataLoader(Rows(20, "uneven"), batch_size=2, collate_fn=ContextParallelCollator(model))
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        model.train()
        losses: list[float] = []
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(accelerator.reduce(loss.detach(), reduction="mean")))  # type: ignore[arg-type]
        return {"loss": losses, "class": type(model).__name__}


# By name: arguments of `DistributedConfig`, whether weights are tied, and words of the error.
REFUSED_AT_LOADING: dict[str, tuple[dict[str, Any], bool, str]] = {
    "tensor parallelism": ({"tp_size": 2}, False, "DistributedConfig(tp_size=2)"),
    "mixed precision": ({"fsdp_size": 2, "fsdp_mixed_precision": True}, False, "among them the number of targets"),
    "uneven tied weights": ({"fsdp_size": 2}, True, "67 rows, which 2 ranks cannot share evenly"),
}


def refuse_at_loading(folder: Path) -> dict[str, Any]:
    """Return the error for each way of loading a model that is not exact, raised before the first step."""
    results: dict[str, Any] = {}
    for name, (sizes, tied, _) in REFUSED_AT_LOADING.items():
        case = EngineCase(AT_LOADING, replace(_RUN, name=f"refused for {name}"), tied)
        with engine_arguments(AT_LOADING) as more:
            try:
                make_trainer(case, folder, more, sizes=sizes)
                results[name] = "accepted"
            except ValueError as error:
                results[name] = str(error)
    return results


def evaluate(engine: str, world_size: int, folder: Path) -> dict[str, Any]:
    """Return losses of 1 to 7 rows and metrics of 5, by batch size. One process uses the batch of all replicas."""
    is_reference = world_size == 1
    results: dict[str, Any] = {}
    for dp in (1, 2) if is_reference else (world_size // 2,):
        run = replace(_RUN, dp=dp, steps=1, learning_rate=0.0)
        run = run.reference() if is_reference else run
        trainer = None
        with engine_arguments(engine) as more:
            trainer = make_trainer(EngineCase(engine, run), folder, more)
            trainer.train()
            for batch in BATCHES:
                trainer.args.per_device_eval_batch_size = batch * dp if is_reference else batch
                trainer.compute_metrics, trainer.args.include_for_metrics = None, []
                key = f"dp {dp} batch {batch}"
                for num_rows in EVALUATED:
                    loss = trainer.evaluate(Rows(num_rows, "uneven", seed=num_rows))["eval_loss"]
                    results[f"{key} rows {num_rows}"] = {"loss": loss}
                trainer.compute_metrics, trainer.args.include_for_metrics = checksum_metrics, ["inputs"]
                metrics = trainer.predict(Rows(5, "uneven")).metrics
                results[f"{key} metrics"] = {name: metrics[f"test_{name}"] for name in ("loss", "accuracy", "logits")}
            results["ran"] = state_of(trainer)
    return results


def resume(case: Resume, folder: Path) -> dict[str, Any]:
    """Return the curves of a run and of the run resumed from its middle. The final model of each is saved."""
    more: dict[str, Any]
    world_size = int(os.environ["WORLD_SIZE"])
    results: dict[str, Any] = {}
    for name, (cp, dp) in (("whole", case.before), ("resumed", case.after)):
        if cp * dp != world_size:
            continue  # in the other launch
        run = replace(_RUN, name=case.name, cp=cp, dp=dp, resume=True)
        with engine_arguments(case.engine) as more:
            if case.sharded:
                more["fsdp_config"]["state_dict_type"] = "SHARDED_STATE_DICT"
            engine_case = EngineCase(case.engine, run, memory_options=case.memory_options)
            trainer = make_trainer(engine_case, folder, more)
            if name == "resumed":
                launch_folder = folder.parent / case.checkpoint_of if case.checkpoint_of else folder
                trainer.train(resume_from_checkpoint=str(launch_folder / engine_case.name / f"checkpoint-{HALF}"))
            else:
                trainer.train()
            trainer.save_model(str(folder / case.name / f"final {name}"))
            results[name] = {**curves(trainer), **state_of(trainer)}
    return results


def save(folder: Path) -> dict[str, Any]:
    """Save the final model of one process, with which those of `resume` are compared."""
    trainer = make_trainer(EngineCase("DDP", _RUN.reference()), folder, {})
    trainer.train()
    trainer.save_model(str(folder / "final"))
    return curves(trainer)


def make_trainer(
    case: EngineCase,
    folder: Path,
    more: dict[str, Any],
    block: int = 20,
    trainer_class: type[Trainer] = Trainer,
    sizes: dict[str, Any] | None = None,
) -> Trainer:
    """Return a Trainer for a case.

    Args:
        block: tokens of a block in the memory options.
        sizes: arguments of the `DistributedConfig` of a model sharded at loading, instead of the usual ones.
    """
    torch.set_num_threads(1)
    set_seed(0)
    run = case.run
    model = build_model(case, folder, sizes)
    if case.memory_options:
        memory_options = MEMORY_OPTIONS[case.memory_options]
        memory.apply(model, **{name: block if value == 20 else value for name, value in memory_options.items()})
    args = arguments(replace(run, name=case.name), folder, **more)
    if run.layout is not None:
        args.parallelism_config = ContextParallelConfig(context_parallel_size=run.cp, **case.settings)
    if case.sync_each_batch:
        args.accelerator_config.gradient_accumulation_kwargs = {"sync_each_batch": True}
    rows = Rows(run.batch * run.steps, run.data, run.hole_layout, run.hole_cp)
    collator: Any = ContextParallelCollator(model)
    if run.broken is not None:
        collator = BROKEN[run.broken](collator)
    return trainer_class(model, args, train_dataset=rows, data_collator=collator)
