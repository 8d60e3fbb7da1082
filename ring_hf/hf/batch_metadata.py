"""The metadata of a sharded batch: one small frozen object that describes the whole sequence.

The collator puts it under the key `context_parallel`. Transformers passes model kwargs down to the attention function,
so it arrives there together with this rank's shard of the tokens, even when a checkpointed layer is recomputed on
another thread. Nothing else carries batch state: no module globals, no thread-locals. Neither class has a `to` or a
`pin_memory` method, so data loaders, Accelerate and DDP pass them on unchanged.
"""

from dataclasses import dataclass

from ring_hf.geometry import RingOptions, ShardedSequence

METADATA_KEY = "context_parallel"
IGNORE_INDEX = -100


@dataclass(frozen=True)
class ContextParallelMetadata:
    """A sharded batch, or a whole one (`sequence.num_ranks == 1`) with prefixes, which one process must know.

    Attributes:
        sequence: the whole batch as all ranks see it.
        group: the registered name of the group that shares it.
        rank: this rank in the group.
        options: the resolved options of the run.
        unpadded_length: tokens of a row before padding; predictions are trimmed to it.
        examples: boundaries of the examples inside one flattened row; None: every row is one example; empty: unknown.
        fingerprint: a hash of the unsharded tokens and labels, equal on all ranks that share the sequence.
    """

    sequence: ShardedSequence
    group: str
    rank: int
    options: RingOptions
    unpadded_length: int
    examples: tuple[int, ...] | None
    fingerprint: str

    @property
    def shard_length(self) -> int:
        """Tokens of a row on this rank."""
        return self.sequence.shard_length


@dataclass(frozen=True)
class InvalidBatch:
    """A batch that this rank refuses. It travels to the model, where all ranks learn of it before any exchange."""

    message: str
