"""The Hugging Face side: attention backends, parallelism config, collator and callback for an unmodified `Trainer`.

It is the only part of the project that imports transformers and accelerate, and does so when a name is first used.
`import ring_hf` registers the attention implementations `ring_contiguous`, `ring_zigzag`, `ring_striped`,
`ring_balanced` and `ulysses`.
"""

from typing import TYPE_CHECKING

from ..exports import export_lazily

__all__ = [
    "ContextParallelCache",
    "ContextParallelCallback",
    "ContextParallelCollator",
    "ContextParallelConfig",
    "count_loss_weights",
    "find_damage",
    "guard_model",
    "last_checkpoint",
    "log_modality_losses",
    "register_backends",
]

if TYPE_CHECKING:
    from .attention.registration import register_backends
    from .collate.collator import ContextParallelCollator
    from .generation.sharded_cache import ContextParallelCache
    from .trainer.callback import ContextParallelCallback
    from .trainer.modality_losses import log_modality_losses
    from .trainer.model_guard import guard_model
    from .trainer.parallelism_config import ContextParallelConfig
    from .trainer.weighted_counts import count_loss_weights
    from .trainer.whole_checkpoints import find_damage, last_checkpoint
else:  # a type checker that saw `__getattr__` would accept any name
    __getattr__, __dir__ = export_lazily(
        __name__,
        {
            "attention.registration": ("register_backends",),
            "collate.collator": ("ContextParallelCollator",),
            "generation.sharded_cache": ("ContextParallelCache",),
            "trainer.callback": ("ContextParallelCallback",),
            "trainer.parallelism_config": ("ContextParallelConfig",),
            "trainer.model_guard": ("guard_model",),
            "trainer.modality_losses": ("log_modality_losses",),
            "trainer.weighted_counts": ("count_loss_weights",),
            "trainer.whole_checkpoints": ("find_damage", "last_checkpoint"),
        },
    )
