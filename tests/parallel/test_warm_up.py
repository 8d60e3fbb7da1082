"""Connections before the first batch, and groups of our own: made in one order, with the parent's timeout, found
again, forgotten; refusals that name the ranks."""

import contextlib
import importlib
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ring_hf.parallel import context_attention, forget_group, groups, transport, warm_up
from tests.parallel.cases import Case, ring_result
from tests.support.harness import run_distributed

CPU = torch.device("cpu")


def warmed_twice(rank: int, world_size: int) -> list[int]:
    """Messages of a warm-up, of the same again, and of one after the groups were forgotten."""
    world, original = dist.group.WORLD, dist.batch_isend_irecv
    counts = []
    for forget in (True, False, True):
        posted = []

        def post(ops, posted=posted):
            posted.extend(ops)
            return original(ops)

        if forget:
            forget_group(world)
        with mock.patch.object(dist, "batch_isend_irecv", post):
            warm_up(world, CPU)
        counts.append(len(posted))
    return counts


def test_groups_that_were_forgotten_are_warmed_up_anew():
    assert run_distributed(2, warmed_twice) == [[4, 0, 4]] * 2


def warmed(rank: int, world_size: int, split: tuple[int, int], case: Case) -> tuple[set, int, int]:
    """`(pairs that exchanged, groups after warm-up, groups after a step)`."""
    forget_group(dist.group.WORLD)
    pairs, original = set(), dist.batch_isend_irecv

    def post(ops):
        pairs.update((op.group.group_desc, dist.get_rank(), op.peer) for op in ops if op.op is dist.isend)
        return original(ops)

    with mock.patch.object(dist, "batch_isend_irecv", post):
        warm_up(dist.group.WORLD, CPU, *split)
        first = set(pairs)
        warm_up(dist.group.WORLD, CPU, *split)  # once is enough
    assert first == pairs
    after = num_groups_of_ours()
    ring_result(rank, case)
    return pairs, after, num_groups_of_ours()


def num_groups_of_ours() -> int:
    """Those made for the whole world; other tests leave theirs, made for an axis of a mesh."""
    return sum(parent is dist.group.WORLD for parent, _ in groups._DEDICATED.values())


SPLITS = {
    (1, 1): (Case("zigzag", 4, units=1), 1),
    (1, 2): (Case("zigzag", 4, units=1, transport="double_ring", inner=2), 2),
    (2, 1): (Case("zigzag", 4, units=1, ulysses=2, transport="allgather"), 2),
    (4, 1): (Case("contiguous", 4, units=1, ulysses=4), 1),
}


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_warm_up_connects_whoever_will_talk_and_makes_every_group(split):
    case, num_groups = SPLITS[split]
    rows = run_distributed(4, warmed, split, case)
    assert [row[1:] for row in rows] == [(num_groups, num_groups)] * 4
    pairs = set().union(*(row[0] for row in rows))
    ulysses_size, inner = split
    ring = {("ring_hf ring", a, b) for a in range(4) for b in range(a % ulysses_size, 4, ulysses_size) if a != b}
    between = {("ring_hf between inner rings", a, (a + inner) % 4) for a in range(4)} if inner > 1 else set()
    assert pairs == ring | between


def groups_are_found_again(rank: int, world_size: int) -> tuple[float, bool, bool, bool]:
    world = dist.group.WORLD
    forget_group(world)
    made = groups.dedicated_group(world, range(2), "ring", CPU)
    same = groups.dedicated_group(world, range(2), "ring", CPU) is made
    other = groups.dedicated_group(world, range(2), "between", CPU) is made
    seconds = made._get_backend(CPU).options._timeout.total_seconds()
    forget_group(world)
    return seconds, same, other, made in dist.distributed_c10d._world.pg_map


def test_own_groups_have_the_parents_timeout_and_end_with_it():
    assert run_distributed(2, groups_are_found_again) == [(300.0, True, False, False)] * 2


def ended_by_torch(rank: int, world_size: int) -> bool:
    """A group of ours that torch has destroyed is made again, as after a second `init_process_group`."""
    world = dist.group.WORLD
    forget_group(world)
    first = groups.dedicated_group(world, range(2), "ring", CPU)
    dist.destroy_process_group(first)
    again = groups.dedicated_group(world, range(2), "ring", CPU)
    dist.barrier(group=again)
    return again is not first


def test_groups_that_torch_ended_are_made_again():
    assert run_distributed(2, ended_by_torch) == [True, True]


def nothing_on_the_parent(rank: int, world_size: int) -> set[str]:
    """On which groups attention posts; the parent is the group of a mesh axis, as Accelerate and FSDP use them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    used, parent = set(), mesh["cp"].get_group()
    originals = {name: getattr(dist, name) for name in ("batch_isend_irecv", "all_to_all_single", "new_group")}
    bound = []

    def new_group(*args, **kwargs):
        bound.append(dist.group.WORLD.bound_device_id)
        return originals["new_group"](*args, **kwargs)

    def post(ops):
        used.update(op.group for op in ops)
        return originals["batch_isend_irecv"](ops)

    def trade(*args, group, **more):
        used.add(group)
        return originals["all_to_all_single"](*args, group=group, **more)

    q = torch.ones(1, 2, 8, 4, requires_grad=True)
    # A process bound to a device would split its default group, for which the other replica does not come.
    dist.group.WORLD.bound_device_id = torch.device("cuda", rank)
    with mock.patch.multiple(dist, batch_isend_irecv=post, all_to_all_single=trade, new_group=new_group):
        for ulysses_size in (1, 2):
            context_attention(q, q, q, group=mesh["cp"], ulysses_size=ulysses_size).sum().backward()
    assert dist.group.WORLD.bound_device_id == torch.device("cuda", rank) and set(bound) == {None}
    dist.group.WORLD.bound_device_id = None
    assert parent not in used and dist.group.WORLD not in used
    return {group.group_desc for group in used}


def test_nothing_is_posted_on_the_group_that_others_use():
    assert run_distributed(4, nothing_on_the_parent) == [{"ring_hf ring", "ring_hf ulysses"}] * 4


def uneven(rank: int, world_size: int) -> list[float]:
    """Sums over ranks 0, 1 and 2, of which the first two are in a group more; that group and ours end in between."""
    world = dist.group.WORLD
    shared = dist.new_group([0, 1, 2])
    pair = dist.new_group([0, 1])
    sums, names = [], set()
    for _ in range(3) if rank < 3 else ():
        ours = groups.dedicated_group(shared, range(3), "ring", CPU)
        names.add(ours.group_name)
        sums.append(torch.tensor(float(rank)))
        dist.all_reduce(sums[-1], group=ours)
        if rank < 2 and len(names) == 1:
            dist.destroy_process_group(pair)
        forget_group(shared)
    assert rank == 3 or len(names) == 3
    dist.barrier(group=world)
    if rank < 3:
        dist.destroy_process_group(shared)
    return [float(x) for x in sums]


def test_ranks_in_different_numbers_of_groups_find_each_other():
    assert run_distributed(4, uneven) == [[3.0] * 3] * 3 + [[]]


def one_is_missing(rank: int, world_size: int) -> list[str]:
    """What the others are told when rank 1 does not come, fails in the ring, or fails where heads are exchanged."""
    messages, limit = [], timedelta(seconds=1.5)
    module = importlib.import_module("ring_hf.parallel.group_warm_up")
    for where, ulysses_size in (("store", 1), ("ring", 1), ("heads", world_size)):
        forget_group(dist.group.WORLD)
        failing = {
            "store": mock.patch.object(module, "_barrier_via_store", side_effect=ValueError("rank 1 has failed")),
            "ring": mock.patch.object(transport.RingComm, "isend_irecv", side_effect=ValueError("rank 1 has failed")),
            "heads": mock.patch.object(dist, "all_to_all_single", side_effect=ValueError("rank 1 has failed")),
        }[where]
        expected = (ValueError, "rank 1 has failed") if rank == 1 else (RuntimeError, "[Tt]he warm-up")
        with failing if rank == 1 else contextlib.nullcontext(), pytest.raises(expected[0], match=expected[1]) as why:
            warm_up(dist.group.WORLD, CPU, ulysses_size, timeout=limit)
        messages.append(str(why.value))
        dist.barrier()
    return messages


WORDS = (
    ("Rank 1 did not come to the warm-up", "3 ranks share a sequence", "same script"),
    ("The warm-up of the ring between ranks 0, 1, 2 did not end", "on rank", "GLOO_SOCKET_IFNAME"),
    ("The warm-up of the exchange of heads between ranks 0, 1, 2 did not end", "NCCL_DEBUG=INFO"),
)


def test_a_missing_rank_is_named_with_what_to_check():
    for messages in run_distributed(3, one_is_missing)[::2]:
        for message, words in zip(messages, WORDS, strict=True):
            assert all(word in message for word in words), message
