"""Everything that talks to other processes: groups, transports, the schedule, Ulysses, and the operator on top.

Start at `ring_attention`; `assert_equal_across_ranks` is how all ranks raise the same error.
"""

from .consensus import assert_equal_across_ranks, gather_numbers, num_processes, share_reason
from .decoding import CachedKeys, attend_to_cache, decode_attention, history_attention
from .functional import context_attention
from .group_warm_up import warm_up
from .groups import (
    all_gather,
    all_reduce,
    broadcast,
    broadcast_object,
    end_groups,
    forget_group,
    group_of,
    rank_in,
    register_group,
)
from .liveness import LivenessWatch, watch_ranks
from .sharded_attention import check_tensors, local_attention, ring_attention
from .sharding import cut, join, shard, unshard

__all__ = [
    "CachedKeys",
    "LivenessWatch",
    "all_gather",
    "all_reduce",
    "assert_equal_across_ranks",
    "attend_to_cache",
    "broadcast",
    "broadcast_object",
    "check_tensors",
    "context_attention",
    "cut",
    "decode_attention",
    "end_groups",
    "forget_group",
    "gather_numbers",
    "group_of",
    "history_attention",
    "join",
    "local_attention",
    "num_processes",
    "rank_in",
    "register_group",
    "ring_attention",
    "shard",
    "share_reason",
    "unshard",
    "warm_up",
    "watch_ranks",
]
