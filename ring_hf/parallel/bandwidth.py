"""The bandwidth of the links between ranks: each rank sends to its neighbour at the same time, as a ring does.

Measured through `RingComm` itself, for `ring-hf doctor`; training does not use this module.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .transport import KEYS_AND_VALUES, RingComm

NUM_WARM_UPS = 2


@contextlib.contextmanager
def process_group(rank: int, size: int, device: torch.device, store: str | None, seconds: float) -> Iterator[None]:
    """Make this process one of `size` ranks, which meet in the file `store` or by the launcher's variables."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    options: dict[str, Any] = {}
    if store is not None:
        options = {"init_method": f"file://{store}", "rank": rank, "world_size": size}
    if device.type == "cuda":
        options["device_id"] = device
    dist.init_process_group(backend, timeout=timedelta(seconds=seconds), **options)
    try:
        yield
    finally:
        dist.destroy_process_group()


def measure_p2p(
    device: torch.device, sizes: Sequence[int], repeats: int, report_status: Callable[[str], None]
) -> list[tuple[int, float]]:
    """Return `(bytes, seconds)` per message size: the median of `repeats` exchanges, of the slowest rank.

    A collective call of the default group; every rank gets the same numbers. `report_status` is told what comes next.

    Raises:
        RuntimeError: if an exchange does not deliver what was sent.
    """
    group = dist.group.WORLD
    assert group is not None
    comm = RingComm(group, device)
    to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    results = []
    for size in sizes:
        report_status(f"exchanging {size:,} bytes with its neighbours")
        send, receive = (comm.acquire(((size,),), torch.uint8, compute=True) for _ in range(2))
        send.flat.fill_(1)
        receive.flat.zero_()
        comm.record_use(send)
        comm.record_use(receive)
        seconds = []
        for repeat in range(NUM_WARM_UPS + repeats):
            gather([None])  # a barrier
            _synchronize(device)
            start = time.perf_counter()
            comm.isend_irecv(send, to, receive, source, KEYS_AND_VALUES).wait()
            _synchronize(device)
            if repeat >= NUM_WARM_UPS:
                seconds.append(time.perf_counter() - start)
        if not bool(receive.flat.all()):
            raise RuntimeError(f"an exchange of {size} bytes did not bring what was sent")
        comm.record_use(receive)
        comm.release(send, receive)
        results.append((size, max(gather([statistics.median(seconds)]))))
    return results


def gather(values: list[Any]) -> list[Any]:
    """Return the values of all ranks, one list after the other. A collective call, if there is a process group."""
    if not dist.is_initialized():
        return values
    lists: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, values)
    return [value for of_rank in lists for value in of_rank]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
