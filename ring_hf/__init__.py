"""Exact context parallelism for Hugging Face models: the losses and gradients of one process, each sequence over many.

Importing this package registers the attention backends `ring_contiguous`, `ring_zigzag`, `ring_striped`,
`ring_balanced` and `ulysses` with Transformers. A `Trainer` script needs `ContextParallelConfig` and
`ContextParallelCollator`; code without Transformers starts at `context_attention`; a training loop without `Trainer`
calls `guard_model` on its model. `memory.apply` makes a training step fit more tokens.
"""

from typing import TYPE_CHECKING

from .exports import export_lazily
from .hf.attention.registration import register_backends
from .version import __version__ as __version__

__all__ = [
    "ContextParallelCache",
    "ContextParallelCallback",
    "ContextParallelCollator",
    "ContextParallelConfig",
    "context_attention",
    "count_loss_weights",
    "geometry",
    "guard_model",
    "hf",
    "kernels",
    "log_modality_losses",
    "memory",
    "parallel",
    "shard",
    "unshard",
]

if TYPE_CHECKING:
    from . import geometry, hf, kernels, memory, parallel
    from .hf import (
        ContextParallelCache,
        ContextParallelCallback,
        ContextParallelCollator,
        ContextParallelConfig,
        count_loss_weights,
        guard_model,
        log_modality_losses,
    )
    from .parallel import context_attention, shard, unshard
else:  # a type checker that saw `__getattr__` would accept any name
    __getattr__, __dir__ = export_lazily(
        __name__,
        {
            "geometry": (),
            "hf": (
                "ContextParallelCache",
                "ContextParallelCallback",
                "ContextParallelCollator",
                "ContextParallelConfig",
                "count_loss_weights",
                "guard_model",
                "log_modality_losses",
            ),
            "kernels": (),
            "memory": (),
            "parallel": ("context_attention", "shard", "unshard"),
        },
    )

register_backends()
