"""What links between ranks carry: every rank sends to its neighbour at once, as a ring does, through `Ring` itself.

For `ring-hf doctor`; training never comes here.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .transport import KEYS_AND_VALUES, Ring


@contextlib.contextmanager
def joined(rank: int, size: int, device: torch.device, store: str | None, seconds: float) -> Iterator[None]:
    """Inside, this process is one of `size` ranks; they meet in the file `store`, or by the launcher's variables."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    options: dict[str, Any] = {} if store is None else {"init_method": f"file://{store}", "rank": rank}
    options |= {"world_size": size} if store is not None else {}
    options |= {"device_id": device} if device.type == "cuda" else {}
    dist.init_process_group(backend, timeout=timedelta(seconds=seconds), **options)
    try:
        yield
    finally:
        dist.destroy_process_group()


def measure_links(
    device: torch.device, sizes: Sequence[int], repeats: int, say: Callable[[str], None]
) -> list[tuple[int, float]]:
    """Per message size in bytes the seconds of one exchange, median of `repeats`; the slowest rank's, on every rank.

    Every rank of the default group calls this. `say` is told what is tried next.
    """
    group = dist.group.WORLD
    assert group is not None
    ring = Ring(group, device)
    found = []
    for size in sizes:
        say(f"exchanging {size:,} bytes with its neighbours")
        send, receive = (ring.take(((size,),), torch.uint8, compute=True) for _ in range(2))
        send.flat.fill_(1)
        receive.flat.zero_()
        ring.touched(send)
        ring.touched(receive)
        seconds = []
        for repeat in range(repeats + 2):  # the first two warm up
            gather([None])
            _finish(device)
            begin = time.perf_counter()
            exchange = ring.post(
                send, (ring.rank + 1) % ring.size, receive, (ring.rank - 1) % ring.size, KEYS_AND_VALUES
            )
            exchange.wait()
            _finish(device)
            seconds += [time.perf_counter() - begin] if repeat >= 2 else []
        if not bool(receive.flat.all()):
            raise RuntimeError(f"an exchange of {size} bytes did not bring what was sent")
        ring.touched(receive)
        ring.give(send, receive)
        slowest = max(gather([statistics.median(seconds)]))
        found.append((size, slowest))
    return found


def gather(values: list[Any]) -> list[Any]:
    """The values of all ranks, one list after the other; all ranks call this."""
    if not dist.is_initialized():
        return values
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, values)
    return [value for theirs in said for value in theirs]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
