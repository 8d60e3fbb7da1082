"""Counts the bytes of all tensors that are alive at once, storage by storage, while operators run."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


class LiveTensorTracker(TorchDispatchMode):
    """Counts the bytes of all storages that operators allocate inside this context.

    Args:
        excluded: tensors that exist before; their storages are not counted.

    Attributes:
        now, peak: bytes that are alive now, and the most that were alive at once.
    """

    def __init__(self, *excluded):
        super().__init__()
        self.now = self.peak = 0
        self._storages = {tensor.untyped_storage()._cdata: None for tensor in excluded}

    def _add(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def on_free(_):
            del self._storages[key]
            self.now -= size

        self._storages[key] = weakref.ref(storage, on_free)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        return out


def uncounted(fn):
    """Return `fn` without counting, for fakes of collectives: what they allocate is no buffer of the package."""

    def call(*args, **kwargs):
        with _disable_current_modes():
            return fn(*args, **kwargs)

    return call
