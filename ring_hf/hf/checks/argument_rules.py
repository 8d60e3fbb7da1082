"""Settings of a Trainer that are refused before the first step because the results would silently be wrong.

Each rule is named after the setting it checks and returns an error message, or None. `ARGUMENT_RULES` looks at the
Trainer's arguments, `check_loader` at the data loader, `check_memory` at the arguments and the
model. All other rules about models are in `model_rules.py`. `tests/hf/test_refusals.py` and
`tests/memory/test_refusals.py` hold a case for each.
"""

from collections.abc import Callable, Sequence
from typing import Any

from accelerate.data_loader import DataLoaderDispatcher

from ring_hf.memory import applied_to

DISPATCH_ERROR = (
    "Batches are dispatched from rank 0, so ranks that share a sequence receive different rows. "
    'Set accelerator_config={"dispatch_batches": False} in TrainingArguments (Accelerate dispatches iterable datasets '
    "by default)."
)


def _label_smoothing(args: Any) -> str | None:
    if not args.label_smoothing_factor:
        return None
    return (
        f"label_smoothing_factor={args.label_smoothing_factor}: the Trainer's label smoother shifts the labels within "
        "each shard, so every shard loses one target. Set it to 0."
    )


def _average_tokens(args: Any) -> str | None:
    if args.average_tokens_across_devices:
        return None
    return (
        "average_tokens_across_devices=False gives every shard the same weight, although shards have different "
        "numbers of targets. Set it to True."
    )


def _sampling(args: Any) -> str | None:
    if args.train_sampling_strategy != "batch_rebalance":
        return None
    return (
        'train_sampling_strategy="batch_rebalance" gives every process different examples, including processes that '
        'share a sequence. Use "random", "sequential" or "group_by_length".'
    )


def _neftune(args: Any) -> str | None:
    if not args.neftune_noise_alpha:
        return None
    return f"neftune_noise_alpha={args.neftune_noise_alpha} adds noise that depends on the shard. Leave it unset."


def _dispatch(args: Any) -> str | None:
    return DISPATCH_ERROR if args.accelerator_config.dispatch_batches else None


def _even_batches(args: Any) -> str | None:
    if args.accelerator_config.even_batches:
        return None
    return (
        "even_batches=False in accelerator_config gives replicas different numbers of batches, so some of them would "
        "wait forever. Set it to True."
    )


def _gather_objects(args: Any) -> str | None:
    if not args.eval_use_gather_object:
        return None
    return "eval_use_gather_object=True cannot reassemble whole sequences from shards. Set it to False."


def _batch_metrics_inputs(args: Any) -> str | None:
    if not (args.batch_eval_metrics and "inputs" in args.include_for_metrics):
        return None
    return (
        'include_for_metrics=["inputs"] with batch_eval_metrics=True would pass shards to compute_metrics. Drop one '
        "of the two."
    )


def _compile(args: Any) -> str | None:
    if not args.torch_compile:
        return None
    return "torch_compile=True is not supported with context parallelism yet. Set it to False."


ARGUMENT_RULES: tuple[Callable[[Any], str | None], ...] = (
    _label_smoothing,
    _average_tokens,
    _sampling,
    _neftune,
    _dispatch,
    _even_batches,
    _gather_objects,
    _batch_metrics_inputs,
    _compile,
)


def check_loader(loader: Any) -> str | None:
    """Return an error message for a data loader that gives the ranks of one group different rows, or None."""
    return DISPATCH_ERROR if isinstance(loader, DataLoaderDispatcher) else None


def check_memory(args: Any, model: Any, engine_checkpoints: bool = False) -> str | None:
    """Return an error message if layers would be checkpointed twice, or None.

    Args:
        args: the Trainer's arguments.
        model: the model; `ring_hf.memory.apply` may checkpoint its layers.
        engine_checkpoints: whether the engine (FSDP) checkpoints layers.
    """
    applied = applied_to(model)
    trainer_checkpoints = getattr(args, "activation_checkpointing", False) or args.gradient_checkpointing
    if applied is None or applied.config.attention == "none" or not (trainer_checkpoints or engine_checkpoints):
        return None
    conflict = f"conflicts with memory.apply(attention={applied.config.attention!r}), which checkpoints layers itself"
    if engine_checkpoints:
        return f"activation_checkpointing in fsdp_config {conflict}. Set activation_checkpointing: false there."
    return f"activation_checkpointing=True (gradient_checkpointing) {conflict}. Set activation_checkpointing=False."


def check_loss_weights(model: Any) -> str | None:
    """Return an error message if the loss of the model would ignore the `loss_weights` of a batch, or None."""
    applied = applied_to(model)
    if applied is not None and applied.config.loss_block is not None:
        return None
    return (
        "The batch has loss_weights, which Transformers' loss ignores. Compute the loss in blocks, with "
        'ring_hf.memory.apply(model, loss_block="auto"), or remove the column.'
    )


def first_error(rules: Sequence[Callable[[Any], str | None]], subject: Any) -> str | None:
    """Return the error message of the first rule that `subject` breaks, or None."""
    for rule in rules:
        message = rule(subject)
        if message is not None:
            return message
    return None
