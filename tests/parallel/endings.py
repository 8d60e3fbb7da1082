"""Small scripts and how they end: `python tests/parallel/endings.py CASE RANK WORLD_SIZE STORE`."""

import atexit
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

case, rank, world_size, store = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
destroyed: list[str] = []  # by torch, in this order


@atexit.register
def report() -> None:  # registered before the hook of ring_hf, so run after it
    print(
        f"initialized={dist.is_initialized()} workers={len(shutdown._worker_states())} destroyed={destroyed}",
        flush=True,
    )


from ring_hf.parallel import groups, register_group, shutdown  # noqa: E402

CPU = torch.device("cpu")
THREADS_HAVE_NAMES = torch.__version__ >= (2, 11)
destroy = dist.destroy_process_group


def recorded(group: dist.ProcessGroup | None = None) -> None:
    destroyed.append("default" if group in (None, dist.group.WORLD) else group.group_desc)
    destroy(group)


def join(timeout: float = 60) -> None:
    method = f"file://{store}-{len(destroyed)}"
    dist.init_process_group("gloo", method, timedelta(seconds=timeout), world_size, rank)
    while THREADS_HAVE_NAMES and len(shutdown._worker_states()) < 2:  # a thread has no name before it runs
        time.sleep(0.01)


def own(purpose: str) -> dist.ProcessGroup:
    return groups.dedicated_group(dist.group.WORLD, range(world_size), purpose, CPU)


def starve_workers(num_groups: int) -> list[dist.ProcessGroup]:
    """One collective on each of so many groups, whose threads then get no processor as long as this one has work."""
    made = [own(f"ring {n}") for n in range(num_groups)]
    processor = {min(os.sched_getaffinity(0))}
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), processor)
    for thread in shutdown._worker_states():
        os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))
    sys.setswitchinterval(1000)  # nor the interpreter
    tensors = [([torch.empty(1000)], torch.ones(1000)) for _ in made]
    works = [dist.all_gather(*pair, group=group, async_op=True) for pair, group in zip(tensors, made, strict=True)]
    for work in works:
        work.wait()
    return made


dist.destroy_process_group = recorded
if case == "destroys at exit":
    atexit.register(dist.destroy_process_group)
if case == "in flight":
    shutdown.register_shutdown(groups.end_groups, timedelta(seconds=1))
if case != "forks first":
    join()
if case not in ("forks first", "is a stranger"):
    register_group(dist.group.WORLD)

if case in ("starves", "starves without the hook"):
    starve_workers(16)
    if case == "starves without the hook":
        atexit.unregister(shutdown.run_shutdown)
elif case == "starves and holds":
    held = dist.group.WORLD, *starve_workers(16)
elif case in ("ends twice", "destroys at exit"):
    own("ring")
    own("between inner rings")
    if case == "ends twice":
        shutdown.run_shutdown()
        shutdown.run_shutdown()
        shutdown.register_shutdown(groups.end_groups)
elif case == "has destroyed":
    own("ring")
    dist.destroy_process_group()
elif case == "has joined again":
    own("ring")
    dist.destroy_process_group()
    join()
elif case in ("in flight", "raises"):
    ring, other = own("ring"), own("between inner rings")
    if rank == 0:
        dist.barrier(other)  # rank 1 does not come
    dist.all_reduce(torch.ones(1), group=ring, async_op=True)  # rank 0 does not come
    if case == "in flight":
        del ring  # otherwise no destructor runs before the interpreter goes down
    print(f"ends at {time.monotonic()}", flush=True)
    if case == "raises":
        raise ValueError("rank 1 has failed")
elif case == "forks":
    process = os.fork()
    if process == 0:
        shutdown.run_shutdown()
        print(f"child: initialized={dist.is_initialized()} destroyed={destroyed}", flush=True)
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0
    dist.all_reduce(torch.ones(1), group=own("ring"))
elif case == "forks first":
    shutdown.register_shutdown(groups.end_groups)
    process = os.fork()
    if process == 0:
        join()
        register_group(dist.group.WORLD)
        own("ring")
        print("child", end=": ", flush=True)
    else:
        assert os.waitpid(process, 0)[1] == 0
