"""Buffers for exchanges, allocated once and used again by later steps, layers and batches.

A buffer is taken for one exchange and given back when the exchange was waited for and the compute that read it was
queued. Its marks (`lanes.py`) say after which points of which streams its bytes may be touched again; whoever takes
it waits for them on the stream that touches it, so a buffer serves several streams and threads in turn.

What lies idle is bounded: at most what the largest of the last `PASSES` passes (a layer's forward or backward) held at
once, so that shapes of earlier batches go, and at most `IDLE_BYTES`: where a pass needs more, memory is scarce and an
allocation costs nothing beside computing with it. Results for the user are never taken from here.
"""

import functools
import math
import threading
import weakref
from collections import deque
from collections.abc import Sequence

import torch

from .streams import CommStream, Events, comm_stream_of

PASSES = 64
IDLE_BYTES = 512 * 2**20


class Buffer:
    """Several tensors in one flat one, so that one message moves them all and their shapes may differ (MLA).

    Attributes:
        flat: what travels.
        parts: views of it, one after the other.
        marks: what must have happened before a stream may write it, or read what a stream wrote.
    """

    def __init__(self, room: torch.Tensor, shapes: Sequence[Sequence[int]], marks: Events) -> None:
        sizes = [math.prod(shape) for shape in shapes]
        self.room, self.flat, self.marks = room, room[: sum(sizes)], marks
        self.shapes = tuple(map(tuple, shapes))
        self.parts = tuple(x.view(shape) for x, shape in zip(self.flat.split(sizes), self.shapes, strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes of a message."""
        return self.flat.nbytes


class Pool:
    """The buffers of one device: idle ones, the least recently used first, and how much was lent out at once."""

    def __init__(self, device: torch.device, lane: CommStream) -> None:
        self._device, self._lane = device, lane
        self._lock = threading.Lock()
        self._idle: list[tuple[torch.Tensor, Events]] = []
        self._lent: weakref.WeakSet[Buffer] = weakref.WeakSet()  # one that an error left behind is not missed
        self._most = 0
        self._needs: deque[int] = deque(maxlen=PASSES)

    @property
    def idle_bytes(self) -> int:
        """Bytes that wait to be used again."""
        return sum(room.nbytes for room, _ in self._idle)

    def take(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> Buffer:
        """Room for tensors of these shapes. Wait for its marks before touching it."""
        size = sum(map(math.prod, shapes))
        with self._lock:
            fitting = [n for n, (room, _) in enumerate(self._idle) if room.dtype == dtype and _fits(room, size)]
            found = self._idle.pop(min(fitting, key=lambda n: self._idle[n][0].numel())) if fitting else None
        if found is None:
            room = torch.empty(size, dtype=dtype, device=self._device)
            self._lane.share(room)
            # Fresh memory may have been another tensor's until here, on the stream that it is allocated for.
            found = room, self._lane.mark()
        buffer = Buffer(found[0], shapes, found[1])
        with self._lock:
            self._lent.add(buffer)
            self._most = max(self._most, sum(lent.room.nbytes for lent in self._lent))
        return buffer

    def give(self, buffer: Buffer) -> None:
        """Takes a buffer back. Its exchanges were waited for, and its marks tell of all else that touched it."""
        with self._lock:
            assert buffer in self._lent, "given back twice"
            self._lent.discard(buffer)
            self._idle.append((buffer.room, buffer.marks))
            if not self._lent:  # a pass ends
                self._needs.append(self._most)
                self._most = 0
            bound = min(IDLE_BYTES, max([self._most, *self._needs]))
            while self.idle_bytes > bound:
                self._idle.pop(0)

    def clear(self) -> None:
        """Frees everything idle."""
        with self._lock:
            self._idle.clear()


def _fits(room: torch.Tensor, size: int) -> bool:
    # Documents change the lengths of fetched blocks with every batch: rooms of a similar size serve.
    return size <= room.numel() <= 2 * size


@functools.cache
def pool_of(device: torch.device) -> Pool:
    """The pool of a device, one per process."""
    return Pool(device, comm_stream_of(device))
