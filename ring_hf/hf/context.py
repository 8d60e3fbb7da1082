"""The context-parallel part of this process: how many ranks share a sequence, and which of them this one is.

Set by `ContextParallelConfig` when Accelerate has started the processes, read by the collator (which cannot know its
rank when the script builds it), by the guard and by evaluation. It describes the process, never a batch. `None` means
that every sequence is whole here: one process, or `context_parallel_size=1`. A process that nobody configured has
`None`, too, but `is_configured` is False: a ring backend that trains in several of those is a mistake.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


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
    head_chunks: int = 1
    transport: str = "auto"
    ranks_per_node: int = 1
    verify: bool = False  # take a trial step also where everything is proven by name
    engine: str = "DDP"  # a name from `ring_hf.hf.trainer.engines.ENGINES`


_active: ProcessContext | None = None
_configured = False


def activate(context: ProcessContext | None) -> None:
    """Make `context` the one of this process; `None` says that whole sequences are meant."""
    global _active, _configured
    _active, _configured = context, True


def reset() -> None:
    """Go back to a process that nobody configured."""
    global _active, _configured
    _active, _configured = None, False


@contextmanager
def whole_sequences() -> Iterator[None]:
    """Within, this process computes as one that holds whole sequences."""
    active, configured = _active, _configured
    activate(None)
    try:
        yield
    finally:
        if configured:
            activate(active)
        else:
            reset()


def current() -> ProcessContext | None:
    return _active


def is_configured() -> bool:
    """Return whether a `ContextParallelConfig` said how sequences are shared, be it by one rank each."""
    return _configured
