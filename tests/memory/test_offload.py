"""What waits in host memory: exact, in the right order, and nothing read or reused before its copy is done.

`Cuda` stands in for `torch.cuda`: a copy is made when somebody waits for it, the latest moment that the waits allow.
What is read before is the NaN of an empty buffer.
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
from tests.memory.models import apart, batch, model_of, step


class Event:
    def __init__(self, stream, place):
        self.stream, self.place = stream, place


class Stream:
    """Work that is done when somebody waits for it."""

    def __init__(self, name):
        self.name, self.work, self.done = name, [], 0

    def run_to(self, place):
        while self.done < place:
            self.work[self.done]()
            self.done += 1

    def record_event(self):
        return Event(self, len(self.work))

    def wait_event(self, event):
        self.work.append(lambda: event.stream.run_to(event.place))
        if self.name == "computing":  # computes at once: all it waits for is done now
            self.run_to(len(self.work))

    def wait_stream(self, other):
        self.wait_event(other.record_event())


class Cuda:
    """`torch.cuda` as `CudaCopies` uses it."""

    def __init__(self):
        self.computing, self.streams, self.log = Stream("computing"), [], []
        self._current = self.computing

    def Stream(self):
        self.streams.append(Stream(("out", "home")[len(self.streams)]))
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
        stream.work.append(lambda: target.data.copy_(source))
        return target


@pytest.fixture
def cuda():
    """The stand-in, with `Tensor.copy_` put off and `record_stream` noted."""
    made = Cuda()
    plain = torch.Tensor.copy_

    def copy(target, source, non_blocking=False):
        return made.copy(target, source, True) if non_blocking else plain(target, source)

    noted = mock.patch.object(torch.Tensor, "record_stream", lambda x, stream: made.log.append(("claimed", x.numel())))
    with mock.patch.object(torch.Tensor, "copy_", copy), noted:
        yield made


def trip(cuda, road=CudaCopies):
    return OffloadSession(road(cuda, pin=False))


@pytest.fixture(autouse=True)
def _everything_leaves():
    with mock.patch.object(offload, "SMALLEST", 0):
        yield


def test_what_left_comes_home_whole(cuda):
    away = trip(cuda)
    away.next_layer()
    x = torch.arange(5.0)
    back = away.keep(x)
    assert cuda.log == [("out", 5)]
    assert torch.equal(back(), torch.arange(5.0))
    assert cuda.log == [("out", 5), ("home", 5), ("claimed", 5)]


def test_device_memory_is_given_back_only_when_the_copy_is_done(cuda):
    away = trip(cuda)
    away.next_layer()
    x = torch.arange(5.0)
    gone = weakref.ref(x)
    back = away.keep(x)
    del x
    away.next_layer()
    assert gone() is not None and cuda.streams[0].done == 0, "the copy has not been made: it must be alive"
    away.next_layer()  # two layers on: the computing stream waits for the copy, and the memory is free
    cuda.streams[0].work.clear()
    gc.collect()
    assert gone() is None
    assert torch.equal(back(), torch.arange(5.0))


def test_the_layer_before_is_fetched_ahead(cuda):
    away = trip(cuda)
    backs = []
    for layer in range(3):
        away.next_layer()
        backs.append([away.keep(torch.full((layer + 2,), float(layer))), away.keep(torch.full((10 + layer,), 1.0))])
    cuda.log.clear()
    backs[2][0]()
    assert next(entry for entry in cuda.log if entry[0] == "home") == ("home", 4)
    assert {entry for entry in cuda.log if entry[0] == "home"} == {("home", 4), ("home", 3), ("home", 11)}
    assert torch.equal(backs[1][0](), torch.full((3,), 1.0))
    assert {entry for entry in cuda.log if entry[0] == "home"} >= {("home", 2), ("home", 10)}


class NoWaitHome(CudaCopies):
    def wait_home(self, event, x):
        pass


class NoWaitForCompute(CudaCopies):
    """Copies out what may not have been computed yet."""

    def home(self, host, device):
        with self._cuda.stream(self._home):
            x = torch.empty_like(host)
            x.copy_(host, non_blocking=True)
        return x, self._home.record_event()


@pytest.mark.parametrize("road", [NoWaitHome, NoWaitForCompute])
def test_a_missing_wait_shows(cuda, road):
    away = trip(cuda, road)
    away.next_layer()
    back = away.keep(torch.arange(1.0, 6.0))
    with mock.patch.object(OffloadedTensor, "release", lambda self: None):
        assert not torch.equal(back(), torch.arange(1.0, 6.0))


def test_a_step_over_the_stand_in_is_exact_and_copies_nothing_twice(cuda):
    wanted = step(model_of("llama", num_hidden_layers=4), batch())
    model = model_of("llama", num_hidden_layers=4)
    apply(model, attention="save", offload="all", ffn_block=7, loss_block=7)
    with mock.patch("ring_hf.memory.layer_checkpointing.copy_backend_of", lambda device: CudaCopies(cuda, pin=False)):
        found = step(model, batch())
    assert apart(found, wanted) <= 1e-10
    moved = Counter(name for name, _ in cuda.log)
    # Per layer its input and attention's two results; a few more that the decoder keeps. Each comes home once.
    assert moved["out"] == moved["home"] == moved["claimed"] >= 4 * 3


def test_on_a_cpu_there_are_plain_copies():
    assert isinstance(copy_backend_of(torch.device("cpu")), CpuCopies)
    away = OffloadSession(CpuCopies())
    away.next_layer()
    x = torch.arange(5.0)
    back = away.keep(x)
    assert torch.equal(back(), x) and back() is not x
    numbers, weight = torch.arange(5), torch.nn.Parameter(torch.ones(5))
    assert away.keep(numbers)() is numbers and away.keep(weight)() is weight
    with mock.patch.object(offload, "SMALLEST", 21):
        assert away.keep(x)() is x


@pytest.mark.parametrize("smallest", [0, 2**20], ids=["moved", "kept"])
def test_a_change_in_place_while_it_is_away_is_refused(smallest):
    away = OffloadSession(CpuCopies())
    away.next_layer()
    x = torch.arange(5.0)
    with mock.patch.object(offload, "SMALLEST", smallest):
        back = away.keep(x)
    x += 1
    with pytest.raises(ValueError, match="was changed in place after it was saved for the backward pass"):
        back()
