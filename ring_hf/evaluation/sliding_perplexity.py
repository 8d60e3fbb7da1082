"""Perplexity of the same text at several context lengths, by a window that slides over it.

The text is a number of excerpts, each of one document and as long as the longest length. For a length L, a window of L
tokens moves over an excerpt by a stride (Press et al. 2021, arXiv 2012.15840), and the tokens that are new in it are
predicted: all lengths predict the same tokens, all but the first of each excerpt, with at least L - stride tokens
before them where there are as many. The window of the longest length does not move.

Every length and excerpt is one record of a file: losses summed by the number of preceding tokens, in fp64, and their
counts. An interrupted run continues; means are over tokens, not over windows.

N excerpts, S their tokens, B windows of a batch, L tokens of a window.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .perplexity import LengthResult, position_buckets
from .record_file import append_record, begin_file, read_records

Losses = Callable[[Tensor], Tensor]  # token ids [B, L] -> losses [B, L - 1] in nats


@dataclass(frozen=True)
class PerplexitySpec:
    """The text to measure and the lengths.

    Attributes:
        lengths: tokens of context, ascending; excerpts have the last one.
        stride: tokens by which a window moves; None: half of its length.
        max_tokens: of all excerpts; there is at least one.

    Raises:
        ValueError: if a number is too small, or lengths are not ascending.
    """

    lengths: tuple[int, ...]
    stride: int | None = None
    max_tokens: int = 65536

    def __post_init__(self) -> None:
        if not self.lengths or self.lengths[0] < 2 or list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(f"lengths={list(self.lengths)}: context lengths are ascending, and at least 2 tokens.")
        if self.stride is not None and not 1 <= self.stride < self.lengths[0]:
            raise ValueError(
                f"stride={self.stride} must be at least 1 and below the shortest length, {self.lengths[0]}: a token "
                "without context is not predicted."
            )

    @property
    def num_excerpts(self) -> int:
        return max(1, self.max_tokens // self.lengths[-1])


@dataclass(frozen=True)
class ExcerptLoss:
    """Losses of one excerpt at one length, by `position_buckets(length)`: the number of preceding tokens.

    Attributes:
        sums: in nats.
        counts: of predicted tokens.
        text: a hash of the excerpt's tokens: results of equal hashes can be compared.
    """

    sums: tuple[float, ...]
    counts: tuple[int, ...]
    text: str


@dataclass
class PerplexityResult:
    """Measurements of one model.

    Attributes:
        spec: text and lengths.
        origin: what else decides about the results.
        losses: by length and number of the excerpt.
        num_excerpts: those of the text; None until it is known.
    """

    spec: PerplexitySpec
    origin: dict[str, Any] = field(default_factory=dict)
    losses: dict[tuple[int, int], ExcerptLoss] = field(default_factory=dict)
    num_excerpts: int | None = None

    @property
    def is_complete(self) -> bool:
        return self.num_excerpts is not None and len(self.losses) == self.num_excerpts * len(self.spec.lengths)

    def at_length(self, length: int) -> LengthResult:
        """Return the mean over all excerpts that have been measured at a length."""
        records = [record for (of_length, _), record in sorted(self.losses.items()) if of_length == length]
        sums = [sum(column) for column in zip(*(record.sums for record in records), strict=True)]
        counts = [sum(column) for column in zip(*(record.counts for record in records), strict=True)]
        means = tuple(total / count for total, count in zip(sums, counts, strict=True))
        return LengthResult(length, sum(counts), sum(sums) / sum(counts), means)

    def all_lengths(self, lengths: Iterable[int] | None = None) -> list[LengthResult]:
        return [self.at_length(length) for length in (self.spec.lengths if lengths is None else lengths)]

    @property
    def text(self) -> frozenset[str]:
        """Hashes of the excerpts."""
        return frozenset(record.text for record in self.losses.values())


def sliding_windows(num_tokens: int, length: int, stride: int) -> list[tuple[int, int]]:
    """Return start and first predicted token, both from the start of the excerpt, of every window of `length` tokens.

    Windows begin `stride` tokens apart; the last one ends with the excerpt. Every token but the first is predicted
    once.
    """
    starts = [*range(0, num_tokens - length, stride), num_tokens - length]
    return [(start, 1 if index == 0 else starts[index - 1] + length) for index, start in enumerate(starts)]


def read_perplexity(path: Path, spec: PerplexitySpec, origin: dict[str, Any]) -> PerplexityResult:
    """Return what a file of `measure_perplexity` holds; nothing if there is no file.

    Raises:
        ValueError: if the file is of other settings.
    """
    result = PerplexityResult(spec, dict(origin))
    for record in read_records(path, _header(result)):
        key = record["length"], record["excerpt"]
        result.losses[key] = ExcerptLoss(tuple(record["sums"]), tuple(record["counts"]), record["text"])
        result.num_excerpts = record["num_excerpts"]
    return result


def measure_perplexity(
    excerpts_NS: Tensor,
    losses_of: Losses,
    path: Path,
    *,
    done: PerplexityResult,
    writes: bool = True,
    tokens_per_batch: int = 8192,
    report_progress: Callable[[int], None] = lambda num_tokens: None,
) -> PerplexityResult:
    """Measure all lengths and excerpts that have no record, and append them to the file.

    Args:
        excerpts_NS: int64 token ids.
        losses_of: returns the losses of windows; if ranks share a window, all ranks call it.
        path: of the file.
        done: what `read_perplexity` returned, the same on every rank.
        writes: whether this process writes the file; one does.
        tokens_per_batch: short windows are batched up to this many tokens.
        report_progress: called with the number of tokens that were predicted.

    Raises:
        ValueError: if the records of the file are of another text.
    """
    spec = done.spec
    num_excerpts, num_tokens = excerpts_NS.shape
    result = PerplexityResult(spec, done.origin, dict(done.losses), num_excerpts)
    hashes = [_hash(excerpt) for excerpt in excerpts_NS]
    for (length, number), record in done.losses.items():
        if number >= num_excerpts or record.text != hashes[number]:
            raise ValueError(
                f"{path} was measured on another text (excerpt {number} at {length} tokens): the source or the "
                "tokenizer has changed. Name another output_dir, or delete the file."
            )
    if writes:
        begin_file(path, _header(result), len(done.losses))
    for length in spec.lengths:
        windows = sliding_windows(num_tokens, length, spec.stride or max(1, length // 2))
        for number, excerpt in enumerate(excerpts_NS):
            if (length, number) in result.losses:
                continue
            record = _measure_excerpt(excerpt, windows, length, losses_of, tokens_per_batch, hashes[number])
            result.losses[length, number] = record
            if writes:
                cell = {"length": length, "excerpt": number, "num_excerpts": num_excerpts}
                append_record(path, {**cell, **asdict(record)})
            report_progress(num_tokens - 1)
    return result


def _measure_excerpt(
    excerpt_S: Tensor, windows: list[tuple[int, int]], length: int, losses_of: Losses, tokens_per_batch: int, text: str
) -> ExcerptLoss:
    by_position_L = torch.zeros(length, dtype=torch.float64)  # summed; the index is the number of preceding tokens
    counts_L = torch.zeros(length, dtype=torch.int64)
    size = max(1, tokens_per_batch // length)
    for first in range(0, len(windows), size):
        batch = windows[first : first + size]
        losses_BL = losses_of(torch.stack([excerpt_S[start : start + length] for start, _ in batch]))
        for losses, (start, first_token) in zip(losses_BL, batch, strict=True):
            position = first_token - start
            by_position_L[position:] += losses[position - 1 :]
            counts_L[position:] += 1
    spans = [slice(low, high + 1) for low, high in position_buckets(length)]
    sums = tuple(by_position_L[span].sum().item() for span in spans)
    return ExcerptLoss(sums, tuple(int(counts_L[span].sum()) for span in spans), text)


def _hash(ids: Tensor) -> str:
    return hashlib.sha256(ids.to("cpu", torch.int64).contiguous().numpy().tobytes()).hexdigest()[:16]


def _header(result: PerplexityResult) -> dict[str, Any]:
    return {"perplexity": asdict(result.spec), "origin": result.origin}
