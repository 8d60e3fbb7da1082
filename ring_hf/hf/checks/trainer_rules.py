"""Trainers, and wrappers around their models, that are refused when the Trainer is made.

Each rule is named after the feature it checks and returns an error message for a Trainer, or None. These features
would fail later, or on some ranks only, or with an unrelated message. The trial step (`trial_step.py`) catches what is
not listed here.
"""

from collections.abc import Callable, Iterator
from typing import Any

from transformers import Trainer


def _trl_trainer(trainer: Trainer) -> str | None:
    trl_classes = [cls.__name__ for cls in type(trainer).__mro__ if cls.__module__.split(".")[0] == "trl"]
    if not trl_classes or "SFTTrainer" in trl_classes:
        return None
    return (
        f"{trl_classes[0]} builds and compares completions itself, which needs whole sequences. Of TRL's trainers, "
        "only SFTTrainer works with context parallelism."
    )


def _images(trainer: Trainer) -> str | None:
    if not getattr(trainer, "_is_vision_dataset", False):
        return None
    return (
        f"The dataset of {type(trainer).__name__} has images, and only token ids can be sharded. Train on text, or on "
        "images that are token ids already."
    )


def _predict_with_generate(trainer: Trainer) -> str | None:
    if not getattr(trainer.args, "predict_with_generate", False) or trainer.compute_metrics is None:
        return None  # without metrics the Trainer computes losses only
    return (
        "predict_with_generate=True with compute_metrics generates from evaluation batches, of which every rank has "
        "only its shard. Set it to False, and generate from whole prompts after training (model.generate)."
    )


def _compiled(trainer: Trainer) -> str | None:
    compiled = [
        name or type(module).__name__
        for name, module in trainer.model.named_modules()
        if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
    ]
    if not compiled:
        return None
    return (
        f"The model is compiled (model.compile() or torch.compile, for {compiled[0]}), which is not supported with "
        "context parallelism yet. Do not compile it."
    )


def _prompt_learning(trainer: Trainer) -> str | None:
    for name, config in _peft_configs(trainer.model):
        if getattr(config, "is_prompt_learning", False):
            return (
                f"The PEFT adapter {name!r} ({type(config).__name__}) puts virtual tokens in front of the sequence; "
                "here they would come before every shard. Use an adapter of the weights, for example LoRA."
            )
    return None


def _activated_lora(trainer: Trainer) -> str | None:
    for name, config in _peft_configs(trainer.model):
        if getattr(config, "alora_invocation_tokens", None):
            return (
                f"The PEFT adapter {name!r} is an activated LoRA: it searches the tokens of a shard for its "
                "alora_invocation_tokens, where they may be cut or missing. Use LoRA without them."
            )
    return None


TRAINER_RULES: tuple[Callable[[Trainer], str | None], ...] = (
    _trl_trainer,
    _images,
    _predict_with_generate,
    _compiled,
    _prompt_learning,
    _activated_lora,
)


def _peft_configs(model: Any) -> Iterator[tuple[str, Any]]:
    configs = getattr(model, "peft_config", None)
    yield from configs.items() if isinstance(configs, dict) else ()
