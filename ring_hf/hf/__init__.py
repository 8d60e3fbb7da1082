"""The Hugging Face side: attention backends, parallelism config, collator and callback for an unmodified `Trainer`.

Importing this package registers the attention implementations `ring_contiguous`, `ring_zigzag`, `ring_striped`,
`ring_balanced` and `ulysses`. It is the only part of the project that imports transformers and accelerate.
"""

from .attention.backend import register_backends
from .collate.collator import ContextParallelCollator
from .trainer.callback import ContextParallelCallback
from .trainer.config import ContextParallelConfig
from .trainer.guard import guard_model

__all__ = [
    "ContextParallelCallback",
    "ContextParallelCollator",
    "ContextParallelConfig",
    "guard_model",
    "register_backends",
]

register_backends()
