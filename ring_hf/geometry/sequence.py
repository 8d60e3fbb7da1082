"""One batch of sequences as the whole group of ranks sees it, and the mask over it.

Both objects are small, frozen, hashable and made of integers: they travel with the batch to every layer, through
loader workers and activation checkpointing, and are the key under which plans are cached.
"""

import functools
import itertools
from dataclasses import dataclass

from .layout import Segment, check_length, segments


@dataclass(frozen=True)
class Mask:
    """Query q sees key k iff they share a document, `k <= q` if `causal`, and `q - k < window` if there is one.

    `window` counts visible keys including the query's own (Transformers' `sliding_window`); without `causal` it
    limits only how far back a query looks.
    """

    causal: bool = True
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1 (the query itself). Use None for no window.")


@dataclass(frozen=True)
class WholeSequence:
    """A padded batch dealt to `num_ranks` ranks.

    Args:
        layout: one of `LAYOUTS`.
        length: global sequence length s, padding included.
        num_ranks: ranks that share each sequence.
        documents: per batch row the cumulative boundaries `(0, ..., s)`; None for one document per row.
        num_tokens: per batch row the number of real tokens, the rest being right padding; None if all are real.

    Raises:
        ValueError: if `length` cannot be dealt, or boundaries do not rise strictly from 0 to `length`.
    """

    layout: str
    length: int
    num_ranks: int
    documents: tuple[tuple[int, ...], ...] | None = None
    num_tokens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_length(self.layout, self.length, self.num_ranks)
        for row, bounds in enumerate(self.documents or ()):
            rising = all(a < b for a, b in itertools.pairwise(bounds))
            if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != self.length or not rising:
                raise ValueError(
                    f"Document boundaries of row {row} must rise from 0 to the padded length {self.length}, "
                    f"got {_short(bounds)}."
                )
        if self.documents and self.num_tokens and len(self.documents) != len(self.num_tokens):
            raise ValueError(
                f"documents describe {len(self.documents)} rows and num_tokens {len(self.num_tokens)}: "
                "both count batch rows."
            )
        for row, count in enumerate(self.num_tokens or ()):
            if not 0 <= count <= self.length:
                raise ValueError(f"Row {row} claims {count} tokens in a sequence of {self.length}.")

    @property
    def num_rows(self) -> int | None:
        """Batch rows this object speaks of, or None if it holds for any number."""
        described = self.documents if self.documents is not None else self.num_tokens
        return None if described is None else len(described)

    def segments(self, rank: int) -> tuple[Segment, ...]:
        return segments(self.layout, self.length, self.num_ranks, rank)

    def boundaries(self, row: int, causal: bool) -> tuple[int, ...]:
        """Document boundaries of a row with its right padding set apart where that matters.

        Under a causal mask no real token sees padding behind it, so a row that is one document stays one: all rows
        then share their tiles. Under a full mask, or in a packed row, padding is a document of its own.
        """
        bounds = (0, self.length) if self.documents is None else self.documents[row]
        end = self.length if self.num_tokens is None else self.num_tokens[row]
        if end in (0, self.length) or end in bounds or (causal and len(bounds) == 2):
            return bounds
        return tuple(sorted({*bounds, end}))

    def to_ints(self) -> tuple[list[int], list[int]]:
        """`(documents, num_tokens)` as flat lists, the form an operator schema can carry."""
        return [n for bounds in self.documents or () for n in bounds], list(self.num_tokens or ())

    @classmethod
    def from_ints(
        cls, layout: str, length: int, num_ranks: int, documents: list[int], num_tokens: list[int]
    ) -> "WholeSequence":
        """Inverse of `to_ints`, cached: a layer pays for a hash, not for parsing."""
        return _from_ints(layout, length, num_ranks, tuple(documents), tuple(num_tokens))


@functools.lru_cache(maxsize=16)
def _from_ints(
    layout: str, length: int, num_ranks: int, documents: tuple[int, ...], num_tokens: tuple[int, ...]
) -> WholeSequence:
    rows: list[tuple[int, ...]] = []
    first = 0
    for place, bound in enumerate(documents):
        if bound == length:
            rows.append(documents[first : place + 1])
            first = place + 1
    return WholeSequence(layout, length, num_ranks, tuple(rows) or None, num_tokens or None)


def _short(bounds: tuple[int, ...]) -> str:
    text = ", ".join(map(str, bounds[:6]))
    return f"({text}, ... {len(bounds)} numbers)" if len(bounds) > 6 else f"({text})"
