"""The first exchanges, before the first batch: a batch should not pay for connections, and a rank that cannot reach
another should fail early.

NCCL connects two ranks when they first exchange something, and the first call on a group must come from all of its
members. So all ranks that share a sequence do with a few numbers what their layers will do: messages between all pairs
of a ring and to the next node, both collectives of a ring, and the exchange of heads.
"""

import contextlib
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from .groups import warmed_up_splits
from .streams import comm_stream_of
from .transport import GRADIENTS, KEYS_AND_VALUES, PendingExchange, RingComm
from .ulysses import ulysses_group

TIMEOUT = timedelta(seconds=180)
_num_warm_ups = 0


def warm_up(
    group: ProcessGroup,
    device: torch.device,
    ulysses_size: int = 1,
    inner_ring_size: int = 1,
    timeout: timedelta = TIMEOUT,
) -> None:
    """Make all connections that attention over `group` may need, once. A collective call of the group.

    Args:
        group: the ranks that share a sequence.
        device: of the tensors that will be exchanged.
        ulysses_size: neighbouring ranks that exchange heads.
        inner_ring_size: ranks of the inner ring of a double ring.
        timeout: how long to wait for the other ranks, and for each exchange.

    Raises:
        RuntimeError: if ranks do not arrive, or an exchange does not end; names the ranks, and what to check.
    """
    global _num_warm_ups
    split = device, ulysses_size, inner_ring_size
    if split in warmed_up_splits(group) or dist.get_world_size(group) == 1:
        return
    _num_warm_ups += 1
    _barrier_via_store(group, timeout)
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    first = rank // ulysses_size * ulysses_size
    if ulysses_size > 1:
        with _explained("the exchange of heads", group, range(first, first + ulysses_size), timeout):
            _all_to_all_once(group, ulysses_size, device, timeout)
    if size > ulysses_size:
        with _explained("the ring", group, range(rank % ulysses_size, size, ulysses_size), timeout):
            comm = RingComm(group, device, ulysses_size, inner_ring_size > 1)
            _exchange_with_all_pairs(comm, inner_ring_size, timeout)
            _run_collectives(comm, timeout)
    warmed_up_splits(group).add(split)  # only now: making our groups may have ended what was warm


def _barrier_via_store(group: ProcessGroup, timeout: timedelta) -> None:
    """Wait until every rank has written its name into the store that made the group."""
    if not hasattr(group, "get_group_store"):  # older than torch 2.7
        return
    store, ranks = group.get_group_store(), range(dist.get_world_size(group))
    names = [f"ring_hf/warm_up/{_num_warm_ups}/{rank}" for rank in ranks]
    store.set(names[dist.get_rank(group)], "here")
    try:
        store.wait(names, timeout)
    except RuntimeError as error:
        missing = [dist.get_global_rank(group, rank) for rank in ranks if not store.check([names[rank]])]
        raise RuntimeError(
            f"Rank {_listed(missing)} did not come to the warm-up of context parallelism within "
            f"{timeout.total_seconds():g} s; {len(ranks)} ranks share a sequence. Look for an error in the output of "
            "the missing ones, and check that every rank runs the same script and reaches the Trainer at about the "
            "same time (or warm up with a longer timeout)."
        ) from error


@contextlib.contextmanager
def _explained(subject: str, group: ProcessGroup, members: range, timeout: timedelta) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        ranks = [dist.get_global_rank(group, member) for member in members]
        raise RuntimeError(
            f"The warm-up of {subject} between ranks {_listed(ranks)} did not end within "
            f"{timeout.total_seconds():g} s on rank {dist.get_rank()} ({error}). Check that none of these ranks has "
            "failed, that their hosts reach "
            "each other on the interface that GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names, and that each process "
            "has a GPU of its own (torch.cuda.set_device); NCCL_DEBUG=INFO shows which connection is missing."
        ) from error


def _all_to_all_once(group: ProcessGroup, ulysses_size: int, device: torch.device, timeout: timedelta) -> None:
    x = torch.arange(ulysses_size, dtype=torch.float32, device=device)
    received = torch.empty_like(x)
    work = dist.all_to_all_single(received, x, group=ulysses_group(group, ulysses_size, device), async_op=True)
    comm_stream_of(device).wait_works([work], timeout)
    assert (received == dist.get_rank(group) % ulysses_size).all()


def _exchange_with_all_pairs(comm: RingComm, inner: int, timeout: timedelta) -> None:
    """Every hop of the ring in both directions (R - n ranks ahead is n ranks back), and the hop to the next node."""
    peers = [((comm.rank + hop) % comm.size, (comm.rank - hop) % comm.size, False) for hop in range(1, comm.size)]
    if inner > 1:
        node, inner_rank = divmod(comm.rank, inner)
        nodes = comm.size // inner
        peers.append(((node + 1) % nodes * inner + inner_rank, (node - 1) % nodes * inner + inner_rank, True))
    for to, source, inter_node in peers:
        for tag in (KEYS_AND_VALUES, GRADIENTS):
            send, receive = (comm.acquire(((1,),), torch.float32, compute=True) for _ in range(2))
            send.flat.fill_(comm.rank)
            comm.record_use(send)
            comm.isend_irecv(send, to, receive, source, tag, inter_node).wait(timeout)
            assert receive.flat.item() == source
            comm.record_use(receive)
            comm.release(send, receive)


def _run_collectives(comm: RingComm, timeout: timedelta) -> None:
    gathered = comm.all_gather(torch.full((1,), float(comm.rank), device=comm.device))
    _check(gathered, range(comm.size), timeout)
    assert gathered.receive is not None
    summed = comm.reduce_scatter(gathered.receive)
    _check(summed, [comm.rank * comm.size], timeout)
    comm.release(gathered.receive)


def _check(exchange: PendingExchange, expected: Sequence[int], timeout: timedelta) -> None:
    exchange.wait(timeout)
    assert exchange.receive is not None and exchange.receive.flat.tolist() == list(expected)


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
