"""State that is shared by everything around a forward pass of this process.

A model does not know which Trainer runs it, and hooks of one model know nothing of another, so this belongs to the
process.
"""

from dataclasses import dataclass, field

import torch

from ..batch_metadata import ContextParallelMetadata
from .loss_monitor import LossMonitor
from .token_reads import TokenReads


@dataclass
class RuntimeState:
    """What hooks, Trainer and trial step read of each other.

    Attributes:
        batch: the sharded batch of the last forward pass in evaluation mode.
        monitor: follows the losses that are trained.
        captured: during a trial step, collects losses in place of backward passes.
        token_reads: during a trial step, notes reads of tokens outside the model.
    """

    batch: ContextParallelMetadata | None = None
    monitor: LossMonitor = field(default_factory=LossMonitor)
    captured: list[torch.Tensor] | None = None
    token_reads: TokenReads | None = None


runtime_state = RuntimeState()
