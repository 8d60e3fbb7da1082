"""The communication stream of a device, and the events that order it against the compute stream.

A CUDA stream runs its operations in order; two streams are unordered unless one waits for an event of the other. NCCL
makes an exchange wait for everything on the stream that is current when it is posted, and `Work.wait()` makes the
stream wait that is current at that time. So exchanges are posted and waited for on a side stream, which itself waits
for *events*: the points where the block to send was written and where the buffer to receive into was last used. The
compute stream waits for an event of the side stream just before the first tile that reads the received block.

On a CPU an operation is complete when its call returns: the same calls, and nothing to order. (CUDA's rules: the
documentation of `torch.cuda.Stream` and `torch.distributed.batch_isend_irecv`. Not yet run on a GPU: the order is
proven on a model of streams, `tests/support/cuda_streams.py`.)
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
    """The communication "stream" of a device whose operations are complete when their call returns."""

    def record_event(self) -> Events:
        """Return events that complete when everything queued on the current stream so far is done."""
        return ()

    def wait_events(self, events: Events) -> None:
        """Make the current stream wait for these events, not the host."""

    def on_comm_stream(self, events: Events) -> contextlib.AbstractContextManager[None]:
        """Return a context in which operations go to the communication stream, after these events."""
        return contextlib.nullcontext()

    def wait_works(self, works: Iterable[Work], timeout: timedelta | None = None) -> Events:
        """Make both streams wait for these exchanges, and return events that mark their end.

        With a `timeout` the host waits, too.

        Raises:
            RuntimeError: if the exchanges do not end in that time.
        """
        for work in works:
            work.wait(*(() if timeout is None else (timeout,)))
        return ()

    def record_stream(self, x: torch.Tensor) -> None:
        """Keep the memory of `x`, if it is freed early, until the communication stream is done with its queue."""


class CudaCommStream(CommStream):
    """One communication stream beside whichever stream is current."""

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._cuda, self._device = cuda, device
        self._side = cuda.Stream(device=device)

    def record_event(self) -> Events:
        event = self._cuda.Event()
        event.record(self._cuda.current_stream(self._device))
        return (event,)

    def wait_events(self, events: Events) -> None:
        for event in events:
            self._cuda.current_stream(self._device).wait_event(event)

    @contextlib.contextmanager
    def on_comm_stream(self, events: Events) -> Iterator[None]:
        for event in events:
            self._side.wait_event(event)
        with self._cuda.stream(self._side):
            yield

    def wait_works(self, works: Iterable[Work], timeout: timedelta | None = None) -> Events:
        """The communication stream waits for the works, and the current one for the communication stream.

        One event serves both streams and all later users of the buffers, so that no work is waited for twice.

        Raises:
            RuntimeError: if the device has not reached the event when `timeout` ends.
        """
        with self._cuda.stream(self._side):
            super().wait_works(works)  # without a timeout: on a GPU this only orders streams
            events = self.record_event()
        self.wait_events(events)
        deadline = None if timeout is None else time.monotonic() + timeout.total_seconds()
        while deadline is not None and not all(event.query() for event in events):
            if time.monotonic() > deadline:
                raise RuntimeError("timed out on the device")
            time.sleep(0.001)
        return events

    def record_stream(self, x: torch.Tensor) -> None:
        """Needed by passes that end in an error; in all others the compute stream has waited for every exchange."""
        x.record_stream(self._side)


@functools.cache
def comm_stream_of(device: torch.device) -> CommStream:
    """Return the communication stream of a device, one per process."""
    return CudaCommStream(device) if device.type == "cuda" else CommStream()
