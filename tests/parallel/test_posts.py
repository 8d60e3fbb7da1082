"""Every rank posts the same exchanges in the same order, however the backward pass comes about; and buffers for them
are allocated once."""

import functools
import threading
from collections import Counter
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ring_hf.parallel import buffers, context_attention, transport, warm_up
from ring_hf.parallel.buffers import Pool
from ring_hf.parallel.streams import CommStream
from ring_hf.parallel.transport import RingComm
from ring_hf.testing import rms_ratio
from tests.parallel.cases import Case, problem, ring_result, shards
from tests.support.harness import run_distributed

OPERATORS = torch.ops.ring_hf.ring_attention.default, torch.ops.ring_hf.chunked_ulysses.default
LAYERS, BATCHES = 2, 2
ALGORITHMS = {
    "ring": Case("zigzag", 4, units=1, rows=1),
    "windowed ring": Case("contiguous", 4, units=1, rows=1, window=4),
    "double ring": Case("zigzag", 4, units=1, rows=1, transport="double_ring", inner=2),
    "direct": Case("contiguous", 4, units=1, rows=1, transport="direct"),
    "allgather": Case("zigzag", 4, units=1, rows=1, transport="allgather"),
    "ulysses in a ring": Case("zigzag", 4, units=1, rows=1, ulysses=2),
    "ulysses in chunks of heads in a ring": Case("zigzag", 4, units=1, rows=1, ulysses=2, head_chunks=2),
}


def _step(case: Case, rank: int, checkpointing: str) -> None:
    """Two layers with weights, two batches whose gradients add up, reduced over all ranks as they come (as DDP)."""
    weights = [torch.nn.Parameter(torch.ones(8, dtype=torch.float64)) for _ in range(LAYERS)]
    for weight in weights:
        weight.register_post_accumulate_grad_hook(lambda x: dist.all_reduce(x.grad))

    def layer(weight, q, k, v):
        settings = {"layout": case.layout, "window": case.window, "transport": case.transport}
        settings |= {"ulysses_size": case.ulysses, "inner_ring_size": case.inner, "head_chunks": case.head_chunks}
        return context_attention(q * weight, k * weight, v, **settings)

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in OPERATORS else CheckpointPolicy.PREFER_RECOMPUTE

    for _ in range(BATCHES):
        q, k, v, dout = shards(case, rank, *problem(case))
        for weight in weights:
            if checkpointing == "none":
                q = layer(weight, q, k, v)
            else:
                contexts = functools.partial(create_selective_checkpoint_contexts, policy)
                more = {"context_fn": contexts} if checkpointing == "selective" else {}
                q = checkpoint(layer, weight, q, k, v, use_reentrant=checkpointing == "reentrant", **more)
        q.backward(dout)


def posts(rank: int, world_size: int, case: Case, checkpointing: str) -> list[tuple]:
    """What one rank posts, in its order: exchanges, both collectives, exchanges of heads, and the other reductions."""
    warm_up(dist.group.WORLD, torch.device("cpu"), case.ulysses, case.inner)
    posted: list[tuple] = []

    def recording(name, original, describe):
        def call(*args, **kwargs):
            posted.append((name, *describe(*args, **kwargs)))
            return original(*args, **kwargs)

        return call

    def hop(comm, send, to, receive, source, tag, inter_node=False):
        inner = case.inner if case.inner > 1 else comm.size

        def ahead(rank, peer):
            return (peer // inner - rank // inner) % (comm.size // inner), (peer - rank) % inner

        return tag, ahead(comm.rank, to), ahead(source, comm.rank), inter_node

    originals = dist.all_to_all_single, dist.all_reduce
    with (
        mock.patch.object(RingComm, "isend_irecv", recording("exchange", RingComm.isend_irecv, hop)),
        mock.patch.object(transport, "_all_gather", recording("gather", transport._all_gather, _sizes)),
        mock.patch.object(transport, "_reduce_scatter", recording("scatter", transport._reduce_scatter, _sizes)),
        mock.patch.object(dist, "all_to_all_single", recording("heads", originals[0], _sizes)),
        mock.patch.object(dist, "all_reduce", recording("weights", originals[1], _sizes)),
    ):
        _step(case, rank, checkpointing)
    return posted


def _sizes(*args, **kwargs) -> list[int]:
    return [x.numel() for x in args if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_all_ranks_post_in_one_order_also_in_recompute_and_accumulation(algorithm):
    counts = {}
    for checkpointing in ("none", "plain", "reentrant", "selective"):
        first, *others = run_distributed(4, posts, ALGORITHMS[algorithm], checkpointing)
        assert first and all(other == first for other in others), (algorithm, checkpointing)
        counts[checkpointing] = Counter(name for name, *_ in first)
    assert all(count["weights"] == LAYERS * BATCHES for count in counts.values())
    kinds = {"exchange", "gather"} & set(counts["none"])
    for kind in kinds:
        # Recomputing exchanges once more; saving the operator does not.
        assert counts["plain"][kind] > counts["selective"][kind] == counts["none"][kind]


def exchanges_of_heads(rank: int, world_size: int) -> tuple[int, int]:
    """All-to-alls of a forward pass without and with lse."""
    case, counts = ALGORITHMS["ulysses in a ring"], []
    q, k, v, _ = shards(case, rank, *problem(case))
    outs = []
    for return_lse in (False, True):
        with mock.patch.object(dist, "all_to_all_single", side_effect=dist.all_to_all_single) as spy:
            results = context_attention(q, k, v, ulysses_size=case.ulysses, return_lse=return_lse)
        outs.append(results[0] if return_lse else results)
        counts.append(spy.call_count)
    assert torch.equal(*outs) and results[1].shape == q.shape[:3]
    return counts[0], counts[1]


def test_heads_are_exchanged_for_lse_only_where_it_is_asked_for():
    assert run_distributed(4, exchanges_of_heads) == [(2, 3)] * 4


def chunks_of_heads(rank: int, world_size: int, case: Case) -> list[tuple[int, int, int, int]]:
    """All-to-alls and elements sent to all ranks, forward and backward, by number of chunks."""
    results = []
    for count in (1, 2, 4, 8):
        q, k, v, dout = (x.requires_grad_() for x in shards(case, rank, *problem(case)))
        with mock.patch.object(dist, "all_to_all_single", side_effect=dist.all_to_all_single) as spy:
            out = context_attention(q, k, v, ulysses_size=case.ulysses, head_chunks=count)
            forward = list(spy.call_args_list)
            out.backward(dout)
        calls = forward, spy.call_args_list[len(forward) :]
        results.append(tuple(f([call.args[1].numel() for call in of_kind]) for of_kind in calls for f in (len, sum)))
    return results


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_chunks_send_each_head_once_and_once_more_for_backward(num_ranks):
    case = Case("zigzag", num_ranks, heads=16, kv_heads=4, ulysses=2)  # eight query heads in two groups a rank
    q, kv = (n * case.rows * (case.length // num_ranks) * 8 for n in (case.heads, 2 * case.kv_heads))
    # There and back: q, k, v and out; backward dout, and dq, dk, dv. Chunks bring q, k, v and out again for that, in
    # an exchange for each of them, but keys and values together and once for each of the two groups.
    want = [(2, 2 * q + kv, 2, 2 * q + kv)]
    want += [(2 * count + 2, 2 * q + kv, 4 * count + 4, 4 * q + 2 * kv) for count in (2, 4, 8)]
    assert run_distributed(num_ranks, chunks_of_heads, case) == [want] * num_ranks


def differences_from_one_chunk(rank: int, world_size: int, case: Case, counts: tuple[int, ...]) -> list[list[float]]:
    of_kind = ring_result(rank, case)
    cut = [ring_result(rank, replace(case, head_chunks=count)) for count in counts]
    return [[rms_ratio(x, y) for x, y in zip(many, of_kind, strict=True)] for many in cut]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_chunks_of_heads_change_no_more_than_rounding(num_ranks, dtype):
    case = Case("zigzag", num_ranks, dtype, heads=16, kv_heads=4, ulysses=2, packed=True, with_sinks=True)
    # Heads are computed as before, but for vector loops that end elsewhere. Groups that are cut round the gradients of
    # their keys and values once per chunk.
    elsewhere, per_chunk = 3e-7, {"float32": 3e-7, "bfloat16": 8e-3}
    for whole, *cut in run_distributed(num_ranks, differences_from_one_chunk, case, (2, 4, 8)):
        print(f"CHUNKS {dtype} {num_ranks}: {whole} {cut}")
        for out, lse, dq, dk, dv, dsinks in (whole, *cut):
            assert max(out, lse, dq) <= elsewhere and max(dk, dv, dsinks) <= per_chunk[dtype]
        assert max(whole[3:5]) <= elsewhere


def allocations(rank: int, world_size: int, case: Case) -> list[tuple[int, int]]:
    """`(buffers taken, buffers allocated)` per layer, forward and backward, of four layers and a longer batch."""
    transport.pool_of(torch.device("cpu")).clear()
    acquired, allocated = 0, 0
    acquire, record_stream = Pool.acquire, CommStream.record_stream

    def count_acquired(self, shapes, dtype):
        nonlocal acquired
        acquired += 1
        return acquire(self, shapes, dtype)

    def count_empty(self, x):  # the pool calls it for each storage that it allocates, others for other tensors
        nonlocal allocated
        allocated += x.ndim == 1 and x.storage_offset() == 0 and x.is_contiguous() and not x.requires_grad
        record_stream(self, x)

    results = []
    with (
        mock.patch.object(Pool, "acquire", count_acquired),
        mock.patch.object(CommStream, "record_stream", count_empty),
    ):
        for units in (1, 1, 1, 1, 2, 1):
            before = acquired, allocated
            _layer(Case(**{**case.__dict__, "units": units, "dtype": "bfloat16"}), rank)
            results.append((acquired - before[0], allocated - before[1]))
    return results


def _layer(case: Case, rank: int) -> None:
    q, k, v, dout = (x.requires_grad_() for x in shards(case, rank, *problem(case)))
    settings = {"layout": case.layout, "window": case.window, "transport": case.transport}
    settings |= {"ulysses_size": case.ulysses, "inner_ring_size": case.inner, "head_chunks": case.head_chunks}
    context_attention(q, k, v, **settings).backward(dout)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_buffers_are_allocated_for_the_first_layer_alone(algorithm):
    for rank, layers in enumerate(run_distributed(4, allocations, ALGORITHMS[algorithm])):
        acquired, allocated = zip(*layers, strict=True)
        print(f"BUFFERS {algorithm} rank {rank}: taken per layer {acquired}, allocated {allocated}")
        assert 0 < allocated[0] <= acquired[0] and allocated[1:4] == (0, 0, 0)
        assert acquired[:4] == (acquired[0],) * 4


def _pool() -> Pool:
    return Pool(torch.device("cpu"), CommStream())


def test_idle_buffers_are_bounded_by_what_recent_passes_held_at_once():
    pool = _pool()
    for size in range(100, 200):  # another shape in every batch
        first, second = (pool.acquire(((size,), (1,)), torch.float32) for _ in range(2))
        pool.release(first)
        pool.release(second)
        assert pool.idle_bytes <= 2 * 4 * (size + 1) * 2
    large = pool.acquire(((10_000,),), torch.float32)
    pool.release(large)
    for _ in range(buffers.NUM_RECENT_PASSES):
        pool.release(pool.acquire(((10,),), torch.float32))
    assert pool.idle_bytes <= 4 * 20


def test_idle_buffers_are_bounded_in_all(monkeypatch):
    monkeypatch.setattr(buffers, "MAX_IDLE_BYTES", 1000)
    pool = _pool()
    in_use = [pool.acquire(((100,),), torch.float32) for _ in range(5)]
    for buffer in in_use:
        pool.release(buffer)
    assert 0 < pool.idle_bytes <= 1000
    pool.clear()
    assert pool.idle_bytes == 0


def test_a_buffer_is_never_in_use_twice_and_a_dropped_one_is_not_counted():
    pool = _pool()
    in_use = [pool.acquire(((8,),), torch.float32) for _ in range(3)]
    assert len({buffer.storage.data_ptr() for buffer in in_use}) == 3
    pool.release(in_use[0])
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(in_use[0])
    again = pool.acquire(((2, 4),), torch.float32)
    assert again.storage is in_use[0].storage and again.parts[0].shape == (2, 4)
    assert pool.acquire(((8,),), torch.float64).storage.dtype == torch.float64
    del in_use, again
    pool.release(pool.acquire(((1,),), torch.float32))
    assert pool.idle_bytes == 4


def test_threads_share_a_pool():
    pool = _pool()
    observed = []

    def work(number):
        for _ in range(200):
            buffer = pool.acquire(((64,),), torch.float32)
            filled = buffer.flat.fill_(number)
            assert (filled == number).all()
            pool.release(buffer)
        observed.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(observed) == [0, 1, 2, 3] and pool.idle_bytes <= 4 * 64 * 4
