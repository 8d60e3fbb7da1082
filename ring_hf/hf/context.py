"""The context-parallel part of this process: how many ranks share a sequence, and which of them this one is.

`ContextParallelConfig` sets it when Accelerate has started the processes; the collator (which cannot know its rank
when the script builds it), the guard and evaluation read it. It describes the process, never a batch. `None` means
that this process holds whole sequences: one process, or `context_parallel_size=1`. A process without a config has
`None` as well, but `is_configured` is False: a ring backend that trains in several of those processes is a mistake.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ring_hf.geometry import RingOptions


@dataclass(frozen=True)
class ProcessContext:
    """Plain values, so that data loader workers can unpickle it."""

    size: int  # ranks that share one sequence
    rank: int  # this rank among them
    num_replicas: int  # data-parallel groups
    replica: int  # this rank's group
    group: str  # the ranks that share this sequence
    replica_group: str | None  # the same shard of every replica; None when there is one replica
    options: RingOptions = RingOptions()  # noqa: RUF009 (frozen); as in the config, `degrees` resolves them
    ranks_per_node: int = 1
    verify: bool = False  # take a trial step also where everything is proven by name
    engine: str = "DDP"  # a name from `ring_hf.hf.trainer.engines.ENGINES`


_active: ProcessContext | None = None
_configured = False


def activate(context: ProcessContext | None) -> None:
    """Make `context` the one of this process; `None` means whole sequences."""
    global _active, _configured
    _active, _configured = context, True


def reset() -> None:
    """Forget the context and that there was a config."""
    global _active, _configured
    _active, _configured = None, False


@contextmanager
def whole_sequences() -> Iterator[None]:
    """Inside, this process computes as one that holds whole sequences."""
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
    """Return the context of this process, or None if it holds whole sequences."""
    return _active


def is_configured() -> bool:
    """Return whether there was a `ContextParallelConfig`, even one with `context_parallel_size=1`."""
    return _configured
