"""Offloaded tensors: exact, in the right order, and none is read or reused before its copy is done.

`FakeCuda` stands in for `torch.cuda`: a copy is made when a stream waits for it, the latest moment that the waits
allow. An earlier read returns the NaN of an empty buffer.
"""

import contextlib
import gc
import weakref
from collections import Counter
from unittest import mock

import pytest
import torch

from ring_hf.memory import apply, offload
from ring_hf.memory.offload import CpuCopies, CudaCopies, OffloadedTensor, OffloadSession, copy_backend_of
from tests.memory.models import batch, model_of, relative_difference, step


class Event:
    def __init__(self, stream, num_operations):
        self.stream, self.num_operations = stream, num_operations


class Stream:
    """A queue of operations that run when another stream waits for them."""

    def __init__(self, name):
        self.name, self.operations, self.num_done = name, [], 0

    def run_to(self, num_operations):
        while self.num_done < num_operations:
            self.operations[self.num_done]()
            self.num_done += 1

    def record_event(self):
        return Event(self, len(self.operations))

    def wait_event(self, event):
        self.operations.append(lambda: event.stream.run_to(event.num_operations))
        if self.name == "computing":  # computes at once: all it waits for is done now
            self.run_to(len(self.operations))

    def wait_stream(self, other):
        self.wait_event(other.record_event())


class FakeCuda:
    """`torch.cuda` as `CudaCopies` uses it."""

    def __init__(self):
        self.computing, self.streams, self.log = Stream("computing"), [], []
        self._current = self.computing

    def Stream(self):
        self.streams.append(Stream(("to host", "to device")[len(self.streams)]))
        return self.streams[-1]

    def current_stream(self):
        return self._current

    @contextlib.contextmanager
    def stream(self, stream):
        before, self._current = self._current, stream
        yield
        self._current = before

    def copy(self, target, source, non_blocking=False):
        assert non_blocking and self._current is not self.computing, "a copy on the computing stream"
        stream = self._current
        self.log.append((stream.name, source.numel()))
        stream.operations.append(lambda: target.data.copy_(source))
        return target


@pytest.fixture
def cuda():
    """The stand-in, with `Tensor.copy_` deferred and `record_stream` logged."""
    fake = FakeCuda()
    original = torch.Tensor.copy_

    def copy(target, source, non_blocking=False):
        return fake.copy(target, source, True) if non_blocking else original(target, source)

    def record_stream(x, stream):
        fake.log.append(("recorded", x.numel()))

    with mock.patch.multiple(torch.Tensor, copy_=copy, record_stream=record_stream):
        yield fake


def session_of(cuda, kind=CudaCopies):
    return OffloadSession(kind(cuda, pin=False))


@pytest.fixture(autouse=True)
def _every_tensor_is_offloaded():
    with mock.patch.object(offload, "SMALLEST", 0):
        yield


def test_offloaded_tensors_come_back_whole(cuda):
    session = session_of(cuda)
    session.next_layer()
    x = torch.arange(5.0)
    read = session.keep(x)
    assert cuda.log == [("to host", 5)]
    assert torch.equal(read(), torch.arange(5.0))
    assert cuda.log == [("to host", 5), ("to device", 5), ("recorded", 5)]


def test_device_memory_is_given_back_only_when_the_copy_is_done(cuda):
    session = session_of(cuda)
    session.next_layer()
    x = torch.arange(5.0)
    reference = weakref.ref(x)
    read = session.keep(x)
    del x
    session.next_layer()
    assert reference() is not None and cuda.streams[0].num_done == 0, "the copy has not been made: it must be alive"
    session.next_layer()  # two layers on: the computing stream waits for the copy, and the memory is free
    cuda.streams[0].operations.clear()
    gc.collect()
    assert reference() is None
    assert torch.equal(read(), torch.arange(5.0))


def test_the_layer_before_is_fetched_ahead(cuda):
    session = session_of(cuda)
    reads = []
    for layer in range(3):
        session.next_layer()
        tensors = torch.full((layer + 2,), float(layer)), torch.full((10 + layer,), 1.0)
        reads.append([session.keep(x) for x in tensors])
    cuda.log.clear()

    def fetched():
        return [num_elements for stream, num_elements in cuda.log if stream == "to device"]

    reads[2][0]()
    assert fetched()[0] == 4 and set(fetched()) == {4, 3, 11}
    assert torch.equal(reads[1][0](), torch.full((3,), 1.0))
    assert set(fetched()) >= {2, 10}


class NoWaitToDevice(CudaCopies):
    def wait_to_device(self, event, x):
        pass


class NoWaitToHost(CudaCopies):
    """Copies back from a host buffer that may not be complete yet."""

    def to_device(self, host, device):
        with self._cuda.stream(self._to_device_stream):
            x = torch.empty_like(host)
            x.copy_(host, non_blocking=True)
        return x, self._to_device_stream.record_event()


@pytest.mark.parametrize("kind", [NoWaitToDevice, NoWaitToHost])
def test_a_missing_wait_shows(cuda, kind):
    session = session_of(cuda, kind)
    session.next_layer()
    read = session.keep(torch.arange(1.0, 6.0))
    with mock.patch.object(OffloadedTensor, "release", lambda self: None):
        assert not torch.equal(read(), torch.arange(1.0, 6.0))


def test_a_step_over_the_stand_in_is_exact_and_copies_each_tensor_once(cuda):
    expected = step(model_of("llama", num_hidden_layers=4), batch())
    model = model_of("llama", num_hidden_layers=4)
    apply(model, attention="save", offload="all", ffn_block=7, loss_block=7)
    with mock.patch("ring_hf.memory.layer_checkpointing.copy_backend_of", lambda device: CudaCopies(cuda, pin=False)):
        result = step(model, batch())
    assert relative_difference(result, expected) <= 1e-10
    num_copies = Counter(name for name, _ in cuda.log)
    # Per layer its input and attention's two results; a few more that the decoder keeps. Each comes back once.
    assert num_copies["to host"] == num_copies["to device"] == num_copies["recorded"] >= 4 * 3


def test_copies_on_a_cpu_are_plain():
    assert isinstance(copy_backend_of(torch.device("cpu")), CpuCopies)
    session = OffloadSession(CpuCopies())
    session.next_layer()
    x = torch.arange(5.0)
    read = session.keep(x)
    assert torch.equal(read(), x) and read() is not x
    numbers, weight = torch.arange(5), torch.nn.Parameter(torch.ones(5))
    assert session.keep(numbers)() is numbers and session.keep(weight)() is weight
    with mock.patch.object(offload, "SMALLEST", 21):
        assert session.keep(x)() is x


@pytest.mark.parametrize("smallest", [0, 2**20], ids=["offloaded", "kept"])
def test_a_change_in_place_after_saving_is_refused(smallest):
    session = OffloadSession(CpuCopies())
    session.next_layer()
    x = torch.arange(5.0)
    with mock.patch.object(offload, "SMALLEST", smallest):
        read = session.keep(x)
    x += 1
    with pytest.raises(ValueError, match="was changed in place after it was saved for the backward pass"):
        read()
