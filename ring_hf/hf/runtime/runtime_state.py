"""State of this process that everything around a forward pass shares.

It belongs to the process because a model does not know which Trainer runs it, and the hooks of one model know nothing
of another model.
"""

from dataclasses import dataclass, field

import torch

from ..batch_metadata import ContextParallelMetadata
from .loss_monitor import LossMonitor
from .token_reads import TokenReadRecorder


@dataclass
class RuntimeState:
    """State through which model hooks, Trainer hooks and the trial step communicate.

    Attributes:
        evaluation_batch: the sharded batch of the last forward pass in evaluation mode.
        loss_monitor: compares the losses that are trained with those of the model.
        captured_losses: during a trial step, collects losses instead of running backward passes.
        token_reads: during a trial step, records reads of tokens outside of the model.
    """

    evaluation_batch: ContextParallelMetadata | None = None
    loss_monitor: LossMonitor = field(default_factory=LossMonitor)
    captured_losses: list[torch.Tensor] | None = None
    token_reads: TokenReadRecorder | None = None


runtime_state = RuntimeState()
