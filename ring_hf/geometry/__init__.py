"""Which token lives where, which tokens see each other, and what each rank computes and needs. Integers, no torch.

Start at `ShardedSequence` (a batch as all ranks see it) and `make_plan` (one rank's work, step by step).
"""

from .balance import balanced_owners
from .band import CausalBlock, area, split, trim
from .dependencies import max_hops, needed_kv_ranges, rank_work, visible_kv_ranges
from .heads import HeadChunk, HeadShare, auto_ulysses, check_head_chunks, chunk_heads, head_split, max_head_chunks
from .layout import (
    LAYOUTS,
    Segment,
    check_length,
    length_multiple,
    padded_length,
    segments,
    shard_index,
    unshard_index,
)
from .plan import Move, Plan, Slice, Step, make_plan, sent_tokens
from .sequence import Mask, RowRegions, ShardedSequence
from .spec import TRANSPORTS, AttentionSpec, RingOptions, check_inner_ring, check_transport, divisors, either_of
from .tiles import Tile, make_tiles

__all__ = [
    "LAYOUTS",
    "TRANSPORTS",
    "AttentionSpec",
    "CausalBlock",
    "HeadChunk",
    "HeadShare",
    "Mask",
    "Move",
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
    "check_inner_ring",
    "check_length",
    "check_transport",
    "chunk_heads",
    "divisors",
    "either_of",
    "head_split",
    "length_multiple",
    "make_plan",
    "make_tiles",
    "max_head_chunks",
    "max_hops",
    "needed_kv_ranges",
    "padded_length",
    "rank_work",
    "segments",
    "sent_tokens",
    "shard_index",
    "split",
    "trim",
    "unshard_index",
    "visible_kv_ranges",
]
