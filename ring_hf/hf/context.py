"""The context-parallel part of this process: how many ranks share a sequence, and which of them this one is.

Set by `ContextParallelConfig` when Accelerate has started the processes, read by the collator (which cannot know its
rank when the script builds it), by the guard and by evaluation. It describes the process, never a batch. `None` means
that every sequence is whole here: one process, or `context_parallel_size=1`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .evaluation import Evaluator


@dataclass(frozen=True)
class ProcessContext:
    """Plain numbers and group names, so that it can be pickled into data loader workers."""

    size: int  # ranks that share one sequence
    rank: int  # this rank among them
    num_replicas: int  # data-parallel groups
    replica: int  # this rank's group
    group: str  # the ranks that share this sequence
    replica_group: str | None  # the same shard of every replica; None when there is one replica
    kernel: str = "auto"
    overlap: bool = True
    ulysses_size: int | str | None = None  # as in the config: "auto" and None are resolved with the model
    inner_ring_size: int = 1
    transport: str = "auto"
    ranks_per_node: int = 1


_active: ProcessContext | None = None
_evaluator: "Evaluator | None" = None


def activate(context: ProcessContext | None, evaluator: "Evaluator | None" = None) -> None:
    """Make `context` the one of this process; `None` goes back to whole sequences."""
    global _active, _evaluator
    _active, _evaluator = context, evaluator


def current() -> ProcessContext | None:
    return _active


def current_evaluator() -> "Evaluator | None":
    return _evaluator
