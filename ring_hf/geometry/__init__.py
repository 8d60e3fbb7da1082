"""Which token lives where, who sees whom, and what each rank therefore computes and needs. Pure integers, no torch.

Start at `WholeSequence` (a batch as all ranks see it) and `make_plan` (one rank's work, step by step).
"""

from .band import Piece, area, split, trim
from .layout import (
    LAYOUTS,
    Segment,
    check_length,
    multiple,
    num_chunks,
    owners,
    padded_length,
    segments,
    shard_index,
    unshard_index,
)
from .plan import Plan, Step, Tile, make_plan, rank_work, tiles
from .sequence import Mask, WholeSequence

__all__ = [
    "LAYOUTS",
    "Mask",
    "Piece",
    "Plan",
    "Segment",
    "Step",
    "Tile",
    "WholeSequence",
    "area",
    "check_length",
    "make_plan",
    "multiple",
    "num_chunks",
    "owners",
    "padded_length",
    "rank_work",
    "segments",
    "shard_index",
    "split",
    "tiles",
    "trim",
    "unshard_index",
]
