"""How a run starts and ends: with the optimizer state of an earlier one, without a step if all are taken, and early if
the perplexity at a short context is back.
"""

import math
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, load_fsdp_optimizer
from transformers import Trainer, TrainerCallback

REACHED = "reached_perplexity"  # key of the row in the Trainer's history that says why a run ended early
# The files by which an engine's optimizer state is known in a checkpoint.
STATES = {"DDP": ("optimizer.pt",), "FSDP": ("optimizer.bin", "optimizer_0"), "DeepSpeed": ("latest",)}


class AllStepsTaken(Exception):
    """Raised when training is prepared and no step is left: engine and checkpoint are loaded, nothing is trained."""


class RunStart(TrainerCallback):
    """Loads the state of an optimizer before the first step, and ends a run that has no step left.

    Args:
        optimizer_from: a checkpoint, or None.
        evaluate_only (`bool`): take no step.

    Attributes:
        trainer: has to be set before training.
    """

    def __init__(self, optimizer_from: str | None, evaluate_only: bool):
        self.trainer: Trainer | None = None
        self.optimizer_from = optimizer_from
        self.evaluate_only = evaluate_only

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ended_early = any(REACHED in row for row in state.log_history)
        if self.evaluate_only or ended_early or state.global_step >= state.max_steps:
            raise AllStepsTaken
        if self.optimizer_from is not None and state.global_step == 0:
            assert self.trainer is not None
            load_optimizer(self.trainer, Path(self.optimizer_from))


def engine_family(trainer: Trainer) -> str:
    kinds = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed"}
    return kinds.get(trainer.accelerator.distributed_type, "DDP")


def check_optimizer_state(checkpoint: Path, family: str) -> None:
    """Raise if a checkpoint has no optimizer state that an engine can load.

    Raises:
        ValueError: with the reason and the way out.
    """
    if any((checkpoint / name).exists() for name in STATES[family]):
        return
    saved = [name for name, files in STATES.items() if any((checkpoint / file).exists() for file in files)]
    if saved:
        raise ValueError(
            f"optimizer_from={checkpoint} was saved by {saved[0]}, and {family} runs here. Their states have other "
            f"formats. Start with {saved[0]}, or begin with a fresh optimizer (optimizer_state: fresh)."
        )
    raise ValueError(
        f"optimizer_from={checkpoint} holds no optimizer state. Save checkpoints with it (save_strategy: steps, "
        "save_only_model: false), or begin with a fresh optimizer (optimizer_state: fresh)."
    )


def load_optimizer(trainer: Trainer, checkpoint: Path) -> None:
    """Load the moments of an optimizer; learning rates and all other settings stay those of this run.

    The schedule starts at its first step. DeepSpeed also loads the weights of the checkpoint, with which it keeps its
    fp32 copies; they are those that the run starts from.

    Raises:
        ValueError: if the engine of this run cannot load it, or it is of another number of DeepSpeed ranks.
    """
    family = engine_family(trainer)
    check_optimizer_state(checkpoint, family)
    optimizer: Any = trainer.optimizer
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    if family == "DeepSpeed":
        load_deepspeed(trainer, checkpoint)
    elif family == "FSDP":
        plugin = trainer.accelerator.state.fsdp_plugin
        load_fsdp_optimizer(plugin, trainer.accelerator, optimizer, trainer.model, str(checkpoint))
    else:
        state = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state)
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)


def load_deepspeed(trainer: Trainer, checkpoint: Path) -> None:
    """Load DeepSpeed's checkpoint without its schedule.

    Raises:
        ValueError: if another number of ranks saved it.
    """
    tag = (checkpoint / "latest").read_text().strip()
    saved = len(list((checkpoint / tag).glob("*zero_pp_rank_*_optim_states.pt")))
    if saved != trainer.args.world_size:
        raise ValueError(
            f"optimizer_from={checkpoint} was saved by {saved} DeepSpeed ranks, and {trainer.args.world_size} run "
            f"here: it holds the shards of {saved}. Start {saved} processes, or begin with a fresh optimizer "
            "(optimizer_state: fresh)."
        )
    engine: Any = trainer.model_wrapped
    folder, _ = engine.load_checkpoint(str(checkpoint), load_optimizer_states=True, load_lr_scheduler_states=False)
    if folder is None:
        raise ValueError(f"DeepSpeed loaded nothing from {checkpoint}, whose `latest` names {tag!r}.")
    engine.global_steps = engine.global_samples = engine.micro_steps = 0


class StopAtPerplexity(TrainerCallback):
    """Ends training, with a checkpoint, once an evaluation's perplexity is low enough.

    Args:
        limit (`float`): the highest perplexity that ends it.
        metric (`str`): the loss of the evaluation, such as `eval_at_512_loss`.
    """

    def __init__(self, limit: float, metric: str):
        self.limit = limit
        self.metric = metric

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, Any], **kwargs: Any) -> None:
        if self.metric not in metrics or any(REACHED in row for row in state.log_history):
            return
        perplexity = math.exp(min(metrics[self.metric], 700.0))
        if perplexity <= self.limit and state.global_step > 0:
            state.log_history.append({REACHED: perplexity, "limit": self.limit, "step": state.global_step})
            control.should_training_stop = control.should_save = True
