"""Attention on tiles: `(out, lse)` forward, and backward from the global `out` and `lse`; no communication.

`Kernel` is the contract, `choose` picks a kernel by name, and the accumulators merge the results of tiles.
"""

from .indexing import GatherIndex, StridedWindows, TokenIndex
from .kernel import Kernel
from .merge import GradAccumulator, OutLseAccumulator, accumulate_dtype, merge_
from .selection import FAMILIES, KERNELS, candidates, check_name, choose

__all__ = [
    "FAMILIES",
    "KERNELS",
    "GatherIndex",
    "GradAccumulator",
    "Kernel",
    "OutLseAccumulator",
    "StridedWindows",
    "TokenIndex",
    "accumulate_dtype",
    "candidates",
    "check_name",
    "choose",
    "merge_",
]
