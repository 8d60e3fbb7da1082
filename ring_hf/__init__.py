"""Exact context parallelism for Hugging Face models: the losses and gradients of one process, each sequence over many.

Importing this package registers the attention backends `ring_contiguous`, `ring_zigzag`, `ring_striped`,
`ring_balanced` and `ulysses` with Transformers. A `Trainer` script needs `ContextParallelConfig` and
`ContextParallelCollator`; code without Transformers starts at `context_attention`; a training loop without `Trainer`
calls `guard_model` on its model. `memory.apply` makes a training step fit more tokens.
"""

from . import memory
from .hf import ContextParallelCallback, ContextParallelCollator, ContextParallelConfig, guard_model
from .parallel import context_attention, shard, unshard

__version__ = "0.1.0"

__all__ = [
    "ContextParallelCallback",
    "ContextParallelCollator",
    "ContextParallelConfig",
    "context_attention",
    "guard_model",
    "memory",
    "shard",
    "unshard",
]
