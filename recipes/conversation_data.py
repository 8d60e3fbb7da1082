"""The datasets of `recipes/sft.py`: conversations as tokens and labels, none longer than a sequence."""

import dataclasses
from typing import Any

from datasets import Dataset
from sft_arguments import ConversationArguments
from trl import SFTConfig
from trl.chat_template_utils import get_training_chat_template

from ring_hf.data.conversations import check_generation_marks, find_template, has_generation_marks
from ring_hf.data.example_weights import weigh_examples
from ring_hf.data.formats import with_options
from ring_hf.data.mixture import overlong_outcomes
from ring_hf.data.packing import IGNORED, pack_documents
from ring_hf.data.sequences import load_splits, mix_sources
from ring_hf.data.source_spec import MixtureSpec


def training_template(tokenizer: Any, args: SFTConfig) -> str | None:
    """Return the chat template to train with, or None if that is the tokenizer's own.

    `chat_template_path` comes first, and is saved with the tokenizer; then TRL's training version of the tokenizer's
    template, if TRL has one.

    Raises:
        ValueError: if `assistant_only_loss` is set and nothing marks the assistant's tokens.
    """
    if args.chat_template_path is not None:
        if not args.chat_template_path.endswith((".jinja", ".j2")):
            raise ValueError(
                f"chat_template_path={args.chat_template_path!r} must be a .jinja or .j2 file here. To take the "
                "template of another model, save the chat_template of its tokenizer as a file."
            )
        template = find_template(tokenizer, args.chat_template_path)
        if args.assistant_only_loss:
            check_generation_marks(template)
        tokenizer.chat_template = template
        return None
    if not args.assistant_only_loss or has_generation_marks(find_template(tokenizer)):
        return None
    try:
        return get_training_chat_template(tokenizer)
    except ValueError:  # TRL knows templates by their text
        check_generation_marks(find_template(tokenizer))
        raise


def load_examples(data_args: ConversationArguments, args: SFTConfig, tokenizer: Any) -> tuple[Dataset, Dataset | None]:
    """Return the examples to train on and the held-out ones: `input_ids`, `labels`, perhaps `loss_weights`.

    What is dropped or truncated because it is too long is counted and printed.

    Raises:
        ValueError: if a row cannot be used, or nothing is left.
    """
    template = training_template(tokenizer, args) if _has_messages(data_args) else None
    options = {
        "assistant_only_loss": args.assistant_only_loss,
        "completion_only_loss": args.completion_only_loss,
        "chat_template": template,
        "max_length": args.max_length,
    }
    mixture = data_args.mixture_with(options)
    train_rows, heldout_rows = load_splits(data_args)
    train = _fit(train_rows, mixture, tokenizer, data_args, args)
    if not heldout_rows:
        return train, None
    sources = tuple(
        dataclasses.replace(with_options(spec, options), weight=None, length_weights={}, max_tokens=None)
        for spec, _ in heldout_rows
    )
    heldout = _fit([rows for _, rows in heldout_rows], MixtureSpec(sources), tokenizer, data_args, args, "held-out ")
    if data_args.max_heldout_examples is not None:
        heldout = heldout.select(range(min(data_args.max_heldout_examples, len(heldout))))
    return train, heldout


def _has_messages(data_args: ConversationArguments) -> bool:
    formats = {spec.format for spec in (*data_args.mixture().sources, *data_args.heldout_sources())}
    return bool(formats & {"messages", "document_qa"})


def _fit(
    rows: list[Dataset],
    mixture: MixtureSpec,
    tokenizer: Any,
    data_args: ConversationArguments,
    args: SFTConfig,
    prefix: str = "",
) -> Dataset:
    """Tokenise rows and return the examples of the mixture, none longer than a sequence."""
    if args.max_length is None:
        raise ValueError("max_length is missing. Set it to the tokens of a sequence.")
    mixed = mix_sources(rows, mixture, tokenizer, args.max_length, args.dataset_num_proc)
    for plan in mixed.plan.sources:
        outcome = overlong_outcomes(plan.lengths, plan.span_length, plan.spec.min_length)[plan.spec.overlong]
        if outcome.dropped or outcome.shortened:
            count, verb = (outcome.dropped, "dropped") if outcome.dropped else (outcome.shortened, "truncated")
            print_once(
                f"{plan.spec.name}: {count} of {len(plan.lengths)} {prefix}examples "
                f"({100 * count / len(plan.lengths):.1f} %) have more than {plan.span_length:,} tokens and are {verb} "
                f"(overlong); {100 * outcome.kept_tokens / outcome.tokens:.1f} % of the tokens are left.",
                args,
            )
    examples = pack_documents(mixed.tokens, args.max_length, "separate", False, False, mixed.plan.spans)
    examples = examples.remove_columns("position_ids")
    trained = examples.filter(_has_target, num_proc=args.dataset_num_proc, desc="Examples with a loss")
    if len(trained) < len(examples):
        print_once(
            f"{len(examples) - len(trained)} of {len(examples)} {prefix}examples have no token with a loss (left) and "
            "are left out.",
            args,
        )
    if not len(trained):
        raise ValueError(f"no {prefix}example has a token with a loss. Raise max_length, or look at the labels.")
    return weigh_examples(trained, args.dataset_num_proc) if data_args.loss_weighting == "examples" else trained


def _has_target(row: dict[str, Any]) -> bool:
    return any(label != IGNORED for label in row["labels"][1:])


def print_once(text: str, args: SFTConfig) -> None:
    if args.process_index == 0:
        print(text)
