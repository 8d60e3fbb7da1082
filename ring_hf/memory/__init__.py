"""Fit more, recompute less: levers on the memory of a training step that leave its numbers as they are.

`apply(model, MemoryConfig(...))` before the Trainer saves the result of attention while the rest of each layer is
recomputed, moves what is saved to host memory, computes feed-forward layers over blocks of tokens and takes the loss
over blocks of tokens. Only PyTorch is imported here: what Transformers must bring is asked of the model itself.
"""

from .install import Applied, applied_to, apply
from .options import MemoryConfig

__all__ = ["Applied", "MemoryConfig", "applied_to", "apply"]
