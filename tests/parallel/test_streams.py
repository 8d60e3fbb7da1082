"""Exchanges on streams, proven on a model of CUDA's (`tests/support/cuda_streams.py`): exact under every schedule,
nothing read before it is written or written while it is read, exchanges beside compute, no deadlock beside other
collectives; and each wait, event and hold is needed."""

import contextlib
import functools
import gc
from datetime import timedelta
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from ring_hf.geometry import AttentionSpec, make_plan
from ring_hf.kernels import reference
from ring_hf.parallel import buffers, streams, transport
from ring_hf.parallel.schedule import ring_backward, ring_forward, transport_of
from ring_hf.parallel.streams import CudaCommStream
from ring_hf.testing import dense_attention, dense_mask, forward_backward
from tests.parallel.cases import Case, problem, shards
from tests.support import cuda_streams
from tests.support.replay import Replay, policies

SMALL = {"units": 1, "rows": 1, "heads": 2, "kv_heads": 1, "kernel": "reference"}
CASES = {
    "ring": Case("zigzag", 4, **SMALL),
    "ring of two": Case("contiguous", 2, **SMALL),
    "double ring": Case("zigzag", 4, transport="double_ring", inner=2, **SMALL),
    "double ring of six": Case("striped", 6, transport="double_ring", inner=3, causal=False, **SMALL),
    "direct": Case("zigzag", 4, transport="direct", **SMALL),
    "direct, some have nothing to send": Case("contiguous", 4, transport="direct", **SMALL),
    "direct, window": Case("contiguous", 4, transport="direct", window=2, **SMALL),
    "allgather": Case("zigzag", 3, transport="allgather", **SMALL),
    "ring without overlap": Case("zigzag", 3, overlap=False, **SMALL),
}
LAYERS = 2


def _kernel(layer: int) -> SimpleNamespace:
    """The reference kernel, whose operations say which step of which pass they belong to."""

    def named(name, function):
        steps = iter(range(100))

        def call(*args):
            machine, step = cuda_streams.machine(), next(steps)
            results = function(*args)
            while True:
                machine.label = f"compute {name} {layer} {step}"
                result = next(results, None)
                if result is None:
                    machine.label = ""
                    return
                yield result

        return call

    return SimpleNamespace(forward=named("forward", reference.forward), backward=named("backward", reference.backward))


@functools.cache
def _inputs(case: Case, layer: int) -> list[torch.Tensor]:
    return [x * (layer + 1) for x in problem(case, 4)]


def attention(rank: int, case: Case, collectives: bool = False) -> list[tuple[torch.Tensor, ...]]:
    """The passes of two layers on one rank, as a training step runs them: forward, forward, backward, backward.

    With `collectives`, those of a sharded model go on beside them on a group of their own: the next layer's weights
    are gathered during this one, gradients are reduced while the layer before is differentiated.
    """
    nested = case.transport == "double_ring"
    weights, everyone, coming = torch.ones(6, dtype=torch.float64), cuda_streams.Group(case.num_ranks, "sharded"), []

    def beside() -> None:
        if collectives:
            while coming:
                coming.pop().wait()
            coming.append(cuda_streams.collective("all_reduce")(weights, weights, everyone))

    kept, results = [], []
    for layer in range(LAYERS):
        q, k, v, dout = shards(case, rank, *_inputs(case, layer))
        comm = transport.RingComm(cuda_streams.Group(case.num_ranks), torch.device("cpu"), 1, nested)
        carrier = transport_of(case.transport, comm, case.overlap)
        plan = make_plan(case.sequence, case.mask, rank, case.rows, None, case.transport, case.inner)
        kernel, spec = _kernel(layer), AttentionSpec()
        beside()
        cuda_streams.machine().part = f"forward {layer} "
        out, lse = ring_forward(q, k, v, plan, carrier, kernel, spec)
        kept.append((dout, q, k, v, out, lse, plan, carrier, kernel, spec))
        del q, k, v, dout, out, lse
    for layer in reversed(range(LAYERS)):
        saved = kept.pop()
        beside()
        cuda_streams.machine().part = f"backward {layer} "
        grads = ring_backward(*saved)
        results.insert(0, (saved[4], saved[5], *grads))
    beside()
    return results


def _record(case: Case, collectives: bool = False, **settings):
    """Recordings of all ranks and their results; the inputs are made before."""
    for layer in range(LAYERS):
        _inputs(case, layer)
    return cuda_streams.record(case.num_ranks, lambda rank: attention(rank, case, collectives), **settings)


@functools.cache
def _expected(case: Case, layer: int) -> tuple[torch.Tensor, ...]:
    *qkv, dout = _inputs(case, layer)
    visible = dense_mask(case.sequence, case.mask, case.rows)
    dense = functools.partial(dense_attention, visible_BSS=visible, scale=qkv[0].shape[-1] ** -0.5, softcap=None)
    return forward_backward(dense, *qkv, dout=dout)


def worst(case: Case, results: list[list[tuple[torch.Tensor, ...]]]) -> float:
    """The largest difference from dense attention over ranks, layers and tensors; NaN counts as infinite."""
    apart = 0.0
    for rank, layers in enumerate(results):
        for layer, results in enumerate(layers):
            for got, want in zip(results, shards(case, rank, *_expected(case, layer)), strict=True):
                off = torch.where(got == want, 0.0, (got - want).abs()).max().item()
                apart = max(apart, float("inf") if off != off else off)
    return apart


def check(case: Case, collectives: bool = False) -> list[cuda_streams.Machine]:
    machines, _ = _record(case, collectives)
    gc.collect()
    for machine in machines:
        machine.notice_freed()
    return machines


sound = functools.cache(check)  # recordings of sound code are made once


@pytest.mark.parametrize("name", CASES)
def test_every_access_is_ordered_by_streams_and_events(name):
    machines = sound(CASES[name])
    assert cuda_streams.races(machines) == []
    assert all(len(machine.nodes) > 100 for machine in machines)


@pytest.mark.parametrize("name", CASES)
def test_any_schedule_is_exact_and_none_deadlocks(name):
    machines, results = _record(CASES[name], collectives=True, hold=True)
    for serial in (False, True):
        for seed, policy in enumerate(policies(0)):
            Replay(machines, serial).run(policies(seed)[policy])
            assert worst(CASES[name], results) <= 1e-12, (policy, serial)


def _nodes(machine: cuda_streams.Machine, label: str) -> list[cuda_streams.Node]:
    return [node for node in machine.nodes if node.label == label]


def _lost_overlap(name: str, machines: list[cuda_streams.Machine] | None = None) -> list[str]:
    """What waits though it need not, in the second layer, when buffers have been used before.

    Exchange n brings the block of step n and is posted before the compute of step n - 1.
    """
    case, lost = CASES[name], []
    for machine in machines or check(case):
        for part in ("forward 1", "backward 1"):
            steps = [_nodes(machine, f"compute {part} {step}") for step in range(case.num_ranks)]
            hops = _nodes(machine, f"exchange {part} ring tag 1")
            far = _nodes(machine, f"exchange {part} between inner rings tag 1")
            if far:  # a whole turn beside the far exchange
                lost += ["inner hop for far exchange"] * hops[0].follows(far[0])
                lost += [f"compute for far exchange in {part}"] * any(node.follows(far[0]) for node in steps[1])
                continue
            for number, hop in enumerate(hops, 1):
                lost += [f"compute {number - 1} for exchange {number} in {part}"] * any(
                    node.follows(hop) for node in steps[number - 1]
                )
                assert all(node.follows(hop) for node in steps[number])
            # Sent and received without touching what the compute of step 0 reads.
            lost += [f"exchange 2 for compute 0 in {part}" for hop in hops[1:2] if hop.follows(steps[0][-1])]
    return lost


@pytest.mark.parametrize("name", ["ring", "ring of two", "direct", "double ring", "double ring of six"])
def test_exchanges_may_run_beside_compute_that_does_not_need_them(name):
    assert _lost_overlap(name, sound(CASES[name])) == []


def test_without_overlap_every_step_waits_for_its_exchange():
    assert "compute 0 for exchange 1 in forward 1" in _lost_overlap(
        "ring without overlap", sound(CASES["ring without overlap"])
    )


def test_values_travel_while_keys_are_put_in_order():
    for machine in sound(CASES["allgather"]):
        _, values = _nodes(machine, "exchange forward 1 ring all_gather")
        cats = [node for node in _nodes(machine, "aten.cat.out") if node.launch > values.launch]
        keys_in_order, values_in_order = cats[:2]
        assert not keys_in_order.follows(values) and values_in_order.follows(values)
        of_keys, of_values = _nodes(machine, "exchange backward 1 ring reduce_scatter")
        between = [node for node in machine.nodes if of_keys.launch < node.launch < of_values.launch]
        assert between and not any(node.follows(of_keys) for node in between)


def test_collectives_in_another_order_on_one_rank_deadlock_in_the_model():
    case = CASES["ring"]

    def program(rank):
        weights, everyone = torch.ones(4), cuda_streams.Group(case.num_ranks, "sharded")
        comm = transport.RingComm(cuda_streams.Group(case.num_ranks), torch.device("cpu"))
        send, receive = (comm.acquire(((2,),), torch.float32, compute=True) for _ in range(2))
        comm.record_use(send)
        posts = [
            lambda: cuda_streams.collective("all_reduce")(weights, weights, everyone),
            lambda: comm.isend_irecv(send, (rank + 1) % comm.size, receive, (rank - 1) % comm.size, 1),
        ]
        for post in reversed(posts) if rank == 0 else posts:
            post()

    machines, _ = cuda_streams.record(case.num_ranks, program, hold=True)
    with pytest.raises(TimeoutError, match=r"deadlock at .*rank 0: exchange"):
        Replay(machines, serial=True).run(policies(0)["at random"])


def test_results_never_lie_in_a_buffer_of_the_pool():
    for name in ("ring", "direct", "allgather"):
        machines, results = _record(CASES[name])
        for machine, layers in zip(machines, results, strict=True):
            idle = {storage.untyped_storage().data_ptr() for storage, _ in machine.pool._idle}
            assert idle, name
            assert not idle & {x.untyped_storage().data_ptr() for layer in layers for x in layer}, name


class Stop(Exception):
    pass


def stopped(rank: int, case: Case) -> None:
    """A forward pass whose kernel fails in step 1: what is under way is dropped, then memory is asked for again."""
    q, k, v, _ = shards(case, rank, *_inputs(case, 0))
    comm = transport.RingComm(cuda_streams.Group(case.num_ranks), torch.device("cpu"))
    plan = make_plan(case.sequence, case.mask, rank, case.rows, None, case.transport, case.inner)

    def forward(*args):
        raise Stop
        yield

    with pytest.raises(Stop):
        carrier = transport_of(case.transport, comm)
        ring_forward(q, k, v, plan, carrier, SimpleNamespace(forward=forward), AttentionSpec(scale=1.0))
    del q, k, v, comm, carrier, plan
    gc.collect()
    torch.zeros(3)


def races_of_a_failure(case: Case) -> list[str]:
    _inputs(case, 0)
    machines, _ = cuda_streams.record(case.num_ranks, lambda rank: stopped(rank, case), torch_holds=True)
    return cuda_streams.races(machines)


@pytest.mark.parametrize("name", ["ring", "double ring", "direct", "allgather"])
def test_a_pass_that_fails_frees_nothing_that_is_in_use(name):
    assert races_of_a_failure(CASES[name]) == []


def _wait_on_side_only(self, works, timeout=None):
    with self._cuda.stream(self._side):
        streams.CommStream.wait_works(self, works)
        return self.record_event()


def _wait_on_compute_only(self, works, timeout=None):
    return streams.CommStream.wait_works(self, works)


@contextlib.contextmanager
def _side_without_events(self, events):
    with self._cuda.stream(self._side):
        yield


@contextlib.contextmanager
def _side_is_current(self, events):
    self.wait_events(events)
    yield


def _hold_nothing(self, stream, works, send, receive):
    self._stream, self._works, self.send, self.receive = stream, works, None, receive


def _release_without_events(self, buffer, original=buffers.Pool.release):
    buffer.events = ()
    original(self, buffer)


def _fresh_without_events(self, *args):
    with mock.patch.object(self._stream, "record_event", lambda: ()):
        return cuda_streams.ACQUIRE(self, *args)


def _free_when_posted(self, send, *args, original=transport.RingComm.isend_irecv, **more):
    exchange = original(self, send, *args, **more)
    self._pool._idle.append((send.storage, send.events))
    return exchange


def _one_group(self, *args, original=transport.RingComm.__init__):
    original(self, *args)
    groups = cuda_streams.machine().groups
    groups["between inner rings"] = groups.setdefault("ring", cuda_streams.Stream(cuda_streams.machine(), "ring"))


def _races(name: str) -> list[str]:
    return cuda_streams.races(check(CASES[name]))


def _races_of_a_failure(name: str) -> list[str]:
    return races_of_a_failure(CASES[name])


# fault -> (what is broken, by what, the case that shows it, how)
FAULTS = {
    "compute does not wait for a block": (CudaCommStream, "wait_works", _wait_on_side_only, "ring", _races),
    "the next hop does not wait for a block": (
        CudaCommStream,
        "wait_works",
        _wait_on_compute_only,
        "double ring of six",
        _races,
    ),
    "exchanges wait for no event": (CudaCommStream, "on_comm_stream", _side_without_events, "ring", _races),
    "copies to be fetched wait for no event": (
        CudaCommStream,
        "on_comm_stream",
        _side_without_events,
        "direct",
        _races,
    ),
    "gathers wait for no event": (CudaCommStream, "on_comm_stream", _side_without_events, "allgather", _races),
    "compute records no event": (transport.RingComm, "record_use", lambda self, buffer: None, "ring", _races),
    "compute records no event on what it fetched": (
        transport.RingComm,
        "record_use",
        lambda self, buffer: None,
        "direct",
        _races,
    ),
    "buffers come back without events": (buffers.Pool, "release", _release_without_events, "ring", _races),
    "buffers are used again before they have left": (
        transport.RingComm,
        "isend_irecv",
        _free_when_posted,
        "ring",
        _races,
    ),
    "compute acquires buffers without waiting": (
        CudaCommStream,
        "wait_events",
        lambda self, events: None,
        "ring",
        _races,
    ),
    "fresh memory without an event": (buffers.Pool, "acquire", _fresh_without_events, "ring", _races),
    "exchanges do not hold what they send": (transport.PendingExchange, "__init__", _hold_nothing, "ring", _races),
    "no record_stream": (CudaCommStream, "record_stream", lambda self, x: None, "direct", _races_of_a_failure),
    "posted on the compute stream": (CudaCommStream, "on_comm_stream", _side_is_current, "ring", _lost_overlap),
    "fetched on the compute stream": (CudaCommStream, "on_comm_stream", _side_is_current, "direct", _lost_overlap),
    "one group for near and far": (transport.RingComm, "__init__", _one_group, "double ring of six", _lost_overlap),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_wait_event_and_hold_is_needed(fault):
    target, attribute, broken, name, judge = FAULTS[fault]
    with mock.patch.object(target, attribute, broken):
        results = judge(name)
    assert results
    print(f"MUTATION {fault} ({name}): {len(results)} found, such as {results[0]}")


def test_a_missing_wait_also_shows_in_numbers():
    with mock.patch.object(CudaCommStream, "wait_works", _wait_on_side_only):
        machines, results = _record(CASES["ring"], hold=True)
    Replay(machines).run(policies(0)["exchanges late"])
    assert worst(CASES["ring"], results) > 1e-3


def test_a_timeout_ends_on_the_device():
    cuda = mock.MagicMock()
    stream = CudaCommStream(torch.device("cpu"), cuda)
    stream.wait_works([], timedelta(seconds=60))  # a mock's event has happened
    cuda.Event.return_value.query.return_value = False
    with pytest.raises(RuntimeError, match="timed out on the device"):
        stream.wait_works([], timedelta(0))
    assert isinstance(streams.comm_stream_of(torch.device("cpu")), streams.CommStream)
