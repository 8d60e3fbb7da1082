"""What the planner says the ring holds, against what the schedule really allocates, byte by byte."""

import threading
from unittest import mock

import pytest
import torch

from ring_hf.geometry import AttentionSpec, Mask, RingOptions, ShardedSequence, make_plan
from ring_hf.kernels import choose
from ring_hf.parallel import buffers, transport
from ring_hf.parallel.buffers import Pool
from ring_hf.parallel.chunked_ulysses import chunked_backward, chunked_forward
from ring_hf.parallel.groups import group_of
from ring_hf.parallel.op_arguments import AttentionOpArgs, to_json
from ring_hf.parallel.schedule import ring_backward, ring_forward, transport_of
from ring_hf.parallel.streams import comm_stream_of
from ring_hf.parallel.transport import RingComm
from ring_hf.planner import attention_bytes as formulas
from ring_hf.planner.attention_buffers import (
    Held,
    Widths,
    backward_bytes,
    chunked_backward_bytes,
    chunked_forward_bytes,
    forward_bytes,
    idle_bytes,
)
from ring_hf.planner.model_config import parse
from tests.planner.live import Live, uncounted
from tests.threads import threads_as_ranks

HEADS, KV_HEADS, DIM, TOKENS = 8, 2, 32, 256
WIDTHS = Widths(HEADS * DIM, 2 * KV_HEADS * DIM, HEADS * DIM, HEADS, True)
CASES = [
    ("ring", 1, 1, "zigzag"),
    ("ring", 2, 1, "zigzag"),
    ("ring", 4, 1, "zigzag"),
    ("ring", 8, 1, "zigzag"),
    ("ring", 4, 1, "contiguous"),
    ("double_ring", 4, 2, "zigzag"),
    ("double_ring", 8, 4, "zigzag"),
    ("allgather", 4, 1, "zigzag"),
    ("direct", 4, 1, "zigzag"),
    ("direct", 8, 1, "zigzag"),
]
DTYPES = {2: torch.bfloat16, 4: torch.float32}


def held(name, ring, inner, layout, element, idle=0):
    """Most bytes that any rank holds in a forward and a backward pass, besides inputs and gradient of out; and after.

    Buffers that would lie idle are freed, up to `idle` bytes.
    """

    def one(rank, group):
        sequence = ShardedSequence(layout, ring * TOKENS, ring)
        shapes = [(1, TOKENS, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        q, k, v = (torch.ones(shape, dtype=DTYPES[element]).transpose(1, 2) for shape in shapes)
        plan = make_plan(sequence, Mask(), rank, 1, None, name, inner)
        kernel, comm = choose("cpu", q, v, None), None
        if ring > 1:
            comm = RingComm(group_of(group), q.device, nested=name == "double_ring")
            comm._pool = Pool(q.device, comm.stream)  # threads are ranks here: each has its own
        carrier = transport_of(name, comm)
        with Live(q, k, v) as forward:
            out, lse = ring_forward(q, k, v, plan, carrier, kernel, AttentionSpec())
            out = out.to(q.dtype)
        dout = torch.ones_like(out)
        with Live(q, k, v, out, lse, dout) as backward:
            ring_backward(dout, q, k, v, out, lse, plan, carrier, kernel, AttentionSpec())
        return forward.peak, backward.peak, comm._pool.idle_bytes if comm else 0

    with threads_as_ranks() as run:
        stand_ins = {name: uncounted(getattr(transport, name)) for name in ("_all_gather", "_reduce_scatter")}
        with mock.patch.multiple(transport, **stand_ins), mock.patch.object(buffers, "MAX_IDLE_BYTES", idle):
            peaks = run(ring, one)
    return [max(direction) for direction in zip(*peaks, strict=True)]


@pytest.mark.parametrize("element", DTYPES, ids=["bf16", "fp32"])
@pytest.mark.parametrize(("name", "ring", "inner", "layout"), CASES, ids=lambda value: str(value))
def test_the_schedule_holds_what_the_planner_says_and_no_more(name, ring, inner, layout, element):
    said = [fn(WIDTHS, element, ring, name) * TOKENS for fn in (forward_bytes, backward_bytes)]
    for direction, found, most in zip(
        ("forward", "backward"), held(name, ring, inner, layout, element)[:2], said, strict=True
    ):
        ratio = found / most
        print(f"{name} of {ring} {direction}: {found:,} of {most:,.0f} bytes ({ratio:.3f})")
        assert ratio <= 1.0, f"{direction} holds {found - most:,.0f} bytes more than the planner says"
        assert ratio >= 0.75


@pytest.mark.parametrize(("name", "ring", "inner", "layout"), CASES[1:], ids=lambda value: str(value))
def test_no_more_lies_idle_than_the_planner_says(name, ring, inner, layout):
    assert formulas.IDLE_BYTES == buffers.MAX_IDLE_BYTES
    *_, idle = held(name, ring, inner, layout, 2, idle=buffers.MAX_IDLE_BYTES)
    said = idle_bytes(WIDTHS, 2, ring, name, TOKENS)
    print(f"{name} of {ring}: {idle:,} of {said:,.0f} bytes idle")
    assert 0 < idle <= said < idle_bytes(WIDTHS, 2, ring, name, 10**6) == buffers.MAX_IDLE_BYTES


CHUNKED_HEADS = {"groups": (16, 8), "one group a rank": (16, 2), "no groups": (8, 8)}


def held_in_chunks(heads, kv_heads, ring, count, element):
    """Most bytes that a rank of `ring` x Ulysses 2 holds forward and backward, besides inputs and gradient of out."""

    def one(rank, group):
        sequence = ShardedSequence("zigzag", 2 * ring * TOKENS, 2 * ring, ulysses=2)
        shapes = [(1, TOKENS, number, DIM) for number in (heads, kv_heads, kv_heads)]
        q, k, v = (torch.ones(shape, dtype=DTYPES[element]).transpose(1, 2) for shape in shapes)
        options = RingOptions("ring", head_chunks=count, kernel="cpu")
        call = to_json(AttentionOpArgs(sequence, AttentionSpec(scale=DIM**-0.5), options, group))
        with Live(q, k, v) as forward:
            out, lse = chunked_forward(q, k, v, None, call)
        dout = torch.ones_like(out)
        with Live(q, k, v, out, lse, dout) as backward:
            chunked_backward(dout, q, k, v, None, out, lse, call)
        return forward.peak, backward.peak

    pools: dict[int, Pool] = {}

    def pool_of(device):  # threads are ranks here: each has its own
        return pools.setdefault(threading.get_ident(), Pool(device, comm_stream_of(device)))

    stand_in = mock.patch.object(transport, "pool_of", pool_of)
    with threads_as_ranks() as run, stand_in, mock.patch.object(buffers, "MAX_IDLE_BYTES", 0):
        peaks = run(2 * ring, one)
    return [max(direction) for direction in zip(*peaks, strict=True)]


@pytest.mark.parametrize("element", DTYPES, ids=["bf16", "fp32"])
@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("ring", [1, 2, 3])
@pytest.mark.parametrize("name", CHUNKED_HEADS)
def test_chunks_of_heads_hold_what_the_planner_says_and_no_more(name, ring, count, element):
    heads, kv_heads = CHUNKED_HEADS[name]
    count = min(count, heads // 2)
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": DIM, "hidden_size": 64}
    sizes |= {"model_type": "llama", "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 64}
    model = parse(sizes, "", "")
    widths = Widths.of(model, 1), Widths.of(model, 2, count)
    said = [fn(*widths, element, ring, "ring") * TOKENS for fn in (chunked_forward_bytes, chunked_backward_bytes)]
    for direction, found, most in zip(
        ("forward", "backward"), held_in_chunks(heads, kv_heads, ring, count, element), said, strict=True
    ):
        print(f"{name}, ring {ring}, {count} chunks, {direction}: {found:,} of {most:,.0f} ({found / most:.3f})")
        assert found <= most, f"{direction} holds {found - most:,.0f} bytes more than the planner says"
        assert found >= 0.75 * most


def test_a_ring_holds_exactly_this():
    """Contiguous shards have no half blocks: the formula is the peak, up to the lse of a few tiles."""
    found = held("ring", 4, 1, "contiguous", 2)
    d_q, d_kv, c = HEADS * DIM, KV_HEADS * DIM, TOKENS
    # fp32 output, a tile, two blocks; fp32 dq, own dk and dv, two blocks, a message of fp32 sums with both ends,
    # and a visiting block's results on their way into its sums
    forward = c * (4 * d_q + 2 * d_q + 2 * 4 * d_kv)
    backward = c * (4 * d_q + 4 * d_kv + 2 * 4 * d_kv + 2 * 8 * d_kv + (4 + 8) * d_kv)
    assert forward <= found[0] <= forward + 5 * 4 * c * HEADS
    assert found[1] == backward


def test_one_buffer_more_would_be_noticed(monkeypatch):
    monkeypatch.setitem(formulas.HELD, "ring", Held(1, 2))
    said = forward_bytes(WIDTHS, 2, 4, "ring") * TOKENS
    assert held("ring", 4, 1, "contiguous", 2)[0] > said


def test_heads_of_ulysses_count_uneven_and_copied_ones():
    from ring_hf.planner import read_model

    model = read_model("Llama-3.1-8B")
    assert Widths.of(model, 1) == Widths.of(model, 8) == Widths(4096, 2048, 4096, 32, True)
    copied = Widths.of(model, 32)  # one query head and a copy of its key/value head each
    assert (copied.query, copied.keys, copied.heads, copied.grouped) == (4096, 32 * 256, 32, False)
    assert Widths.of(model, 3).query == 3 * 11 * 128  # 10, 11 and 11 heads: the busiest counts
