"""What the backward pass needs waits in host memory: copied out as the forward pass goes on, fetched a layer ahead.

As in torchtune's and TRL's `OffloadActivations`, copies run on streams of their own between pinned and device memory;
a tensor on its way out stays alive until its copy is done, and one on its way in is claimed by the computing stream.
The order is that of layers: one that is recomputed starts the way home of everything of the layer before it. On a CPU
there is nowhere to go: the same code makes plain copies.

PyTorch's host allocator keeps pinned buffers for the next step and hands one out again only after the copies that were
queued on it, so there is no pool here.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .selective_checkpoint import refuse_change_in_place, resident

SMALLEST = 2**20  # bytes: what is smaller stays; moving it costs more than it gives back
IN_FLIGHT = 2  # layers whose copies out may be under way; the device memory of older ones is given back first


class CopyBackend(Protocol):
    """How tensors travel."""

    def out(self, x: Tensor) -> tuple[Tensor, Any]:
        """A copy in host memory, and what to wait for until it is complete."""

    def home(self, host: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        """A copy on the device, and what to wait for until it is complete."""

    def wait_out(self, event: Any) -> None:
        """Before the memory of what left is used again."""

    def wait_home(self, event: Any, x: Tensor) -> None:
        """Before what came home is read."""


class CpuCopies:
    """On a CPU: copies, complete at once."""

    def out(self, x: Tensor) -> tuple[Tensor, Any]:
        return x.clone(), None

    def home(self, host: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        return host.clone(), None

    def wait_out(self, event: Any) -> None: ...

    def wait_home(self, event: Any, x: Tensor) -> None: ...


class CudaCopies:
    """Two streams beside the computing one; `cuda` is `torch.cuda`, or its stand-in in a test."""

    def __init__(self, cuda: Any = torch.cuda, pin: bool = True) -> None:
        self._cuda, self._pin = cuda, pin
        self._out, self._home = cuda.Stream(), cuda.Stream()

    def out(self, x: Tensor) -> tuple[Tensor, Any]:
        self._out.wait_stream(self._cuda.current_stream())  # until it has been computed
        with self._cuda.stream(self._out):
            host = torch.empty_like(x, device="cpu", pin_memory=self._pin)
            host.copy_(x, non_blocking=True)
            event = self._out.record_event()
        return host, event

    def home(self, host: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        self._home.wait_stream(self._out)
        with self._cuda.stream(self._home):
            x = torch.empty_like(host, device=device, pin_memory=False)
            x.copy_(host, non_blocking=True)
            event = self._home.record_event()
        return x, event

    def wait_out(self, event: Any) -> None:
        self._cuda.current_stream().wait_event(event)

    def wait_home(self, event: Any, x: Tensor) -> None:
        stream = self._cuda.current_stream()
        stream.wait_event(event)
        x.record_stream(stream)  # it was allocated on the other one: not to be given away before this one is done


class OffloadedTensor:
    """One tensor on its way."""

    def __init__(self, trip: "OffloadSession", x: Tensor) -> None:
        self._trip, self._device = trip, x.device
        self.layer = trip.layer
        self._leaving: Tensor | None = x
        self._version = x._version
        self._host, self._left = trip.road.out(x)
        self._came: tuple[Tensor, Any] | None = None

    def release(self) -> None:
        """Give back the device memory of what left."""
        if self._leaving is not None:
            refuse_change_in_place(self._leaving, self._version)  # while it was copied, or before
            self._trip.road.wait_out(self._left)
            self._leaving = None

    def fetch(self) -> None:
        """Start the way home."""
        if self._came is None:
            self.release()
            self._came = self._trip.road.home(self._host, self._device)

    def __call__(self) -> Tensor:
        """The tensor, back; and what the layer before it needs starts now."""
        self.fetch()
        for other in self._trip.parcels.get(self.layer - 1, ()):
            other.fetch()
        assert self._came is not None
        x, event = self._came
        self._came = None  # who asked owns it now
        self._trip.road.wait_home(event, x)
        return x


class OffloadSession:
    """Everything that leaves in one forward pass, by layer."""

    def __init__(self, road: CopyBackend) -> None:
        self.road, self.layer = road, -1
        # Weak, so that what left goes with the graph that would bring it back.
        self.parcels: dict[int, weakref.WeakSet[OffloadedTensor]] = defaultdict(weakref.WeakSet)

    def next_layer(self) -> None:
        self.layer += 1
        for parcel in self.parcels.get(self.layer - IN_FLIGHT, ()):
            parcel.release()

    def keep(self, x: Tensor) -> Callable[[], Tensor]:
        """What brings the tensor back."""
        if x.nbytes < SMALLEST or isinstance(x, torch.nn.Parameter) or not x.is_floating_point():
            return resident(x)
        parcel = OffloadedTensor(self, x)
        self.parcels[self.layer].add(parcel)
        return parcel


def copy_backend_of(device: torch.device) -> CopyBackend:
    return CudaCopies() if device.type == "cuda" else CpuCopies()
