"""The first exchanges, made before the first batch: it should not pay for connections, and a rank that cannot reach
another should say so early.

NCCL makes a connection when two ranks first talk, and the first call on a group must come from all of its members. So
all ranks that share a sequence do what their layers will: messages between all pairs of a ring and to the next node,
both collectives of a ring, the exchange of heads; with a few numbers each.
"""

import contextlib
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from .groups import warmed_up_splits
from .streams import comm_stream_of
from .transport import GRADIENTS, KEYS_AND_VALUES, PendingExchange, Ring
from .ulysses import place_of

PATIENCE = timedelta(seconds=180)
_meetings = 0


def warm_up(
    group: ProcessGroup,
    device: torch.device,
    ulysses_size: int = 1,
    inner_ring_size: int = 1,
    patience: timedelta = PATIENCE,
) -> None:
    """Makes all connections that attention over `group` may need, once. A collective call of the group.

    Args:
        group: the ranks that share a sequence.
        device: of the tensors that will be exchanged.
        ulysses_size: neighbouring ranks that exchange heads.
        inner_ring_size: ranks of the inner ring of a double ring.
        patience: how long to wait for the other ranks, and for each exchange.

    Raises:
        RuntimeError: if ranks do not come, or an exchange does not end; names the ranks, and what to check.
    """
    global _meetings
    split = device, ulysses_size, inner_ring_size
    if split in warmed_up_splits(group) or dist.get_world_size(group) == 1:
        return
    _meetings += 1
    _meet(group, patience)
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    first = rank // ulysses_size * ulysses_size
    if ulysses_size > 1:
        with _explained("the exchange of heads", group, range(first, first + ulysses_size), patience):
            _trade(group, ulysses_size, device, patience)
    if size > ulysses_size:
        with _explained("the ring", group, range(rank % ulysses_size, size, ulysses_size), patience):
            _go_round(Ring(group, device, ulysses_size, inner_ring_size > 1), inner_ring_size, patience)
    warmed_up_splits(group).add(split)  # only now: making our groups may have ended what was warm


def _meet(group: ProcessGroup, patience: timedelta) -> None:
    """All ranks say that they are here, in the store that made the group."""
    if not hasattr(group, "get_group_store"):  # older than torch 2.7
        return
    store, ranks = group.get_group_store(), range(dist.get_world_size(group))
    names = [f"ring_hf/warm_up/{_meetings}/{rank}" for rank in ranks]
    store.set(names[dist.get_rank(group)], "here")
    try:
        store.wait(names, patience)
    except RuntimeError as error:
        missing = [dist.get_global_rank(group, rank) for rank in ranks if not store.check([names[rank]])]
        raise RuntimeError(
            f"Rank {_listed(missing)} did not come to the warm-up of context parallelism within "
            f"{patience.total_seconds():g} s; {len(ranks)} ranks share a sequence. Look for an error in the output of "
            "the missing ones, and check that every rank runs the same script and reaches the Trainer at about the "
            "same time (or warm up with more patience)."
        ) from error


@contextlib.contextmanager
def _explained(what: str, group: ProcessGroup, places: range, patience: timedelta) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        ranks = [dist.get_global_rank(group, place) for place in places]
        raise RuntimeError(
            f"The warm-up of {what} between ranks {_listed(ranks)} did not end within {patience.total_seconds():g} s "
            f"on rank {dist.get_rank()} ({error}). Check that none of these ranks has failed, that their hosts reach "
            "each other on the interface that GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names, and that each process "
            "has a GPU of its own (torch.cuda.set_device); NCCL_DEBUG=INFO shows which connection is missing."
        ) from error


def _trade(group: ProcessGroup, ulysses_size: int, device: torch.device, patience: timedelta) -> None:
    x = torch.arange(ulysses_size, dtype=torch.float32, device=device)
    got, place = torch.empty_like(x), place_of(group, ulysses_size, device)
    work = dist.all_to_all_single(got, x, group=place, async_op=True)
    comm_stream_of(device).finish([work], patience)
    assert (got == dist.get_rank(group) % ulysses_size).all()


def _go_round(ring: Ring, inner: int, patience: timedelta) -> None:
    """Every hop of the ring in both directions (one of R - n places ahead goes n back), then the collectives."""
    node, place = divmod(ring.rank, inner)
    ways = [((ring.rank + hop) % ring.size, (ring.rank - hop) % ring.size, False) for hop in range(1, ring.size)]
    if inner > 1:
        nodes = ring.size // inner
        ways.append(((node + 1) % nodes * inner + place, (node - 1) % nodes * inner + place, True))
    for to, source, between in ways:
        for tag in (KEYS_AND_VALUES, GRADIENTS):
            send, receive = (ring.take(((1,),), torch.float32, compute=True) for _ in range(2))
            send.flat.fill_(ring.rank)
            ring.touched(send)
            ring.post(send, to, receive, source, tag, between).wait(patience)
            assert receive.flat.item() == source
            ring.touched(receive)
            ring.give(send, receive)
    gathered = ring.all_gather(torch.full((1,), float(ring.rank), device=ring.device))
    _check(ring, gathered, range(ring.size), patience)
    assert gathered.receive is not None
    summed = ring.reduce_scatter(gathered.receive)
    _check(ring, summed, [ring.rank * ring.size], patience)
    ring.give(gathered.receive)


def _check(ring: Ring, exchange: PendingExchange, wanted: Sequence[int], patience: timedelta) -> None:
    exchange.wait(patience)
    assert exchange.receive is not None and exchange.receive.flat.tolist() == list(wanted)


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
