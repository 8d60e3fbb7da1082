"""In which order a device does what was queued: the stream that exchanges are posted on, and marks between streams.

A CUDA stream runs its operations in order; two streams are unordered unless one waits for an event of the other. NCCL
makes an exchange wait for everything on the stream that is current when it is posted, and `Work.wait()` makes the
stream wait that is current then. So exchanges are posted and waited for on a side stream, which itself waits for
*marks*: the points where the block to be sent was written and where the buffer to be received into was last used. The
compute stream waits for a mark of the side stream just before the first tile that reads what came.

On a CPU operations happen when they are called: the same calls, and nothing to order. (Rules of CUDA's streams: the
documentation of `torch.cuda.Stream` and `torch.distributed.batch_isend_irecv`. Not yet run on a GPU: the order is
proven on a model of streams, `tests/streams.py`.)
"""

import contextlib
import functools
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import Work

Events = tuple[Any, ...]  # events of streams; empty where there is nothing to wait for


class CommStream:
    """A device whose operations are done when their call returns."""

    def mark(self) -> Events:
        """What the current stream was given so far."""
        return ()

    def wait(self, marks: Events) -> None:
        """Whatever the current stream is given next happens after these marks."""

    def side(self, marks: Events) -> contextlib.AbstractContextManager[None]:
        """Inside, operations go to the side stream, after these marks."""
        return contextlib.nullcontext()

    def finish(self, works: Iterable[Work], patience: timedelta | None = None) -> Events:
        """Both streams go on after these exchanges; the mark of their end. With `patience` the host waits so long.

        Raises:
            RuntimeError: if they do not end in that time.
        """
        for work in works:
            work.wait(*(() if patience is None else (patience,)))
        return ()

    def share(self, x: torch.Tensor) -> None:
        """Keeps the memory of `x`, should it be freed early, until the side stream has done what it was given."""


class CudaCommStream(CommStream):
    """A device with streams: one side stream beside whichever stream is current."""

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._cuda, self._device = cuda, device
        self._side = cuda.Stream(device=device)

    def mark(self) -> Events:
        """An event on the current stream."""
        event = self._cuda.Event()
        event.record(self._cuda.current_stream(self._device))
        return (event,)

    def wait(self, marks: Events) -> None:
        """The current stream waits, not the host."""
        for event in marks:
            self._cuda.current_stream(self._device).wait_event(event)

    @contextlib.contextmanager
    def side(self, marks: Events) -> Iterator[None]:
        """The side stream is current inside."""
        for event in marks:
            self._side.wait_event(event)
        with self._cuda.stream(self._side):
            yield

    def finish(self, works: Iterable[Work], patience: timedelta | None = None) -> Events:
        """The side stream waits for the works, the current one for the side stream: one event serves both and all
        that use the buffers later, so that no work is waited for twice."""
        with self._cuda.stream(self._side):
            super().finish(works)  # without patience: on a GPU this only orders streams
            marks = self.mark()
        self.wait(marks)
        deadline = None if patience is None else time.monotonic() + patience.total_seconds()
        while deadline is not None and not all(event.query() for event in marks):
            if time.monotonic() > deadline:
                raise RuntimeError("timed out on the device")
            time.sleep(0.001)
        return marks

    def share(self, x: torch.Tensor) -> None:
        """For passes that end in an error: in all others the compute stream has waited for every exchange."""
        x.record_stream(self._side)


@functools.cache
def comm_stream_of(device: torch.device) -> CommStream:
    """The lane of a device, one per process."""
    return CudaCommStream(device) if device.type == "cuda" else CommStream()
