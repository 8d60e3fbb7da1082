"""One batch of sequences as the whole group of ranks sees it, and the mask over it.

Both objects are small, frozen, hashable and made of integers: they travel with the batch to every layer, through
loader workers and activation checkpointing, and are the key under which plans are cached.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from .balance import IntsPerRow
from .layout import Segment, check_length, owners, ring_segments, ring_size_of, segments


@dataclass(frozen=True)
class Mask:
    """Query q sees key k iff they share a document, `k <= q` if `causal`, and `q - k < window` if there is a window.

    Args:
        window: number of visible keys including the query's own (Transformers' `sliding_window`); without `causal` it
            limits only how far back a query sees.
        chunk: query and key must also lie in the same run of `chunk` tokens, counted from the start of their document
            (Llama 4's chunked attention).

    Raises:
        ValueError: if `window` or `chunk` is less than 1.
    """

    causal: bool = True
    window: int | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1 (the query itself). Use None for no window.")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk={self.chunk} must be at least 1 token. Use None for no chunks.")


@dataclass(frozen=True)
class RowRegions:
    """A batch row cut into regions whose tokens see the same document and prefix.

    Attributes:
        starts: region n holds the tokens `starts[n]..starts[n + 1] - 1`; the last entry is the end of the row.
        doc_starts, doc_ends: per region its document, the tokens `doc_starts[n]..doc_ends[n] - 1`.
        prefix_ends: per region 0, or one past the last token of the prefix it belongs to, whose tokens all see each
            other.
    """

    starts: tuple[int, ...]
    doc_starts: tuple[int, ...]
    doc_ends: tuple[int, ...]
    prefix_ends: tuple[int, ...]


@dataclass(frozen=True)
class ShardedSequence:
    """A padded batch sharded over `num_ranks` ranks.

    Args:
        layout: one of `LAYOUTS`.
        length: global sequence length s in tokens, padding included.
        num_ranks: ranks that share each sequence.
        documents: per batch row the cumulative boundaries `(0, ..., s)`; None for one document per row.
        num_tokens: per batch row the number of real tokens; the rest is right padding. None if all are real.
        prefixes: per batch row and document the number of tokens at its start that all see each other, whatever the
            mask says about later keys (prefix language modelling); padding is never part of a prefix. None for none.
        ulysses: ranks of a Ulysses group, which exchange heads; a divisor of `num_ranks`.

    Raises:
        ValueError: if `length` cannot be sharded, boundaries do not rise strictly from 0 to `length`, or prefixes do
            not fit their documents.
    """

    layout: str
    length: int
    num_ranks: int
    documents: IntsPerRow | None = None
    num_tokens: tuple[int, ...] | None = None
    prefixes: IntsPerRow | None = None
    ulysses: int = 1

    def __post_init__(self) -> None:
        check_length(self.layout, self.length, self.num_ranks, self.ulysses)
        for row, bounds in enumerate(self.documents or ()):
            rising = all(a < b for a, b in itertools.pairwise(bounds))
            if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != self.length or not rising:
                raise ValueError(
                    f"Document boundaries of row {row} must rise from 0 to the padded length {self.length}, "
                    f"got {_shorten(bounds)}."
                )
        row_counts = {
            name: len(rows)
            for name, rows in (
                ("documents", self.documents),
                ("num_tokens", self.num_tokens),
                ("prefixes", self.prefixes),
            )
            if rows
        }
        if len(set(row_counts.values())) > 1:
            listed = " and ".join(f"{name} has {count} rows" for name, count in row_counts.items())
            raise ValueError(
                f"The batch is described inconsistently: {listed}. Each must have one entry per batch row."
            )
        for row, count in enumerate(self.num_tokens or ()):
            if not 0 <= count <= self.length:
                raise ValueError(
                    f"num_tokens[{row}]={count} does not fit a sequence of {self.length} tokens. Pass the number of "
                    "real tokens of each batch row."
                )
        for row, prefixes in enumerate(self.prefixes or ()):
            bounds = self._bounds(row)
            doc_lengths = [b - a for a, b in itertools.pairwise(bounds)]
            if len(prefixes) != len(doc_lengths) or any(
                not 0 <= prefix <= doc_length for prefix, doc_length in zip(prefixes, doc_lengths, strict=True)
            ):
                raise ValueError(
                    f"Row {row} has the documents {_shorten(bounds)} and the prefixes {_shorten(prefixes)}: give one "
                    "length per document, at most that of the document."
                )

    @property
    def num_rows(self) -> int | None:
        """Number of batch rows that this object describes, or None if it holds for any number."""
        rows = next((rows for rows in (self.documents, self.num_tokens, self.prefixes) if rows is not None), None)
        return None if rows is None else len(rows)

    @property
    def ring_size(self) -> int:
        """Number of ring ranks."""
        return ring_size_of(self.num_ranks, self.ulysses)

    @property
    def shard_length(self) -> int:
        """Tokens of one rank."""
        return self.length // self.num_ranks

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """Return the shard of one rank, in local order."""
        return segments(self.layout, self.length, self.num_ranks, rank, self.ulysses, self._layout_documents)

    def ring_segments(self, ring_rank: int) -> tuple[Segment, ...]:
        """Return the tokens of one ring rank: the shards of its `ulysses` ranks one after the other."""
        return ring_segments(self.layout, self.length, self.ring_size, ring_rank, self._layout_documents)

    def owners(self, first: int, last: int) -> set[int]:
        """Return the ring ranks that hold any of the global tokens `first..last` (inclusive)."""
        return owners(self.layout, self.length, self.ring_size, first, last, self._layout_documents)

    @property
    def _layout_documents(self) -> IntsPerRow:
        return self.documents or ()

    def _bounds(self, row: int) -> tuple[int, ...]:
        return (0, self.length) if self.documents is None else self.documents[row]

    def boundaries(self, row: int, causal: bool) -> tuple[int, ...]:
        """Return the document boundaries of a row, with its right padding as a document of its own where that matters.

        Under a causal mask no real token sees the padding behind it, so a row that is one document stays one: all rows
        then share their tiles. Under a full mask, or in a packed row, padding is a document of its own.
        """
        bounds = self._bounds(row)
        end = self.length if self.num_tokens is None else self.num_tokens[row]
        if end in (0, self.length) or end in bounds:
            return bounds
        if causal and len(bounds) == 2 and not (self.prefixes and self.prefixes[row][0]):
            return bounds
        return tuple(sorted({*bounds, end}))

    def regions(self, row: int, mask: Mask) -> RowRegions:
        """Cut a row at document boundaries, at the ends of prefixes, and into the mask's chunks.

        Raises:
            ValueError: if a document has a prefix and the mask is not plainly causal.
        """
        bounds: tuple[int, ...] = self.boundaries(row, mask.causal)
        if self.prefixes is None or not any(self.prefixes[row]):
            if mask.chunk is not None:
                chunks = (range(first, end, mask.chunk) for first, end in itertools.pairwise(bounds))
                bounds = (*itertools.chain(*chunks), self.length)
            return RowRegions(bounds, bounds[:-1], bounds[1:], (0,) * (len(bounds) - 1))
        if not mask.causal or mask.chunk is not None:
            raise ValueError(
                f"A document has a prefix, but the mask is {mask}. Prefixes need a causal mask without chunks: drop "
                "the prefixes or use such a mask."
            )
        regions: list[tuple[int, int, int, int]] = []
        num_real = (self.num_tokens[row] if self.num_tokens else 0) or self.length
        prefix_of = dict(zip(self._bounds(row), self.prefixes[row], strict=False))
        for first, end in itertools.pairwise(bounds):
            prefix_end = max(first, min(first + prefix_of.get(first, 0), end, num_real))
            if prefix_end > first:
                regions.append((first, first, end, prefix_end))
            if prefix_end < end:
                regions.append((prefix_end, first, end, 0))
        starts, doc_starts, doc_ends, prefix_ends = zip(*regions, strict=True)
        return RowRegions((*starts, self.length), doc_starts, doc_ends, prefix_ends)

    def row_groups(self, mask: Mask, num_rows: int) -> Iterator[tuple[int, int, RowRegions]]:
        """Yield `(first row, number of rows, regions)` for each run of batch rows with equal regions.

        Raises:
            ValueError: as `regions` does.
        """
        if self.num_rows is None:
            yield 0, num_rows, self.regions(0, mask)
            return
        first = 0
        for regions, run in itertools.groupby(self.regions(row, mask) for row in range(self.num_rows)):
            rows = sum(1 for _ in run)
            yield first, rows, regions
            first += rows


def _shorten(numbers: tuple[int, ...]) -> str:
    listed = ", ".join(map(str, numbers[:6]))
    return f"({listed}, ... {len(numbers)} numbers)" if len(numbers) > 6 else f"({listed})"
