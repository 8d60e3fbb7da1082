"""What is refused of a Trainer and of the wrappers around its model, when the Trainer is made.

Each rule is a function of the Trainer that returns a message or None. What they name would fail later, or only on some
ranks, or with a message about something else; what nobody has named is caught by the trial step (`trial.py`).
"""

from collections.abc import Callable, Iterator
from typing import Any

from transformers import Trainer


def _trl_trainer(trainer: Trainer) -> str | None:
    theirs = [kind.__name__ for kind in type(trainer).__mro__ if kind.__module__.split(".")[0] == "trl"]
    if not theirs or "SFTTrainer" in theirs:
        return None
    return (
        f"{theirs[0]} compares completions that it lays out by itself, and needs whole sequences for that. Of TRL's "
        "trainers only SFTTrainer works with context parallelism."
    )


def _predict_with_generate(trainer: Trainer) -> str | None:
    if not getattr(trainer.args, "predict_with_generate", False) or trainer.compute_metrics is None:
        return None  # without metrics the Trainer asks for losses only
    return (
        "predict_with_generate=True with compute_metrics generates from evaluation batches, of which every rank has "
        "its shard only. Set it to False, and generate from whole prompts after training (model.generate)."
    )


def _compiled(trainer: Trainer) -> str | None:
    compiled = [
        name or type(part).__name__
        for name, part in trainer.model.named_modules()
        if getattr(part, "_compiled_call_impl", None) is not None or hasattr(part, "_orig_mod")
    ]
    if not compiled:
        return None
    return (
        f"The model is compiled (model.compile() or torch.compile, for {compiled[0]}), which is not proven yet with "
        "context parallelism. Leave it out."
    )


def _prompt_learning(trainer: Trainer) -> str | None:
    for name, config in _peft_configs(trainer.model):
        if getattr(config, "is_prompt_learning", False):
            return (
                f"The PEFT adapter {name!r} ({type(config).__name__}) puts virtual tokens in front of the sequence, "
                "which would come before every shard. Use an adapter of the weights, such as LoRA."
            )
    return None


def _activated_lora(trainer: Trainer) -> str | None:
    for name, config in _peft_configs(trainer.model):
        if getattr(config, "alora_invocation_tokens", None):
            return (
                f"The PEFT adapter {name!r} is an activated LoRA: it looks for its alora_invocation_tokens in the "
                "tokens of a shard, where they may be cut or missing. Use LoRA without them."
            )
    return None


TRAINER_RULES: tuple[Callable[[Trainer], str | None], ...] = (
    _trl_trainer,
    _predict_with_generate,
    _compiled,
    _prompt_learning,
    _activated_lora,
)


def _peft_configs(model: Any) -> Iterator[tuple[str, Any]]:
    configs = getattr(model, "peft_config", None)
    yield from configs.items() if isinstance(configs, dict) else ()
