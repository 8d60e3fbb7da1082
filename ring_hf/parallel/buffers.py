"""Buffers for exchanges, allocated once and reused by later steps, layers and batches.

A buffer is acquired for one exchange and released when the exchange was waited for and the compute that reads it is
queued. Its events (`streams.py`) say after which points of which streams its bytes may be touched again. Whoever
acquires it waits for them on the stream that touches it, so one buffer serves several streams and threads in turn.

Idle memory is bounded by the peak of the last `NUM_RECENT_PASSES` passes (a layer's forward or backward), so that the
shapes of earlier batches go, and by `MAX_IDLE_BYTES`: a pass that needs more runs where memory is scarce, and there an
allocation costs nothing compared with the compute. Results for the user never come from here.
"""

import functools
import math
import threading
import weakref
from collections import deque
from collections.abc import Sequence

import torch

from .streams import CommStream, Events, comm_stream_of

NUM_RECENT_PASSES = 64
MAX_IDLE_BYTES = 512 * 2**20


class Buffer:
    """Several tensors in one flat tensor, so that one message moves all of them and their shapes may differ (MLA).

    Attributes:
        storage: `[n]`, the memory, at least as large as `flat`.
        flat: `[m]`, the message: a view of the beginning of `storage`.
        parts: views of `flat` in the given shapes, one after the other.
        events: must have happened before a stream may write the buffer, or read what another stream wrote.
    """

    def __init__(self, storage: torch.Tensor, shapes: Sequence[Sequence[int]], events: Events) -> None:
        sizes = [math.prod(shape) for shape in shapes]
        self.storage, self.flat, self.events = storage, storage[: sum(sizes)], events
        self.shapes = tuple(map(tuple, shapes))
        self.parts = tuple(x.view(shape) for x, shape in zip(self.flat.split(sizes), self.shapes, strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes of the message."""
        return self.flat.nbytes


class Pool:
    """The buffers of one device: the idle ones, least recently used first, and the peak of those in use."""

    def __init__(self, device: torch.device, stream: CommStream) -> None:
        self._device, self._stream = device, stream
        self._lock = threading.Lock()
        self._idle: list[tuple[torch.Tensor, Events]] = []
        self._in_use: weakref.WeakSet[Buffer] = weakref.WeakSet()  # an error may drop a buffer without a release
        self._peak = 0
        self._recent_peaks: deque[int] = deque(maxlen=NUM_RECENT_PASSES)

    @property
    def idle_bytes(self) -> int:
        """Bytes of buffers that nobody uses at the moment."""
        return sum(storage.nbytes for storage, _ in self._idle)

    def acquire(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> Buffer:
        """Return a buffer for tensors of these shapes. Wait for its events before touching it."""
        size = sum(map(math.prod, shapes))
        with self._lock:
            usable = [
                index
                for index, (storage, _) in enumerate(self._idle)
                if storage.dtype == dtype and _is_usable(storage, size)
            ]
            smallest = min(usable, key=lambda index: self._idle[index][0].numel(), default=None)
            storage, events = (None, ()) if smallest is None else self._idle.pop(smallest)
        if storage is None:
            storage = torch.empty(size, dtype=dtype, device=self._device)
            self._stream.record_stream(storage)
            # Until here, fresh memory may have belonged to another tensor on the stream it was allocated on.
            events = self._stream.record_event()
        buffer = Buffer(storage, shapes, events)
        with self._lock:
            self._in_use.add(buffer)
            self._peak = max(self._peak, sum(other.storage.nbytes for other in self._in_use))
        return buffer

    def release(self, buffer: Buffer) -> None:
        """Take a buffer back. Its exchanges were waited for, and its events cover every other use."""
        with self._lock:
            assert buffer in self._in_use, "released twice"
            self._in_use.discard(buffer)
            self._idle.append((buffer.storage, buffer.events))
            if not self._in_use:  # a pass ends
                self._recent_peaks.append(self._peak)
                self._peak = 0
            bound = min(MAX_IDLE_BYTES, max([self._peak, *self._recent_peaks]))
            while self.idle_bytes > bound:
                self._idle.pop(0)

    def clear(self) -> None:
        """Free all idle buffers."""
        with self._lock:
            self._idle.clear()


def _is_usable(storage: torch.Tensor, size: int) -> bool:
    # Documents change the lengths of fetched blocks with every batch: storages of a similar size serve.
    return size <= storage.numel() <= 2 * size


@functools.cache
def pool_of(device: torch.device) -> Pool:
    """Return the pool of a device, one per process."""
    return Pool(device, comm_stream_of(device))
