"""Which token lives where, who sees whom, and what each rank therefore computes and needs. Pure integers, no torch.

Start at `ShardedSequence` (a batch as all ranks see it) and `make_plan` (one rank's work, step by step).
"""

from .balance import balanced_owners
from .band import Piece, area, split, trim
from .dependencies import farthest, needed, rank_work, visible
from .heads import HeadChunk, HeadShare, auto_ulysses, check_head_chunks, chunk_heads, head_split, most_head_chunks
from .layout import (
    LAYOUTS,
    Segment,
    check_length,
    multiple,
    num_chunks,
    padded_length,
    segments,
    shard_index,
    unshard_index,
)
from .plan import Move, Plan, Slice, Step, make_plan, sent_tokens
from .sequence import Mask, RowRegions, ShardedSequence
from .spec import TRANSPORTS, AttentionSpec, RingOptions, check_transport, divisors, either_of
from .tiles import Tile, tiles

__all__ = [
    "LAYOUTS",
    "TRANSPORTS",
    "AttentionSpec",
    "HeadChunk",
    "HeadShare",
    "Mask",
    "Move",
    "Piece",
    "Plan",
    "RingOptions",
    "RowRegions",
    "Segment",
    "ShardedSequence",
    "Slice",
    "Step",
    "Tile",
    "area",
    "auto_ulysses",
    "balanced_owners",
    "check_head_chunks",
    "check_length",
    "check_transport",
    "chunk_heads",
    "divisors",
    "either_of",
    "farthest",
    "head_split",
    "make_plan",
    "most_head_chunks",
    "multiple",
    "needed",
    "num_chunks",
    "padded_length",
    "rank_work",
    "segments",
    "sent_tokens",
    "shard_index",
    "split",
    "tiles",
    "trim",
    "unshard_index",
    "visible",
]
