"""Saved tensors wait in host memory: copied out as the forward pass goes on, fetched back a layer ahead.

As in torchtune's and TRL's `OffloadActivations`, copies run on streams of their own between pinned and device memory;
a tensor stays alive until its copy to the host is done, and the computing stream waits for the copy back before it
reads it. The order is that of layers: recomputing one starts the copies back of all tensors of the layer before it. On
a CPU the same code makes plain copies.

PyTorch's host allocator keeps pinned buffers for the next step and hands one out again only after the copies that were
queued on it, so there is no pool here.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .selective_checkpoint import keep_on_device, refuse_change_in_place

SMALLEST = 2**20  # bytes: a smaller tensor stays; moving it costs more than it gives back
IN_FLIGHT = 2  # layers whose copies out may be under way; the device memory of older ones is given back first


class CopyBackend(Protocol):
    """How tensors are copied between device and host."""

    def to_host(self, x: Tensor) -> tuple[Tensor, Any]:
        """Start a copy to host memory; return it and the event of its completion."""

    def to_device(self, host: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        """Start a copy to the device; return it and the event of its completion."""

    def wait_to_host(self, event: Any) -> None:
        """Have the computing stream wait before the device memory of a copied tensor is used again."""

    def wait_to_device(self, event: Any, x: Tensor) -> None:
        """Have the computing stream wait before it reads a tensor that was copied back."""


class CpuCopies:
    """On a CPU: copies, complete at once."""

    def to_host(self, x: Tensor) -> tuple[Tensor, Any]:
        return x.clone(), None

    def to_device(self, host: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        return host.clone(), None

    def wait_to_host(self, event: Any) -> None: ...

    def wait_to_device(self, event: Any, x: Tensor) -> None: ...


class CudaCopies:
    """Copies on two streams beside the computing one.

    Args:
        cuda: `torch.cuda`, or its stand-in in a test.
        pin: whether host memory is pinned.
    """

    def __init__(self, cuda: Any = torch.cuda, pin: bool = True) -> None:
        self._cuda, self._pin = cuda, pin
        self._to_host_stream = cuda.Stream()
        self._to_device_stream = cuda.Stream()

    def to_host(self, x: Tensor) -> tuple[Tensor, Any]:
        self._to_host_stream.wait_stream(self._cuda.current_stream())  # until it has been computed
        with self._cuda.stream(self._to_host_stream):
            host = torch.empty_like(x, device="cpu", pin_memory=self._pin)
            host.copy_(x, non_blocking=True)
            event = self._to_host_stream.record_event()
        return host, event

    def to_device(self, host: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        self._to_device_stream.wait_stream(self._to_host_stream)
        with self._cuda.stream(self._to_device_stream):
            x = torch.empty_like(host, device=device, pin_memory=False)
            x.copy_(host, non_blocking=True)
            event = self._to_device_stream.record_event()
        return x, event

    def wait_to_host(self, event: Any) -> None:
        self._cuda.current_stream().wait_event(event)

    def wait_to_device(self, event: Any, x: Tensor) -> None:
        stream = self._cuda.current_stream()
        stream.wait_event(event)
        x.record_stream(stream)  # allocated on the other stream: its memory must not be reused before this one is done


class OffloadedTensor:
    """A tensor in host memory. Calling it returns the tensor on its device."""

    def __init__(self, session: "OffloadSession", x: Tensor) -> None:
        self._session, self._device = session, x.device
        self.layer = session.layer
        self._source: Tensor | None = x
        self._version = x._version
        self._host, self._host_event = session.copies.to_host(x)
        self._fetched: tuple[Tensor, Any] | None = None

    def release(self) -> None:
        """Give back the device memory of the original, once its copy is complete."""
        if self._source is not None:
            refuse_change_in_place(self._source, self._version)  # while it was copied, or before
            self._session.copies.wait_to_host(self._host_event)
            self._source = None

    def fetch(self) -> None:
        """Start the copy back."""
        if self._fetched is None:
            self.release()
            self._fetched = self._session.copies.to_device(self._host, self._device)

    def __call__(self) -> Tensor:
        """Return the tensor, and start the copies back of the layer before its own."""
        self.fetch()
        for other in self._session.tensors.get(self.layer - 1, ()):
            other.fetch()
        assert self._fetched is not None
        x, event = self._fetched
        self._fetched = None  # the caller owns it now
        self._session.copies.wait_to_device(event, x)
        return x


class OffloadSession:
    """All tensors that are offloaded in one forward pass, by layer."""

    def __init__(self, copies: CopyBackend) -> None:
        self.copies, self.layer = copies, -1
        # Weak, so that an offloaded tensor is freed with the graph that would read it.
        self.tensors: dict[int, weakref.WeakSet[OffloadedTensor]] = defaultdict(weakref.WeakSet)

    def next_layer(self) -> None:
        """Begin a layer; give back the device memory of the layer `IN_FLIGHT` before it."""
        self.layer += 1
        for offloaded in self.tensors.get(self.layer - IN_FLIGHT, ()):
            offloaded.release()

    def keep(self, x: Tensor) -> Callable[[], Tensor]:
        """Offload a tensor, unless it is small, a parameter or not floating-point; return a function that returns it.

        Raises:
            ValueError: (the returned function) if the tensor was changed in place.
        """
        if x.nbytes < SMALLEST or isinstance(x, torch.nn.Parameter) or not x.is_floating_point():
            return keep_on_device(x)
        offloaded = OffloadedTensor(self, x)
        self.tensors[self.layer].add(offloaded)
        return offloaded


def copy_backend_of(device: torch.device) -> CopyBackend:
    """Return new copy streams for a CUDA device, and plain copies for others."""
    return CudaCopies() if device.type == "cuda" else CpuCopies()
