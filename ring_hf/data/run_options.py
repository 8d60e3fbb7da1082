"""The keys of a run that describe its data, for the recipes and for `ring-hf data`, and how a run's YAML is read."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .source_spec import MixtureSpec, SourceSpec, explain_keys, parse_sources


def option(default: Any, text: str) -> Any:
    """Return a field with a default and its line of --help; a list is copied for each instance."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass
class SourceArguments:
    """The documents, and the held-out part of them."""

    data: list | str | None = option(
        "builtin",
        "File, folder or glob of txt, json, jsonl (all three also compressed) or parquet; a dataset on the hub "
        "(`name` or `name:configuration`); or `builtin`. A mixture: a list of mappings of source, name, format, "
        "weight, min_length, max_length, overlong, length_weights, max_tokens, text_column, columns, options, split, "
        "encoding and errors.",
    )
    data_split: str = option("train", "Split of a dataset on the hub.")
    format: str = option(
        "text", "What a row of a source holds: text, tokens, messages, prompt_completion, document_qa or vision_codes."
    )
    text_column: str = option("text", "Column that holds the text.")
    encoding: str = option("utf-8", "Encoding of txt, json and jsonl files.")
    errors: str = option("raise", "At a row that cannot be used: raise, or skip it and count it by kind.")
    mixture_tokens: int | None = option(
        None, "Tokens of the mixture in total; sources that hold too few are repeated, each time in a new order."
    )
    mixture_stop: str = option(
        "first_exhausted",
        "Without mixture_tokens, a mixture with weights ends when the first source has been read once "
        "(first_exhausted: nothing is repeated), or the last one (all_exhausted: the others are repeated).",
    )
    mixture_seed: int = option(0, "Seed of the order and choice of documents in a mixture.")
    heldout_data: list | str | None = option(
        None, "Source of the held-out documents, or several. Default: a fraction of `data`."
    )
    heldout_fraction: float = option(
        0.1,
        "Fraction of the documents of `data` that is held out; where they are too few to hold out whole ones, the end "
        "of each. 0: none, and no evaluation.",
    )

    def __post_init__(self) -> None:
        self.data = parse_list("data", self.data)
        self.heldout_data = parse_list("heldout_data", self.heldout_data)

    @property
    def holds_nothing_out(self) -> bool:
        return self.heldout_data is None and self.heldout_fraction == 0

    @property
    def source_defaults(self) -> dict[str, Any]:
        """Fields of every source that does not set them."""
        return {
            "format": self.format,
            "text_column": self.text_column,
            "split": self.data_split,
            "encoding": self.encoding,
            "errors": self.errors,
        }

    def mixture(self) -> MixtureSpec:
        """Return the sources to train on.

        Raises:
            ValueError: if a value is not allowed.
        """
        sources = parse_sources(self.data, **self.source_defaults)
        return MixtureSpec(sources, self.mixture_tokens, self.mixture_stop, self.mixture_seed)

    def heldout_sources(self) -> tuple[SourceSpec, ...]:
        """Return the sources of held-out documents of their own; their weights and lengths do not matter."""
        if self.heldout_data is None:
            return ()
        return MixtureSpec(parse_sources(self.heldout_data, **self.source_defaults)).sources


@dataclass
class DataArguments(SourceArguments):
    """How documents become sequences."""

    max_length: int = option(2048, "Tokens in a sequence: the context length to train at.")
    packing: str = option(
        "best_fit", "best_fit (documents stay whole), stream (all sequences full) or separate (one document each)."
    )
    overlong: str = option(
        "cut",
        "Documents longer than a sequence: cut into spans, drop (so that none loses its end: agent trajectories), or "
        "truncate.",
    )
    min_length: int = option(1, "Leave out documents with fewer tokens.")
    mask_boundaries: bool = option(True, "Take no loss of the first token of a document.")
    attend_across_documents: bool = option(
        False,
        "Let tokens attend to earlier documents of their sequence, with positions that run through it. false: each "
        "document is masked, as Llama 3, ProLong and OLMo 3 train. true: no mask, a separator token between documents "
        "(here the end-of-text token), as UltraLong trains.",
    )
    streaming: bool = option(
        False,
        "Read, tokenise and pack while training, for data that is too large to tokenise first. Needs max_steps, and "
        "heldout_data or heldout_fraction 0.",
    )
    stream_buffer: int = option(
        64, "With streaming: sequences' worth of documents that are packed together and shuffled."
    )
    loss_weighting: str = option(
        "tokens",
        "tokens: the loss is the mean over all targets of a step. examples: the mean over documents of their mean "
        "losses; it needs whole ones (overlong: drop).",
    )
    max_heldout_sequences: int | None = option(None, "Most held-out sequences in the Trainer's own evaluation.")
    num_proc: int | None = option(None, "Worker processes of tokenisation.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stream_buffer < 1:
            raise ValueError(f"stream_buffer={self.stream_buffer} must be at least 1 sequence.")
        if self.streaming and self.heldout_data is None and self.heldout_fraction:
            raise ValueError(
                f"streaming=True with heldout_fraction={self.heldout_fraction}: to hold documents out of a stream, "
                "all of it would be read first. Name a source of its own as heldout_data, or set heldout_fraction=0 "
                "to train without evaluation."
            )

    @property
    def source_defaults(self) -> dict[str, Any]:
        """Fields of every source that does not set them."""
        return {**super().source_defaults, "overlong": self.overlong, "min_length": self.min_length}


def load_yaml(path: str, keys: set[str]) -> dict[str, Any]:
    """Return the values of a run.

    Raises:
        ValueError: if the file does not exist, is not a mapping, or has a key that does not exist.
    """
    values = read_run(path)
    if unknown := sorted(set(values) - keys):
        raise ValueError(explain_unknown(path, unknown, keys))
    return values


def read_run(path: str) -> dict[str, Any]:
    """Return the content of a run's YAML file, whatever its keys.

    Raises:
        ValueError: if the file does not exist or is not a mapping.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"the first argument {path!r} is not a file. Give a run's YAML file, or only --key value pairs."
        )
    values = read_yaml(path, Path(path).read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}. A run is a YAML mapping of keys to values.")
    return values


def parse_mapping(name: str, value: dict | str | None) -> dict | None:
    """Return a mapping; a string from the command line is read as YAML, which includes JSON.

    Raises:
        ValueError: if the string is not a mapping.
    """
    parsed = read_yaml(name, value) if isinstance(value, str) else value
    if parsed is not None and not isinstance(parsed, dict):
        raise ValueError(f"{name}={value!r} is not a mapping. Write it as '{{key: value}}'.")
    return parsed


def parse_list(name: str, value: Any) -> Any:
    """Return a list or mapping that a string from the command line holds as YAML; other values as they are.

    A string is YAML if it begins like a list of mappings or a mapping: `[{` or `{`. (A glob may begin with `[`.)
    """
    is_yaml = isinstance(value, str) and value.replace(" ", "").startswith(("[{", "{"))
    return read_yaml(name, value) if is_yaml else value


def read_yaml(name: str, text: str) -> Any:
    """Return the content of a YAML text.

    Raises:
        ValueError: if it is not YAML, with the line of the mistake.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} cannot be read as YAML: {error}") from None


def explain_unknown(where: str, unknown: list[str], keys: set[str]) -> str:
    """Return a message that names each unknown key with the nearest existing ones."""
    return f"unknown in {where}: {explain_keys(unknown, sorted(keys))}. --help lists every key."
