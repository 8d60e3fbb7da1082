"""What a run reads: one `SourceSpec` for each source of a mixture, and all rules that a value must keep.

In a run's YAML, `data` is the name of one source, or a list of mappings with the fields of `SourceSpec`:

    data:
      - {source: "books/*.txt", weight: 0.6, overlong: cut, length_weights: {16384: 3}}
      - {source: "short.jsonl", weight: 0.4, max_length: 4096, overlong: drop}
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

ERRORS = ("raise", "skip")  # of a row that cannot be used
OVERLONG = ("cut", "drop", "truncate")
STOPS = ("first_exhausted", "all_exhausted")


@dataclass(frozen=True)
class SourceSpec:
    """One source of documents and its part in the mixture.

    Args:
        source: file, folder or glob; `name` or `name:configuration` of a dataset on the hub; or `builtin`.
        name: in reports. Default: from the source.
        format: what a row holds: a key of `ring_hf.data.FORMATS`.
        weight: share of the training tokens, relative to the other sources. Either all sources have a weight or none;
            without weights every source is read once.
        text_column: name of the column that holds the text.
        columns: names of other columns of the format in this source, as {messages: conversations}.
        options: of the format.
        split: of a dataset on the hub.
        encoding: of txt, json and jsonl files.
        min_length: documents with fewer tokens are left out.
        max_length: the longest span of this source in tokens; the default is the sequence. Short-context replay is a
            source with a short one.
        overlong: what becomes of documents with more than `max_length` tokens: `cut` into spans, `drop`, or
            `truncate`, which keeps the first span.
        length_weights: how often documents are read in an epoch, by least length in tokens, as {4096: 2, 16384: 5}:
            per-source length upsampling (Fu et al. 2024, "Data Engineering for Scaling Language Models to 128K
            Context"). Below the smallest length it is 1. A fraction reads that share of the documents.
        max_tokens: most tokens of an epoch of this source.
        errors: `raise` at a row that cannot be used, or `skip` it and count it.

    Raises:
        ValueError: if a value is not allowed.
    """

    source: str
    name: str = ""
    format: str = "text"
    weight: float | None = None
    text_column: str = "text"
    columns: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    split: str = "train"
    encoding: str = "utf-8"
    min_length: int = 1
    max_length: int | None = None
    overlong: str = "cut"
    length_weights: Mapping[int, float] = field(default_factory=dict)
    max_tokens: int | None = None
    errors: str = "raise"

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not self.source:
            raise ValueError(f"source={self.source!r} is no name. Name a file, folder, glob or hub dataset.")
        if not self.name:
            object.__setattr__(self, "name", default_name(self.source))
        for key in ("name", "format", "text_column", "split", "encoding"):
            if not isinstance(getattr(self, key), str):
                raise self._error(f"{key}={getattr(self, key)!r} is not text.")
        for key in ("columns", "options", "length_weights"):
            if not isinstance(getattr(self, key), Mapping):
                raise self._error(f"{key}={getattr(self, key)!r} is not a mapping. Write it as {{key: value}}.")
        if self.weight is not None and not (_is_number(self.weight) and self.weight > 0):
            raise self._error(f"weight={self.weight!r} must be above 0. Remove the source to leave it out.")
        for key, least in (("min_length", 1), ("max_length", 2), ("max_tokens", 1)):
            value = getattr(self, key)
            if not (value is None and key != "min_length") and not (_is_integer(value) and value >= least):
                raise self._error(f"{key}={value!r} must be a number of tokens of at least {least}.")
        for key, choices in (("overlong", OVERLONG), ("errors", ERRORS)):
            if getattr(self, key) not in choices:
                raise self._error(f"{key}={getattr(self, key)!r} is unknown. Choose one of {', '.join(choices)}.")
        if self.max_length is not None and self.min_length > self.max_length and self.overlong == "drop":
            raise self._error(
                f"min_length={self.min_length} is above max_length={self.max_length}, and overlong=drop leaves "
                "nothing. Lower min_length, raise max_length, or set overlong: cut."
            )
        for length, weight in self.length_weights.items():
            if not (_is_integer(length) and length >= 1 and _is_number(weight) and weight >= 0):
                raise self._error(
                    f"length_weights has {length!r}: {weight!r}. Write a least length in tokens and how often such "
                    "documents are read, as {4096: 2}."
                )
        if "text" in self.columns and self.text_column != "text":
            raise self._error(f"text_column={self.text_column!r} and columns name the text twice. Leave one out.")

    def _error(self, message: str) -> ValueError:
        return ValueError(f"data source {self.name!r}: {message}")

    @property
    def renamed(self) -> dict[str, str]:
        """Columns that have other names in this source than in the format."""
        text = {"text": self.text_column} if self.text_column != "text" else {}
        return text | dict(self.columns)

    def span_length(self, length: int) -> int:
        """Return the longest span in sequences of `length` tokens.

        Raises:
            ValueError: if `max_length` is above that.
        """
        if self.max_length is not None and self.max_length > length:
            raise self._error(
                f"max_length={self.max_length} is above the {length} tokens of a sequence. Leave it out, or raise the "
                "run's max_length."
            )
        return self.max_length or length


@dataclass(frozen=True)
class MixtureSpec:
    """How much is read of each source.

    Args:
        sources: with names of their own, all with a weight or none.
        tokens: in total, with repetitions where a source holds too few.
        stop: without `tokens` and with weights, as in `datasets.interleave_datasets`: `first_exhausted` ends the
            mixture when the first source has been read once, so that nothing is repeated; `all_exhausted` when the
            last one has, and repeats the others.
        seed: of the order of documents, which is new in each epoch.

    Raises:
        ValueError: if the sources do not fit together, or a value is not allowed.
    """

    sources: tuple[SourceSpec, ...]
    tokens: int | None = None
    stop: str = "first_exhausted"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("data is empty: nothing to read. Name at least one source.")
        names = [spec.name for spec in self.sources]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"several data sources have the name {twice[0]!r}. Set `name` of each.")
        without = [spec.name for spec in self.sources if spec.weight is None]
        if 0 < len(without) < len(names):
            raise ValueError(
                f"data sources without a weight: {', '.join(without)}. Give every source a weight, or none of them to "
                "read each once."
            )
        if self.tokens is not None and not (_is_integer(self.tokens) and self.tokens > 0):
            raise ValueError(f"mixture_tokens={self.tokens!r} must be a number of tokens above 0.")
        if self.stop not in STOPS:
            raise ValueError(f"mixture_stop={self.stop!r} is unknown. Choose one of {', '.join(STOPS)}.")

    @property
    def has_weights(self) -> bool:
        return self.sources[0].weight is not None

    @property
    def shares(self) -> list[float]:
        """The share of each source, if they have weights."""
        weights = [float(spec.weight or 0) for spec in self.sources]
        return [weight / sum(weights) for weight in weights]


def parse_sources(data: Any, **defaults: Any) -> tuple[SourceSpec, ...]:
    """Return the sources that `data` of a run describes.

    Args:
        data: the name of a source, a mapping with the fields of `SourceSpec`, or a list of these.
        defaults: fields of all sources that do not set them.

    Raises:
        ValueError: if a key does not exist or a value is not allowed.
    """
    entries = data if isinstance(data, list) else [data]
    return tuple(_parse_source(number, entry, defaults) for number, entry in enumerate(entries, 1))


def _parse_source(number: int, entry: Any, defaults: Mapping[str, Any]) -> SourceSpec:
    if isinstance(entry, str):
        entry = {"source": entry}
    if not isinstance(entry, Mapping):
        raise ValueError(f"data, entry {number}: {entry!r} is no mapping. Write it as {{source: ..., weight: ...}}.")
    keys = [spec_field.name for spec_field in dataclasses.fields(SourceSpec)]
    if unknown := [str(key) for key in entry if key not in keys]:
        raise ValueError(
            f"unknown in data, entry {number}: {explain_keys(unknown, keys)}. Its keys are {', '.join(keys)}."
        )
    if "source" not in entry:
        raise ValueError(f"data, entry {number} has no source. Name a file, folder, glob or hub dataset.")
    return SourceSpec(**{**defaults, **entry})


def explain_keys(unknown: Iterable[str], keys: Iterable[str]) -> str:
    """Return each unknown key with the nearest existing ones."""
    hints, keys = [], list(keys)
    for key in unknown:
        nearest = difflib.get_close_matches(key, keys, n=3, cutoff=0.5)
        hints.append(f"{key!r} (did you mean {', '.join(nearest)}?)" if nearest else repr(key))
    return "; ".join(hints)


def default_name(source: str) -> str:
    """Return a short name of a source: the file or folder, without ending and wildcards."""
    parts = [part for part in re.split(r"[/\\]", source) if part and not re.search(r"[*?\[]", part)]
    return re.sub(r"(?<=.)\..*", "", parts[-1]) if parts else source


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
