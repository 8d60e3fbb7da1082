"""A sequence, its documents, a mask and a number of ranks, as somebody types them on a command line."""

import itertools
import random
from dataclasses import dataclass

from ..geometry import Mask, ShardedSequence, padded_length


def mixed_lengths(length: int, count: int, seed: int) -> tuple[int, ...]:
    """`count` document lengths that sum up to `length`: log-normal, so many short ones and few long ones.

    Raises:
        ValueError: if there are more documents than tokens.
    """
    if not 1 <= count <= length:
        raise ValueError(f"num_documents={count} do not fit into {length} tokens: give every document at least one.")
    draw = random.Random(seed)
    weights = [draw.lognormvariate(0.0, 1.0) for _ in range(count)]
    scale = (length - count) / sum(weights)
    lengths = [1 + int(weight * scale) for weight in weights]
    lengths[-1] += length - sum(lengths)
    return tuple(lengths)


@dataclass(frozen=True)
class Scenario:
    """One batch row of `length` tokens on `num_ranks` ranks.

    Args:
        documents: lengths; what is left of the sequence is one more document.
        prefixes: per document the tokens at its start that see each other both ways; one number holds for all.
    """

    num_ranks: int
    length: int
    mask: Mask
    documents: tuple[int, ...] = ()
    prefixes: tuple[int, ...] = ()
    ulysses: int = 1

    def __post_init__(self) -> None:
        if sum(self.documents) > self.length:
            raise ValueError(
                f"The documents hold {sum(self.documents)} tokens, the sequence {self.length}. Make --seq larger or "
                "the documents fewer."
            )
        if 0 in self.documents:
            raise ValueError(f"Document {self.documents.index(0)} has 0 tokens. Give every document at least one.")

    def sequence(self, layout: str, ulysses: int | None = None) -> ShardedSequence:
        """The padded sequence in a layout; padding joins the last document."""
        ulysses = self.ulysses if ulysses is None else ulysses
        length = padded_length(layout, self.length, self.num_ranks, ulysses)
        bounds = [0, *itertools.accumulate(self.documents)]
        bounds = bounds if bounds[-1] == length else [*bounds, length]
        if self.documents and sum(self.documents) == self.length and length > self.length:
            del bounds[-2]
        prefixes = None
        if self.prefixes:
            sizes = self.prefixes * (len(bounds) - 1) if len(self.prefixes) == 1 else self.prefixes
            sizes = (*sizes, *(0,) * (len(bounds) - 1 - len(sizes)))
            prefixes = (tuple(min(p, b - a) for p, (a, b) in zip(sizes, itertools.pairwise(bounds), strict=False)),)
        documents = (tuple(bounds),) if self.documents else None
        return ShardedSequence(layout, length, self.num_ranks, documents, None, prefixes, ulysses)

    def scaled(self, length: int) -> "Scenario":
        """The same proportions in `length` tokens, for a picture that shows single ones."""

        def shrink(size: int) -> int:
            return max(1, round(size * length / self.length))

        bounds = sorted({0, *(round(end * length / self.length) for end in itertools.accumulate(self.documents))})
        window, chunk = (None if size is None else shrink(size) for size in (self.mask.window, self.mask.chunk))
        return Scenario(
            self.num_ranks,
            length,
            Mask(self.mask.causal, window, chunk),
            tuple(b - a for a, b in itertools.pairwise(bounds)),
            tuple(size and shrink(size) for size in self.prefixes),
            self.ulysses,
        )

    def describe(self) -> str:
        """The setting without its layout, for a title."""
        mask = self.mask
        parts = [f"{self.length:,} tokens"]
        if self.documents:
            count = len(self.documents) + (sum(self.documents) < self.length)
            parts.append(f"{count} documents" if count > 1 else "1 document")
        parts.append("causal" if mask.causal else "full")
        parts += [f"window {mask.window:,}"] if mask.window else []
        parts += [f"chunks of {mask.chunk:,}"] if mask.chunk else []
        parts += ["prefix"] if any(self.prefixes) else []
        split = f" (ring of {self.num_ranks // self.ulysses} x ulysses {self.ulysses})" if self.ulysses > 1 else ""
        return f"{', '.join(parts)}; {self.num_ranks} ranks{split}"
