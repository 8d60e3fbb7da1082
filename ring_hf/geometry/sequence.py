"""One batch of sequences as the whole group of ranks sees it, and the mask over it.

Both objects are small, frozen, hashable and made of integers: they travel with the batch to every layer, through
loader workers and activation checkpointing, and are the key under which plans are cached.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from .layout import Segment, check_length, owners, ring_segments, ring_size_of, segments

Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Mask:
    """Query q sees key k iff they share a document, `k <= q` if `causal`, and `q - k < window` if there is one.

    `window` counts visible keys including the query's own (Transformers' `sliding_window`); without `causal` it
    limits only how far back a query looks. With `chunk` they must also lie in the same run of `chunk` tokens,
    counted from the start of their document (Llama 4's chunked attention).
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
    """A row cut where what a query sees changes: region n holds tokens `starts[n]..starts[n + 1] - 1`.

    Its tokens belong to the document `firsts[n]..ends[n] - 1`; in a prefix, all see each other up to `reaches[n] - 1`
    (0: not a prefix).
    """

    starts: tuple[int, ...]
    firsts: tuple[int, ...]
    ends: tuple[int, ...]
    reaches: tuple[int, ...]


@dataclass(frozen=True)
class ShardedSequence:
    """A padded batch dealt to `num_ranks` ranks.

    Args:
        layout: one of `LAYOUTS`.
        length: global sequence length s, padding included.
        num_ranks: ranks that share each sequence.
        documents: per batch row the cumulative boundaries `(0, ..., s)`; None for one document per row.
        num_tokens: per batch row the number of real tokens, the rest being right padding; None if all are real.
        prefixes: per batch row and document the tokens at its start that all see each other, whatever the mask says
            about later keys (prefix language modelling; padding has no part in it); None for none.
        ulysses: ranks at each place of the ring, which exchange heads; a divisor of `num_ranks`.

    Raises:
        ValueError: if `length` cannot be dealt, boundaries do not rise strictly from 0 to `length`, or prefixes do
            not fit their documents.
    """

    layout: str
    length: int
    num_ranks: int
    documents: Rows | None = None
    num_tokens: tuple[int, ...] | None = None
    prefixes: Rows | None = None
    ulysses: int = 1

    def __post_init__(self) -> None:
        check_length(self.layout, self.length, self.num_ranks, self.ulysses)
        for row, bounds in enumerate(self.documents or ()):
            rising = all(a < b for a, b in itertools.pairwise(bounds))
            if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != self.length or not rising:
                raise ValueError(
                    f"Document boundaries of row {row} must rise from 0 to the padded length {self.length}, "
                    f"got {_short(bounds)}."
                )
        described = {
            "documents": self.documents,
            "num_tokens": self.num_tokens,
            "prefixes": self.prefixes,
        }
        counts = {name: len(rows) for name, rows in described.items() if rows}
        if len(set(counts.values())) > 1:
            listed = " and ".join(f"{name} {count} rows" for name, count in counts.items())
            raise ValueError(f"The description of the batch contradicts itself: {listed}. All count batch rows.")
        for row, count in enumerate(self.num_tokens or ()):
            if not 0 <= count <= self.length:
                raise ValueError(f"Row {row} claims {count} tokens in a sequence of {self.length}.")
        for row, prefixes in enumerate(self.prefixes or ()):
            bounds = self._bounds(row)
            lengths = [b - a for a, b in itertools.pairwise(bounds)]
            if len(prefixes) != len(lengths) or any(not 0 <= p <= n for p, n in zip(prefixes, lengths, strict=True)):
                raise ValueError(
                    f"Row {row} has the documents {_short(bounds)} and the prefixes {_short(prefixes)}: give one "
                    "length per document, at most that of the document."
                )

    @property
    def num_rows(self) -> int | None:
        """Batch rows this object speaks of, or None if it holds for any number."""
        described = next((rows for rows in (self.documents, self.num_tokens, self.prefixes) if rows is not None), None)
        return None if described is None else len(described)

    @property
    def ring_size(self) -> int:
        """Places of the ring."""
        return ring_size_of(self.num_ranks, self.ulysses)

    @property
    def shard_length(self) -> int:
        """Tokens of one rank."""
        return self.length // self.num_ranks

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """The shard of one rank, in local order."""
        return segments(self.layout, self.length, self.num_ranks, rank, self.ulysses, self._dealt_by)

    def ring_segments(self, place: int) -> tuple[Segment, ...]:
        """What one place of the ring holds: the shards of its `ulysses` ranks one after the other."""
        return ring_segments(self.layout, self.length, self.ring_size, place, self._dealt_by)

    def owners(self, first: int, last: int) -> set[int]:
        """Places of the ring that hold any of the global tokens `first..last` (inclusive)."""
        return owners(self.layout, self.length, self.ring_size, first, last, self._dealt_by)

    @property
    def _dealt_by(self) -> Rows:
        return self.documents or ()

    def _bounds(self, row: int) -> tuple[int, ...]:
        return (0, self.length) if self.documents is None else self.documents[row]

    def boundaries(self, row: int, causal: bool) -> tuple[int, ...]:
        """Document boundaries of a row with its right padding set apart where that matters.

        Under a causal mask no real token sees padding behind it, so a row that is one document stays one: all rows
        then share their tiles. Under a full mask, or in a packed row, padding is a document of its own.
        """
        bounds = self._bounds(row)
        end = self.length if self.num_tokens is None else self.num_tokens[row]
        if end in (0, self.length) or end in bounds or (causal and len(bounds) == 2 and not self._prefix(row, 0)):
            return bounds
        return tuple(sorted({*bounds, end}))

    def _prefix(self, row: int, document: int) -> int:
        return self.prefixes[row][document] if self.prefixes is not None else 0

    def regions(self, row: int, mask: Mask) -> RowRegions:
        """The row cut at document boundaries, at the ends of prefixes, and into the mask's chunks.

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
                f"A document with a prefix under {mask}: a prefix is what a causal mask without chunks can be "
                "softened by. Drop the prefixes or use such a mask."
            )
        cuts: list[tuple[int, int, int, int]] = []
        real = (self.num_tokens[row] if self.num_tokens else 0) or self.length
        prefix_of = dict(zip(self._bounds(row), self.prefixes[row], strict=False))
        for first, end in itertools.pairwise(bounds):
            reach = max(first, min(first + prefix_of.get(first, 0), end, real))
            if reach > first:
                cuts.append((first, first, end, reach))
            if reach < end:
                cuts.append((reach, first, end, 0))
        starts, firsts, ends, reaches = zip(*cuts, strict=True)
        return RowRegions((*starts, self.length), firsts, ends, reaches)

    def row_groups(self, mask: Mask, num_rows: int) -> Iterator[tuple[int, int, RowRegions]]:
        """Runs of neighbouring batch rows that are cut alike: `(first row, rows, regions)`."""
        if self.num_rows is None:
            yield 0, num_rows, self.regions(0, mask)
            return
        first = 0
        for regions, run in itertools.groupby(self.regions(row, mask) for row in range(self.num_rows)):
            rows = sum(1 for _ in run)
            yield first, rows, regions
            first += rows


def _short(bounds: tuple[int, ...]) -> str:
    text = ", ".join(map(str, bounds[:6]))
    return f"({text}, ... {len(bounds)} numbers)" if len(bounds) > 6 else f"({text})"
