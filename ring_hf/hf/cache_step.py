"""One forward pass over a sharded KV cache, as its layers and the attention function see it.

It travels to the attention layers under the key of `ContextParallelMetadata`, whose place it takes in generation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ring_hf.geometry import RingOptions, Segment, ShardedSequence


@dataclass(frozen=True)
class CacheStep:
    """New tokens of a sequence whose earlier keys are in a sharded cache.

    Attributes:
        start: global position of the first new token: the number of tokens in the cache.
        num_tokens: new tokens.
        sequence: how they are dealt to the ranks, padded, with positions from 0; None if every rank has all of them.
        owner: without a `sequence` the rank that keeps the new keys; with one the rank that holds the last token.
        row_starts: per batch row the number of padded tokens at its start; None without padding.
        group: the registered name of the ranks that share the cache.
        rank: this rank in the group.
        options: how attention over the new tokens is computed.
        layers: of the cache, by `layer_idx`.
    """

    start: int
    num_tokens: int
    sequence: ShardedSequence | None
    owner: int
    row_starts: tuple[int, ...] | None
    group: str
    rank: int
    options: RingOptions
    layers: Sequence[Any]

    def positions(self, rank: int) -> tuple[Segment, ...]:
        """Return the global positions of the new tokens that a rank has, padding at the end included."""
        if self.sequence is None:
            return (Segment(self.start, self.num_tokens, 1),)
        return tuple(
            Segment(self.start + segment.start, segment.length, 1) for segment in self.sequence.segments(rank)
        )
