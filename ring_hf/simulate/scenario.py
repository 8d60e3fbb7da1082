"""A sequence, its documents, a mask and a number of ranks, as given on a command line."""

import itertools
import random
from dataclasses import dataclass

from ..geometry import Mask, ShardedSequence, padded_length


def mixed_lengths(length: int, count: int, seed: int) -> tuple[int, ...]:
    """Return `count` document lengths that add up to `length`: log-normal, so many short ones and few long ones.

    Raises:
        ValueError: if there are more documents than tokens.
    """
    if not 1 <= count <= length:
        raise ValueError(f"num_documents={count} do not fit into {length} tokens: give every document at least one.")
    generator = random.Random(seed)
    weights = [generator.lognormvariate(0.0, 1.0) for _ in range(count)]
    scale = (length - count) / sum(weights)
    lengths = [1 + int(weight * scale) for weight in weights]
    lengths[-1] += length - sum(lengths)
    return tuple(lengths)


@dataclass(frozen=True)
class Scenario:
    """One batch row of `length` tokens on `num_ranks` ranks.

    Args:
        documents: lengths; the rest of the sequence is one more document.
        prefixes: per document the number of tokens at its start that see each other in both directions; a single
            number holds for all documents.

    Raises:
        ValueError: if the documents are longer than the sequence, or one of them is empty.
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
        """Return the padded sequence in a layout; padding joins the last document.

        Raises:
            ValueError: as `ShardedSequence` does.
        """
        ulysses = self.ulysses if ulysses is None else ulysses
        length = padded_length(layout, self.length, self.num_ranks, ulysses)
        bounds = [0, *itertools.accumulate(self.documents)]
        if bounds[-1] != length:
            bounds.append(length)
        if self.documents and sum(self.documents) == self.length and length > self.length:
            del bounds[-2]
        prefixes = None
        if self.prefixes:
            num_documents = len(bounds) - 1
            sizes = self.prefixes * num_documents if len(self.prefixes) == 1 else self.prefixes
            sizes = (*sizes, *(0,) * (num_documents - len(sizes)))
            doc_lengths = (b - a for a, b in itertools.pairwise(bounds))
            prefixes = (tuple(map(min, sizes, doc_lengths)),)
        documents = (tuple(bounds),) if self.documents else None
        return ShardedSequence(layout, length, self.num_ranks, documents, None, prefixes, ulysses)

    def scaled(self, length: int) -> "Scenario":
        """Return the same proportions in `length` tokens, for a picture that shows single tokens."""

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
        """Return the scenario without its layout, for a title."""
        mask = self.mask
        parts = [f"{self.length:,} tokens"]
        if self.documents:
            count = len(self.documents) + (sum(self.documents) < self.length)
            parts.append(f"{count} documents" if count > 1 else "1 document")
        parts.append("causal" if mask.causal else "full")
        parts += [f"window {mask.window:,}"] if mask.window else []
        parts += [f"chunks of {mask.chunk:,}"] if mask.chunk else []
        parts += ["prefix"] if any(self.prefixes) else []
        ring = f" (ring of {self.num_ranks // self.ulysses} x ulysses {self.ulysses})" if self.ulysses > 1 else ""
        return f"{', '.join(parts)}; {self.num_ranks} ranks{ring}"
