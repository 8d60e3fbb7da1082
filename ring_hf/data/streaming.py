"""Streams: read, tokenise, mix and pack while training, for data that is too large to do so first.

Every process reads the same stream, in the same order, and Accelerate gives each replica its rows of it (not each
rank: ranks that share a sequence get the same). A stream never ends: a source that has been read begins again, so that
`max_steps` alone decides, and a run that continues skips the sequences it has trained on.

With weights, the next document comes from the source that is furthest behind its share of the tokens; without, every
source is read once before any is read again. Documents are packed within a buffer, whose sequences are shuffled.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from .formats import FormatSettings, find_format, tokenize_source
from .mixture import is_read_as_it_is
from .packing import PACKINGS, assemble_sequence, check_packing
from .run_options import DataArguments
from .source_spec import MixtureSpec, SourceSpec
from .sources import stream_rows
from .tokens import LABELS, WEIGHTS, TokenRow

logger = logging.getLogger("ring_hf")


class StreamedSequences(IterableDataset):
    """An endless stream of packed sequences, the same in every process.

    Args:
        args (`DataArguments`): with `streaming`.
        tokenizer: a Transformers tokenizer.

    Raises:
        ValueError: if a setting needs the number of tokens, which a stream does not know.
    """

    def __init__(self, args: DataArguments, tokenizer: Any):
        self.args, self.tokenizer, self.mixture = args, tokenizer, args.mixture()
        check_packing(args.packing, args.max_length)
        if self.mixture.tokens is not None or self.mixture.stop != "first_exhausted":
            raise ValueError(
                f"streaming=True with mixture_tokens={self.mixture.tokens}, mixture_stop={self.mixture.stop!r}: a "
                "stream goes on until max_steps. Leave both out, or set streaming=False."
            )
        for spec in self.mixture.sources:
            spec.span_length(args.max_length)
            find_format(spec.format)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield the columns of one sequence after the other.

        Raises:
            ValueError: if several workers of a data loader would each read the whole stream.
        """
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError(
                f"dataloader_num_workers={worker.num_workers} with streaming=True: every worker would read the whole "
                "stream. Set it to 1 or 0."
            )
        args = self.args
        sources = [
            SourceStream(spec, number, args, self.tokenizer, self.mixture.seed, is_read_as_it_is(self.mixture))
            for number, spec in enumerate(self.mixture.sources)
        ]
        has_weights = any(source.has_loss_weights() for source in sources)
        spans = interleave(sources, self.mixture)
        for number, parts in enumerate(pack_buffers(spans, args.max_length, args.packing, args.stream_buffer)):
            order = np.random.default_rng([self.mixture.seed, number]).permutation(len(parts))
            for i in order:
                rows = [_with_weights(row, has_weights) for row in parts[i]]
                yield assemble_sequence(rows, args.mask_boundaries, args.attend_across_documents)


@dataclass
class SourceStream:
    """The spans of one source, epoch after epoch."""

    spec: SourceSpec
    number: int
    args: DataArguments
    tokenizer: Any
    seed: int
    keeps_documents: bool  # packing cuts the long ones
    num_tokens: int = 0  # handed over so far
    epoch: int = 0

    def __post_init__(self) -> None:
        self._spans = self._read()

    def has_loss_weights(self) -> bool:
        """Return whether the first document has weights, which then all documents have."""
        first = next(self._spans)
        self._spans = itertools.chain([first], self._spans)
        return first.loss_weights is not None

    def next_span(self) -> TokenRow | None:
        """Return the next span, or None at the end of an epoch, after which the next one begins."""
        span = next(self._spans, None)
        if span is None:
            self.epoch += 1
            self._spans = self._read()
            return None
        self.num_tokens += len(span)
        return span

    def _read(self) -> Iterator[TokenRow]:
        generator = np.random.default_rng([self.seed, self.number, self.epoch])
        span_length, num_documents, num_tokens = self.spec.span_length(self.args.max_length), 0, 0
        for document in self._documents():
            num_documents += 1
            longest = len(document) if self.keeps_documents else span_length
            for start, stop in _spans_of_document(len(document), self.spec, longest, generator):
                if self.spec.max_tokens is not None and num_tokens + stop - start > self.spec.max_tokens:
                    return
                num_tokens += stop - start
                yield document[start:stop]
        if not num_tokens:
            raise ValueError(
                f"data source {self.spec.name!r}: nothing is left of {num_documents} documents. Change min_length, "
                "max_length, overlong, length_weights or max_tokens."
            )

    def _documents(self) -> Iterator[TokenRow]:
        spec = self.spec
        columns = find_format(spec.format).row_columns(spec.renamed)
        bad_rows = BadRowCounter(spec)
        rows = stream_rows(spec.source, columns, spec.split, spec.encoding, spec.errors).filter(bad_rows.is_good)
        settings = FormatSettings(spec.name, spec.errors, options=spec.options)
        for row in tokenize_source(rows, self.tokenizer, spec.format, settings):
            if bad_rows.is_good(row):
                yield _token_row(row)
        if not self.epoch:
            bad_rows.report()


@dataclass
class BadRowCounter:
    """Counts rows that are left out, by kind, and names the first of each."""

    spec: SourceSpec

    def __post_init__(self) -> None:
        self.kinds: Counter[str] = Counter()

    def is_good(self, row: dict[str, Any]) -> bool:
        """Return whether a row can be used."""
        kind = row.get("error")
        if kind is None:
            return True
        if not self.kinds[kind]:
            logger.warning("data source %r leaves out rows %s: %s", self.spec.name, kind, row["message"])
        self.kinds[kind] += 1
        return False

    def report(self) -> None:
        """Log how many rows were left out."""
        if self.kinds:
            counts = ", ".join(f"{count} {kind}" for kind, count in self.kinds.most_common())
            logger.warning("data source %r: %d rows are left out: %s.", self.spec.name, self.kinds.total(), counts)


def interleave(sources: Sequence[SourceStream], mixture: MixtureSpec) -> Iterator[TokenRow]:
    """Yield spans of all sources without end, by weight, or else all of each source before any begins again."""
    shares = mixture.shares if mixture.has_weights else [1.0] * len(sources)
    active = list(range(len(sources)))
    started = [0] * len(sources)  # tokens at the beginning of this pass
    while True:
        number = min(active, key=lambda i: (sources[i].num_tokens - started[i]) / shares[i])
        span = sources[number].next_span()
        if span is not None:
            yield span
        elif not mixture.has_weights:
            active.remove(number)
            if not active:
                active = list(range(len(sources)))
                started = [source.num_tokens for source in sources]


def pack_buffers(spans: Iterator[TokenRow], length: int, packing: str, size: int) -> Iterator[list[list[TokenRow]]]:
    """Yield the sequences of one buffer after the other.

    A buffer takes spans until it holds `size` sequences' worth of tokens. The emptiest of its sequences goes into the
    next buffer, so that the end of a buffer leaves no gap.
    """
    waiting: list[TokenRow] = []
    while True:
        num_tokens = sum(map(len, waiting))
        while num_tokens < size * length:
            waiting.append(next(spans))
            num_tokens += len(waiting[-1])
        packed = PACKINGS[packing]([len(row) for row in waiting], length)
        sequences = [[waiting[span.document][span.start : span.stop] for span in parts] for parts in packed]
        fills = [sum(map(len, sequence)) for sequence in sequences]
        emptiest = len(fills) - 1 if packing == "stream" else fills.index(min(fills))
        is_kept = len(sequences) > 1 and packing != "separate" and fills[emptiest] < length
        waiting = sequences.pop(emptiest) if is_kept else []
        yield sequences


def _spans_of_document(
    length: int, spec: SourceSpec, longest: int, generator: np.random.Generator
) -> Iterator[tuple[int, int]]:
    """Yield the spans of one document; of a fractional length weight, chance decides for each by itself."""
    weight = next((w for least, w in sorted(spec.length_weights.items(), reverse=True) if length >= least), 1)
    copies = int(weight) + (generator.random() < weight % 1)
    if length < spec.min_length or (spec.overlong == "drop" and length > longest):
        return
    stop = min(length, longest) if spec.overlong == "truncate" else length
    for _ in range(copies):
        for start in range(0, stop, longest):
            yield start, min(start + longest, stop)


def _token_row(row: dict[str, Any]) -> TokenRow:
    input_ids = np.asarray(row["input_ids"], dtype=np.int32)
    labels, weights = row.get(LABELS), row.get(WEIGHTS)
    return TokenRow(
        input_ids,
        input_ids if labels is None else np.asarray(labels, dtype=np.int32),
        None if weights is None else np.asarray(weights, dtype=np.float32),
    )


def _with_weights(row: TokenRow, has_weights: bool) -> TokenRow:
    if has_weights == (row.loss_weights is not None):
        return row
    if not has_weights:
        raise ValueError(
            "a row has loss_weights, but the first row of every source has none. Give the first rows loss_weights, "
            "too, or set streaming=False."
        )
    return TokenRow(row.input_ids, row.labels, np.ones(len(row), np.float32))
