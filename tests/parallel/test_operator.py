"""The operator and what surrounds it: exchanges counted, checkpointing, compile, the functional form, agreement."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ring_hf.geometry import LAYOUTS, AttentionSpec, RingOptions, ShardedSequence, make_plan, sent_tokens
from ring_hf.parallel import (
    assert_equal_across_ranks,
    context_attention,
    group_of,
    local_attention,
    register_group,
    ring_attention,
    shard,
    unshard,
)
from ring_hf.parallel.op_arguments import AttentionOpArgs, from_json, to_json
from ring_hf.parallel.transport import GRADIENTS, KEYS_AND_VALUES, RingComm
from ring_hf.testing import assert_close
from tests.parallel.cases import Case, problem, ring_result, shards
from tests.support.harness import run_distributed

OPERATOR = torch.ops.ring_hf.ring_attention.default


def count_exchanges(rank: int, world_size: int, case: Case) -> tuple[int, int, int]:
    """`(key/value exchanges, gradient exchanges, bytes sent)` of one forward and backward."""
    tags, sent = [], []
    original = RingComm.isend_irecv

    def isend_irecv(self, send, to, receive, source, tag, **more):
        if send is not None:
            tags.append(tag)
            sent.append(send.nbytes)
        return original(self, send, to, receive, source, tag, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RingComm, "isend_irecv", isend_irecv)
        ring_result(rank, case)
    return tags.count(KEYS_AND_VALUES), tags.count(GRADIENTS), sum(sent)


def test_each_block_travels_once_round_forward_and_backward_and_gradients_go_home():
    case = Case("zigzag", 4, "bfloat16")
    block = 2 * case.rows * case.kv_heads * (case.length // 4) * 8
    # 3 hops each way in bf16; gradients 2 hops and the way home in fp32. Key/value heads are never repeated (GQA).
    assert run_distributed(4, count_exchanges, case) == [(6, 3, 6 * block * 2 + 3 * block * 4)] * 4


def test_window_stops_the_ring_and_gradients_go_straight_home():
    assert [row[:2] for row in run_distributed(4, count_exchanges, Case("contiguous", 4, window=5))] == [(2, 1)] * 4


def test_a_ring_of_one_posts_nothing():
    assert run_distributed(1, count_exchanges, Case("zigzag", 1)) == [(0, 0, 0)]


def test_double_ring_sends_to_the_next_node_once_per_turn():
    case = Case("zigzag", 6, transport="double_ring", inner=3)
    # Two turns of two hops and one move between nodes, each way; every visiting sum moves after each of five steps.
    assert [row[:2] for row in run_distributed(6, count_exchanges, case)] == [(10, 5)] * 6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_direct_sends_what_the_geometry_says(layout):
    for mask in ({}, {"window": 5}, {"packed": True}, {"causal": False}):
        case = Case(layout, 4, transport="direct", **mask)
        tokens = [sum(row) for row in sent_tokens(case.sequence, case.mask, "direct")]
        fetched = [
            sum(step.num_keys for step in make_plan(case.sequence, case.mask, rank, 2, None, "direct").steps[1:])
            for rank in range(4)
        ]
        # Per token keys and values of all rows and heads, 8 bytes each: sent forward and backward, and as many
        # gradients (fp64 here) as keys were fetched.
        each = 2 * case.rows * case.kv_heads * 8 * 8
        want = [each * (2 * mine + theirs) for mine, theirs in zip(tokens, fetched, strict=True)]
        assert [row[2] for row in run_distributed(4, count_exchanges, case)] == want


class CountOperator(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is OPERATOR
        return func(*args, **(kwargs or {}))


def _layer(q, k, v):
    return local_attention(q.sin(), k, v)[0]


def _checkpointed(q, k, v, save):
    if not save:
        return checkpoint(_layer, q, k, v, use_reentrant=False)

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op is OPERATOR else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(_layer, q, k, v, use_reentrant=False, context_fn=contexts)


@pytest.mark.parametrize("save, calls", [(False, 2), (True, 1)], ids=["recomputed", "saved"])
def test_selective_checkpointing_can_save_the_operator(save, calls):
    q, k, v = (torch.randn(1, 2, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    want = torch.autograd.grad(_layer(q, k, v).sum(), (q, k, v))
    with CountOperator() as count:
        got = torch.autograd.grad(_checkpointed(q, k, v, save).sum(), (q, k, v))
    assert count.calls == calls
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_operator_passes_pytorchs_own_checks():
    q, k, v = (torch.randn(1, heads, 8, 4, requires_grad=True) for heads in (4, 2, 2))
    sequence = ShardedSequence("contiguous", 8, 1, ((0, 3, 8),))
    call = to_json(AttentionOpArgs(sequence, AttentionSpec(scale=0.5), RingOptions("ring"), ""))
    for sinks in (None, torch.randn(4, requires_grad=True)):
        result = torch.library.opcheck(OPERATOR, (q, k, v, sinks, call), raise_exception=True)
        assert set(result.values()) == {"SUCCESS"}


def test_calls_survive_their_text_form():
    sequence = ShardedSequence("balanced", 24, 6, ((0, 3, 24), (0, 24)), (20, 24), ((2, 1), (0,)), ulysses=3)
    spec, options = AttentionSpec(True, 4, None, 1 / 3, 50.0), RingOptions("double_ring", 2, 3, 3, "cpu", False)
    chunked = AttentionSpec(False, chunk=3, scale=0.5)
    for args in (
        AttentionOpArgs(sequence, spec, options, "7"),
        AttentionOpArgs(ShardedSequence("zigzag", 8, 2), chunked, RingOptions("direct"), ""),
    ):
        assert from_json(to_json(args)) == args


def compiled_matches_eager(rank: int, world_size: int, ulysses: int, head_chunks: int) -> float:
    group = dist.group.WORLD

    def attend(q, k, v):
        split = {"ulysses_size": ulysses, "head_chunks": head_chunks}
        return context_attention(q.sin(), k, v, group=group, **split).cos()

    case = Case("zigzag", world_size, "float32", ulysses=ulysses)
    q, k, v, _ = shards(case, rank, *problem(case))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    worst = 0.0
    compiled = torch.compile(attend, backend="aot_eager")
    for mine, right in zip(
        torch.autograd.grad(compiled(*leaves).sum(), leaves),
        torch.autograd.grad(attend(*leaves).sum(), leaves),
        strict=True,
    ):
        worst = max(worst, (mine - right).abs().max().item())
    return worst


@pytest.mark.parametrize("ulysses, head_chunks", [(1, 1), (2, 1), (2, 2)])
def test_compiled_attention_matches_eager(ulysses, head_chunks):
    assert max(run_distributed(2, compiled_matches_eager, ulysses, head_chunks, timeout=200)) <= 1e-6


def chunked_operator_passes(rank: int, world_size: int) -> None:
    q, k, v = (torch.randn(1, heads, 8, 4, requires_grad=True) for heads in (5, 5, 5))
    sequence, group = ShardedSequence("contiguous", 16, 2, ulysses=2), register_group(dist.group.WORLD)
    call = to_json(AttentionOpArgs(sequence, AttentionSpec(scale=0.5), RingOptions("ring", head_chunks=2), group))
    for sinks in (None, torch.randn(5, requires_grad=True)):
        operator = torch.ops.ring_hf.chunked_ulysses.default
        result = torch.library.opcheck(operator, (q, k, v, sinks, call), raise_exception=True)
        assert set(result.values()) == {"SUCCESS"}


def test_operator_of_chunks_passes_pytorchs_own_checks():
    run_distributed(2, chunked_operator_passes)


def functional_form(rank: int, world_size: int, layout: str, input_layout: str) -> None:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("cp",))
    case = Case(layout, world_size, packed=True, rows=1)
    q, k, v, _ = problem(case)
    (bounds,) = case.sequence.documents
    want, want_lse = local_attention(q, k, v, documents=(bounds,))
    mine = [shard(x, layout, world_size, rank, dim=2, cu_seqlens=bounds) for x in (q, k, v)]
    if input_layout == "BSHD":
        mine = [x.transpose(1, 2) for x in mine]
    for cu_seqlens in (bounds, [bounds], torch.tensor(bounds, dtype=torch.int32)):
        settings = {"cu_seqlens": cu_seqlens, "input_layout": input_layout, "layout": layout}
        out, lse = context_attention(*mine, group=mesh["cp"], return_lse=True, **settings)
        assert torch.equal(out, context_attention(*mine, **settings))
        out = out.transpose(1, 2) if input_layout == "BSHD" else out
        gathered = [torch.empty_like(out.contiguous()) for _ in range(world_size)]
        dist.all_gather(gathered, out.contiguous())
        assert_close("out", unshard(gathered, layout, dim=2, cu_seqlens=bounds), want, max_abs=1e-12)
        assert_close("lse", lse, shard(want_lse, layout, world_size, rank, dim=2, cu_seqlens=bounds), max_abs=1e-12)
    with pytest.raises(ValueError, match=r"axes \('dp', 'cp'\) is no ring"):
        context_attention(*mine, group=init_device_mesh("cpu", (1, world_size), mesh_dim_names=("dp", "cp")))
    with pytest.raises(ValueError, match="input_layout='SBHD' is not known"):
        context_attention(*mine, input_layout="SBHD")


@pytest.mark.parametrize("input_layout", ["BHSD", "BSHD"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_functional_form_takes_both_input_layouts(layout, input_layout):
    run_distributed(3, functional_form, layout, input_layout)


def functional_hybrid(rank: int, world_size: int) -> None:
    case = Case("zigzag", world_size, ulysses=2, with_sinks=True)
    q, k, v, _ = problem(case)
    maths = {"softcap": 2.0, "sinks": case.sinks, "chunk": 20}
    want, _ = local_attention(q, k, v, **maths)
    mine = [shard(x, "zigzag", world_size, rank, dim=2, ulysses_size=2) for x in (q, k, v)]
    for chunks in (1, 2):
        out = context_attention(*mine, ulysses_size=2, head_chunks=chunks, transport="direct", **maths)
        assert_close("out", out, shard(want, "zigzag", world_size, rank, dim=2, ulysses_size=2), max_abs=1e-12)
    want, _ = local_attention(q, k, v, prefixes=((20,), (4,)))
    out = context_attention(*mine, ulysses_size=2, transport="auto", prefixes=((20,), (4,)))
    assert_close("prefix", out, shard(want, "zigzag", world_size, rank, dim=2, ulysses_size=2), max_abs=1e-12)
    for settings, message in (
        ({"transport": "pigeon"}, "transport='pigeon' is not known"),
        ({"transport": "direct", "inner_ring_size": 2}, "inner_ring_size=2 belongs to the double ring"),
        ({"ulysses_size": 3}, "ulysses_size=3 does not divide the 4 ranks"),
        ({"head_chunks": 2}, "head_chunks=2 cuts the exchange of heads, but with ulysses_size=1"),
        ({"ulysses_size": 4, "head_chunks": 2}, "head_chunks=2 is more than the 1 query heads that the busiest"),
        ({"transport": "double_ring", "inner_ring_size": 3}, "inner_ring_size=3 cannot cut a ring of 4 ranks"),
    ):
        with pytest.raises(ValueError, match=message):
            context_attention(*mine, layout="contiguous", **settings)


def test_functional_form_takes_every_algorithm_and_refuses_contradictions():
    run_distributed(4, functional_hybrid)


def subgroups(rank: int, world_size: int) -> None:
    """Two rings in one world: ranks inside a group are translated to global ones."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    case = Case("zigzag", 2)
    generator = torch.Generator().manual_seed(rank // 2)  # another problem for each ring
    q, k, v = (torch.randn(1, 2, case.length, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    mine = [shard(x, "zigzag", 2, mesh["cp"].get_local_rank(), dim=2) for x in (q, k, v)]
    want = shard(local_attention(q, k, v)[0], "zigzag", 2, mesh["cp"].get_local_rank(), dim=2)
    assert_close("out", context_attention(*mine, group=mesh["cp"]), want, max_abs=1e-12)


def test_rings_in_subgroups_do_not_mix():
    run_distributed(4, subgroups)


def say(rank: int, world_size: int, facts: list[dict], errors: list) -> str:
    try:
        assert_equal_across_ranks(facts[rank], errors[rank])
    except ValueError as error:
        return str(error)
    return ""


def test_all_ranks_raise_what_one_rank_found():
    assert run_distributed(3, say, [{}] * 3, [None, "left padding", None]) == ["rank 1: left padding"] * 3
    assert run_distributed(3, say, [{}] * 3, ["dropout"] * 3) == ["dropout"] * 3
    assert run_distributed(3, say, [{"layout": "zigzag"}] * 3, [None] * 3) == [""] * 3
    facts = [{"layout": "zigzag"}, {"layout": "zigzag"}, {"layout": "striped"}]
    (message,) = set(run_distributed(3, say, facts, [None] * 3))
    assert message.startswith("The ranks disagree about layout (rank 0: zigzag, rank 1: zigzag, rank 2: striped)")


def test_agreement_works_without_processes():
    assert_equal_across_ranks({"layout": "zigzag"})
    with pytest.raises(ValueError, match=r"^dropout$"):
        assert_equal_across_ranks({}, "dropout")


def test_unknown_groups_are_refused():
    with pytest.raises(ValueError, match=r"No process group is registered as .nobody."):
        group_of("nobody")
    with pytest.raises(ValueError, match=r"rank=3 is not one of 2 ranks"):
        shard(torch.zeros(1, 8), "zigzag", 2, 3)


def group_of_another_size(rank: int, world_size: int) -> str:
    q = torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError) as refusal:
        ring_attention(q, q, q, sequence=ShardedSequence("zigzag", 16, 4), group=register_group(dist.group.WORLD))
    return str(refusal.value)


def test_a_group_of_another_size_is_refused():
    (message,) = set(run_distributed(2, group_of_another_size))
    assert message.startswith("The sequence is dealt to 4 ranks, but the group has 2.")


def names_are_stable(rank: int, world_size: int) -> bool:
    return register_group(dist.group.WORLD) == register_group(dist.group.WORLD)


def test_registering_a_group_twice_gives_one_name():
    assert run_distributed(2, names_are_stable) == [True, True]
