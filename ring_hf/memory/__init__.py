"""Fit more, recompute less: options for the memory of a training step that leave its numbers unchanged.

`apply(model, MemoryConfig(...))` before the Trainer saves the result of attention while the rest of each layer is
recomputed, moves saved tensors to host memory, computes feed-forward layers over blocks of tokens and takes the loss
over blocks of tokens. `declare_mlp` proves a feed-forward class of your own, which `apply` does not know. Only PyTorch
is imported here; Transformers is reached through the model.
"""

from .install import Applied, applied_to, apply, declare_mlp, sharding_error
from .options import MemoryConfig

__all__ = ["Applied", "MemoryConfig", "applied_to", "apply", "declare_mlp", "sharding_error"]
