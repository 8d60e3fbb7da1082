"""What a batch carries besides its tensors: one small frozen object that describes the whole sequence.

The collator puts it under the key `context_parallel`; Transformers hands model kwargs down to the attention function,
so it arrives there together with this rank's shard of the tokens, also when a checkpointed layer is run again on
another thread. Nothing else carries batch state: no module globals, no thread-locals. Both classes deliberately have
neither a `to` nor a `pin_memory` method, so data loaders, Accelerate and DDP pass them on untouched.
"""

from dataclasses import dataclass

from ring_hf.geometry import ShardedSequence

METADATA_KEY = "context_parallel"
IGNORE_INDEX = -100


@dataclass(frozen=True)
class ContextParallelMetadata:
    """One sharded batch (or a whole one, `sequence.num_ranks == 1`, whose prefixes one process must know).

    `unpadded_length` is the row length that the inner collator produced: predictions are trimmed to it. `examples`
    are the boundaries of the examples inside one flattened row (`None`: every row is one example; empty: unknown).
    `fingerprint` is a hash of the unsharded tokens and labels, equal on all ranks that share a sequence.
    """

    sequence: ShardedSequence
    group: str
    rank: int
    kernel: str
    overlap: bool
    unpadded_length: int
    examples: tuple[int, ...] | None
    fingerprint: str
    transport: str = "auto"
    inner_ring_size: int = 1
    head_chunks: int = 1

    @property
    def shard_length(self) -> int:
        return self.sequence.shard_length


@dataclass(frozen=True)
class InvalidBatch:
    """A batch that this rank had to refuse. It travels to the model, where all ranks learn of it before any
    exchange."""

    message: str
