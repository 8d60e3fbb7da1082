"""Everything that talks to other processes: groups, transport, the ring schedule, and the operator on top.

Start at `ring_attention`; `agree` is how ranks refuse together.
"""

from .agreement import agree
from .functional import context_attention
from .groups import all_gather, group_of, rank_in, register_group
from .op import check_tensors, local_attention, ring_attention
from .sharding import shard, unshard

__all__ = [
    "agree",
    "all_gather",
    "check_tensors",
    "context_attention",
    "group_of",
    "local_attention",
    "rank_in",
    "register_group",
    "ring_attention",
    "shard",
    "unshard",
]
