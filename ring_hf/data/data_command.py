"""`ring-hf data`: what a run's mixture yields, before training: lengths, tokens by source, padding, steps, balance."""

import argparse
import dataclasses
import difflib
import json
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..text import HelpFormatter, parse_size
from .conversation_keys import ConversationKeys, as_data_keys, is_conversation_run
from .run_options import DataArguments, explain_unknown, option, read_run, read_yaml

_EXAMPLES = """examples:
  the data of a run
    ring-hf data run.yaml
  the built-in text as bytes, 4 ranks for each sequence of 8,192 tokens, with a picture
    ring-hf data --tokenizer bytes --max_length 8192 --context_parallel_size 4 --picture data.png
  a mixture of 80 % long documents and 20 % short ones, cut to 1,024 tokens
    ring-hf data --tokenizer bytes --max_length 16384 \\
        --data '[{source: builtin, name: long, weight: 0.8, min_length: 4096},
                 {source: builtin, name: short, weight: 0.2, max_length: 1024}]'

The keys are those of a run (recipes/finetune.py --help, or recipes/sft.py --help where `packing` is true or false); on
the command line they replace those of the file. Keys of a file that do not concern its data are left alone.
"""
_SIMILAR = 0.8  # of a key to one of these: it is one of them, misspelt
_OTHERS = ("eval", "logging", "save")  # in the names of keys that resemble one of these, and are others


@dataclasses.dataclass
class RunArguments:
    """What the report needs of a run besides its data."""

    model: str | None = option(None, "Hub id or folder, whose tokenizer is taken.")
    model_revision: str = option("main", "Branch, tag or commit of a hub model.")
    tokenizer: str | None = option(None, "Hub id, folder, or `bytes` (one token per byte). Default: the model's.")
    context_parallel_size: int | None = option(None, "Ranks that share a sequence. Default: 1.")
    num_processes: int | None = option(None, "Processes of the run. Default: context_parallel_size.")
    per_device_train_batch_size: int = option(8, "Sequences of a replica in a micro-batch.")
    gradient_accumulation_steps: int = option(1, "Micro-batches in a step.")
    tokens_per_batch: int | str | None = option(
        None, "Instead of the last two: tokens of a step over all processes, as 4M, of full sequences."
    )
    max_steps: int = option(-1, "Steps of the run. Default: one pass over the mixture.")

    def sequences_per_step(self, max_length: int) -> int:
        """Return the sequences of all replicas and micro-batches.

        Raises:
            ValueError: if the processes do not form whole groups, or a step has no whole number of sequences.
        """
        size = self.context_parallel_size or 1
        processes = self.num_processes or size
        if processes % size:
            raise ValueError(
                f"context_parallel_size={size} does not divide num_processes={processes}. Give a multiple of {size}."
            )
        if self.tokens_per_batch is None:
            return self.per_device_train_batch_size * self.gradient_accumulation_steps * processes // size
        num_tokens = parse_size(str(self.tokens_per_batch))
        if num_tokens % max_length:
            raise ValueError(
                f"tokens_per_batch={self.tokens_per_batch} is no multiple of max_length={max_length}. Give one."
            )
        return num_tokens // max_length


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    command = commands.add_parser(
        "data",
        help="what a run's data yields before training: lengths, shares, padding, steps, balance over ranks",
        description="Reads, tokenises and plans the data of a run as training will (and caches it for training), and\n"
        "reports documents and tokens by source, lengths, what is cut or dropped, padding, targets, steps, and how\n"
        "evenly each layout distributes the work.",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("run", nargs="?", help="YAML file of a run")
    command.add_argument("--stage", help="of a file with `stages`: number from 1, or name")
    command.add_argument("--picture", type=Path, help="PNG file to draw")
    command.add_argument("--json", type=Path, help="also write the report to this file")
    command.add_argument(
        "--sample", type=int, help="read only so many documents of each source (with streaming: default 1000)"
    )
    titles = (("run", RunArguments), ("data", DataArguments), ("data in a run of recipes/sft.py", ConversationKeys))
    for title, cls in titles:
        group = command.add_argument_group(f"keys of the {title}")
        for field in dataclasses.fields(cls):
            text = field.metadata["help"].replace("%", "%%")
            group.add_argument(f"--{field.name}", metavar="VALUE", default=argparse.SUPPRESS, help=text)


def run(options: argparse.Namespace) -> int:
    """Print the report; draw the picture and write the JSON if asked.

    Raises:
        ValueError: if a key or value is not allowed, or the data cannot be used.
    """
    run_args, data_args, format_options = parse_options(options)
    if options.sample is not None and options.sample < 1:
        raise ValueError(f"--sample {options.sample} must be at least 1 document.")
    name = run_args.tokenizer or run_args.model
    if name is None:
        raise ValueError("the run names no model or tokenizer. Add --model or --tokenizer, or set one in the file.")

    sequences_per_step = run_args.sequences_per_step(data_args.max_length)
    from .byte_level import load_tokenizer
    from .data_report import make_report
    from .data_tables import format_report
    from .formats import with_options
    from .packing import check_packing
    from .sequences import load_sample, load_splits, mix_sources

    check_packing(data_args.packing, data_args.max_length)
    tokenizer = load_tokenizer(name, run_args.model_revision if name == run_args.model else "main")
    sample = options.sample or (1000 if data_args.streaming else None)
    sources = tuple(with_options(spec, format_options) for spec in data_args.mixture().sources)
    mixture = dataclasses.replace(data_args.mixture(), sources=sources)
    rows = load_splits(data_args)[0] if sample is None else load_sample(mixture.sources, sample)
    report = make_report(
        mix_sources(rows, mixture, tokenizer, data_args.max_length, data_args.num_proc),
        data_args,
        run_args.context_parallel_size or 1,
        sequences_per_step,
        run_args.max_steps if run_args.max_steps > 0 else None,
        is_sample=sample is not None,
    )
    print(format_report(report))
    if options.picture is not None:
        from .data_charts import draw_report

        draw_report(report, options.picture)
        print(f"\npicture: {options.picture}")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"command": options.argv, **dataclasses.asdict(report)}, indent=1) + "\n")
    return 0


def parse_options(options: argparse.Namespace) -> tuple[RunArguments, DataArguments, dict[str, Any]]:
    """Return the keys of the run's file, replaced by those of the command line, and options of the sources' formats.

    Raises:
        ValueError: if a value has the wrong type, or a key of the file is a misspelt one.
    """
    classes = (RunArguments, DataArguments, ConversationKeys)
    kinds = {name: kind for cls in classes for name, kind in typing.get_type_hints(cls).items()}
    values = select_stage(read_run(options.run), options.stage) if options.run is not None else {}
    if misspelt := [key for key in values if key not in kinds and _is_misspelt(str(key), kinds)]:
        raise ValueError(explain_unknown(options.run, misspelt, set(kinds)))
    values = {key: value for key, value in values.items() if key in kinds}
    for name, kind in kinds.items():
        if hasattr(options, name):
            value = getattr(options, name)
            values[name] = value if _allows(kind, str) else read_yaml(f"--{name}", value)
    if isinstance(values.get("max_length"), str):  # as in stages
        values["max_length"] = parse_size(values["max_length"])
    format_options: dict[str, Any] = {}
    if is_conversation_run(values):
        values, format_options = as_data_keys(values)
    for name, value in values.items():
        _check_type(name, value, kinds[name])
    run_args, data_args = (
        cls(**{field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values})
        for cls in (RunArguments, DataArguments)
    )
    return typing.cast("RunArguments", run_args), typing.cast("DataArguments", data_args), format_options


def select_stage(values: dict[str, Any], stage: str | None) -> dict[str, Any]:
    """Return the values of a run: those of one stage over those that all stages share, if the file has stages.

    Raises:
        ValueError: if a stage is missing, or none is asked of a file with stages.
    """
    stages = values.get("stages")
    if not isinstance(stages, list) or not all(isinstance(entry, dict) for entry in stages):
        if stages is not None or stage is not None:
            raise ValueError(f"--stage {stage}: the file has no list of stages. Leave it out, or name another file.")
        return values
    names = [str(entry.get("name", number)) for number, entry in enumerate(stages, 1)]
    numbers = [str(number) for number in range(1, len(stages) + 1)]
    choices = dict(zip(names, stages, strict=True)) | dict(zip(numbers, stages, strict=True))
    if stage not in choices:
        raise ValueError(
            f"--stage {stage}: the file has the stages {', '.join(names)}. Choose one, by number or name."
        )
    return {**{key: value for key, value in values.items() if key != "stages"}, **choices[stage]}


def _is_misspelt(key: str, keys: Iterable[str]) -> bool:
    if set(key.split("_")) & set(_OTHERS):
        return False
    return bool(difflib.get_close_matches(key, keys, n=1, cutoff=_SIMILAR))


def _allows(kind: Any, cls: type) -> bool:
    """Return whether the annotation `kind` is or contains `cls`."""
    return cls in (kind, *typing.get_args(kind))


def _check_type(name: str, value: Any, kind: Any) -> None:
    is_number = _allows(kind, float) and type(value) is int
    is_mapping = _allows(kind, list) and isinstance(value, dict)  # a single source
    if is_number or is_mapping or _allows(kind, type(value)):
        return
    names = [option.__name__ for option in typing.get_args(kind) or (kind,)]
    expected = " or ".join(names).replace("NoneType", "nothing")
    raise ValueError(f"{name}={value!r} is a {type(value).__name__}, but must be {expected}.")
