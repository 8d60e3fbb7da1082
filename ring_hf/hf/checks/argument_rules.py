"""What is refused of a Trainer before the first step: settings whose numbers would silently be wrong.

Each rule is a function that returns a message or None. The table looks at the Trainer's arguments, `check_loader` at
its training data loader, `check_memory` at the arguments and the model; the other rules about models are in `models`.
`tests/hf/test_refusals.py` and `tests/memory/test_refusals.py` hold a case for each.
"""

from collections.abc import Callable, Sequence
from typing import Any

from accelerate.data_loader import DataLoaderDispatcher

from ring_hf.memory import applied_to


def _label_smoothing(args: Any) -> str | None:
    if not args.label_smoothing_factor:
        return None
    return (
        f"label_smoothing_factor={args.label_smoothing_factor}: the Trainer's label smoother shifts labels inside "
        "each shard, so every shard loses a target. Set it to 0."
    )


def _average_tokens(args: Any) -> str | None:
    if args.average_tokens_across_devices:
        return None
    return (
        "average_tokens_across_devices=False weighs every shard alike although shards hold different numbers of "
        "targets. Set it to True."
    )


def _sampling(args: Any) -> str | None:
    if args.train_sampling_strategy != "batch_rebalance":
        return None
    return (
        'train_sampling_strategy="batch_rebalance" deals other examples to every process, also to those that share a '
        'sequence. Use "random", "sequential" or "group_by_length".'
    )


def _neftune(args: Any) -> str | None:
    if not args.neftune_noise_alpha:
        return None
    return f"neftune_noise_alpha={args.neftune_noise_alpha} adds noise that depends on the shard. Leave it unset."


def _dispatch(args: Any) -> str | None:
    return DISPATCHED if args.accelerator_config.dispatch_batches else None


def _even_batches(args: Any) -> str | None:
    if args.accelerator_config.even_batches:
        return None
    return (
        "accelerator_config even_batches=False gives replicas different numbers of batches, so some would wait for "
        "ever. Set it to True."
    )


def _gather_objects(args: Any) -> str | None:
    if not args.eval_use_gather_object:
        return None
    return "eval_use_gather_object=True cannot restore whole sequences from shards. Set it to False."


def _batch_metrics_inputs(args: Any) -> str | None:
    if not (args.batch_eval_metrics and "inputs" in args.include_for_metrics):
        return None
    return (
        'include_for_metrics=["inputs"] with batch_eval_metrics=True would hand shards to compute_metrics. Drop one '
        "of them."
    )


def _compile(args: Any) -> str | None:
    if not args.torch_compile:
        return None
    return "torch_compile=True is not proven yet with context parallelism. Set it to False."


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

DISPATCHED = (
    "Batches are dispatched from rank 0, so ranks that share a sequence get different rows. "
    'Set accelerator_config={"dispatch_batches": False} in TrainingArguments (Accelerate dispatches iterable datasets '
    "by default)."
)


def check_loader(loader: Any) -> str | None:
    """A loader that would give ranks of one group different rows."""
    return DISPATCHED if isinstance(loader, DataLoaderDispatcher) else None


def check_memory(args: Any, model: Any, engine_checkpoints: bool = False) -> str | None:
    """Checkpointing by the Trainer or the engine would take the place of what `ring_hf.memory` switched on."""
    applied = applied_to(model)
    switched = getattr(args, "activation_checkpointing", False) or args.gradient_checkpointing
    if applied is None or applied.config.attention == "none" or not (switched or engine_checkpoints):
        return None
    if engine_checkpoints:
        return (
            f"activation_checkpointing in fsdp_config together with memory.apply(attention="
            f"{applied.config.attention!r}), which checkpoints the layers by itself. Set activation_checkpointing: "
            "false there."
        )
    return (
        f"activation_checkpointing=True (gradient_checkpointing) together with memory.apply(attention="
        f"{applied.config.attention!r}), which checkpoints the layers by itself. Set activation_checkpointing=False."
    )


def check_weights(model: Any) -> str | None:
    """A model whose loss would overlook the weights of a batch."""
    levers = applied_to(model)
    if levers is not None and levers.config.loss_block is not None:
        return None
    return (
        "The batch has loss_weights, which Transformers' loss does not know. Have it taken in blocks, with "
        'ring_hf.memory.apply(model, loss_block="auto"), or remove the column.'
    )


def first_error(rules: Sequence[Callable[[Any], str | None]], subject: Any) -> str | None:
    """The message of the first rule that `subject` breaks."""
    for rule in rules:
        message = rule(subject)
        if message is not None:
            return message
    return None
