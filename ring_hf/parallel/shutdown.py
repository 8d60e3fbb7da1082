"""Destroy process groups in order when a process exits, while the interpreter is still alive.

A worker thread of gloo drops its reference to the tensors of a collective some time after the caller's `wait` has
returned. Where the caller has dropped its own by then, the thread needs the interpreter to free the Python objects.
If the interpreter is being finalized, CPython ends the thread inside a C++ destructor and the process aborts
("terminate called without an active exception", pytorch issue 190489). `destroy_process_group` alone does not help:
the threads are joined by the destructor of the group, which a DDP model or a device mesh keeps alive. So at exit

1. the groups are destroyed and our references dropped, so that the destructors of groups that nobody else holds run;
2. the threads of groups that others hold get the time to free their tensors and go to sleep.

Neither is a collective call, so no rank waits for one that has died. Both happen in a thread of their own, and the
exit waits for it at most `TIMEOUT`. If a collective is still under way then, because its peer is alive and does not
come, that thread stays in the destructor, and the interpreter does not run it again, where nothing would bound it.
After an exception a collective may well be under way: then gloo's groups are kept to the very end instead, and the
process exits at once, which is what tells the other ranks.

The hook is run by `atexit`: after `threading` has joined all threads that may use the groups (executors too), before
anything is finalized. It is registered when this module is imported, which the models of Transformers do after
`import ring_hf`, because hooks run latest first: what a script registers after its imports, `destroy_process_group`
perhaps, comes before. The thread starts with the first group, since Python 3.12 starts none at exit. Forked processes
inherit the hook and no thread; only a process that registered a group acts.

NCCL (read, not run): `destroy_process_group`, without which torch warns, flushes the communicators and destroys them,
which the ranks of a node do together. They all come here with the same groups in the same order, the latest first, and
whoever waits for a rank that is late or gone stops waiting after `TIMEOUT`. After an exception NCCL's groups are left
to torch, whose destructor aborts the communicators.
"""

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("ring_hf")

TIMEOUT = timedelta(seconds=10)
_POLL_INTERVAL = 0.02  # seconds; a thread that waits for the interpreter wakes up every 0.005
_GRACE = 0.1  # seconds for threads without a name: before torch 2.11, and on systems other than Linux
_WORKER = "pt_gloo_runloop"
_TASKS = Path("/proc/self/task")


@dataclass
class _Shutdown:
    """How the groups of a process are destroyed, and the thread that does it."""

    end: Callable[[bool], list[Any]]
    timeout: float
    process: int = field(default_factory=os.getpid)
    begin: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)
    failed: bool = False
    device: int | None = None

    def run(self) -> None:
        self.begin.wait()
        deadline = time.monotonic() + self.timeout
        threads_have_names, kept = bool(_worker_states()), []
        try:
            if self.device is not None:
                torch.cuda.set_device(self.device)
            kept = self.end(self.failed)
        except Exception:
            logger.warning("The process groups did not end in order.", exc_info=True)
        if threads_have_names:
            wait_for_workers(deadline)
        else:
            time.sleep(_GRACE)
        self.done.set()
        if kept:  # this frame holds their last references, and is never left
            threading.Event().wait()


_shutdown: _Shutdown | None = None
_hooked_process = os.getpid()


def register_shutdown(end: Callable[[bool], list[Any]], timeout: timedelta = TIMEOUT) -> None:
    """Call `end` when this process exits, and wait for gloo's threads. Only the first call counts.

    Args:
        end: gets whether an exception ends the script; destroys groups, or returns those that must be kept alive.
        timeout: the longest time that the exit waits.
    """
    global _shutdown, _hooked_process
    if _shutdown is not None and _shutdown.process == os.getpid():
        return
    if _hooked_process != os.getpid():  # multiprocessing clears the hooks of a forked process
        atexit.register(run_shutdown)
        _hooked_process = os.getpid()
    _shutdown = _Shutdown(end, timeout.total_seconds())
    threading.Thread(target=_shutdown.run, name="ring_hf shutdown", daemon=True).start()


def run_shutdown() -> None:
    """Run the shutdown that the exit of this process would run. A second call, or one in a fork, does nothing."""
    shutdown = _shutdown
    if shutdown is None or shutdown.process != os.getpid() or shutdown.begin.is_set():
        return
    shutdown.failed = getattr(sys, "last_type", None) is not None  # the exception that has reached the top
    shutdown.device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    shutdown.begin.set()
    if not shutdown.done.wait(shutdown.timeout):
        logger.warning(
            "rank %s: the process groups did not end within %g s, because a collective that this rank has started "
            "still waits for another rank. The process exits without them.",
            os.environ.get("RANK", "0"),
            shutdown.timeout,
        )


atexit.register(run_shutdown)


def wait_for_workers(deadline: float) -> None:
    """Return when the worker threads of all gloo groups of this process sleep, or at `deadline` (`time.monotonic`).

    A thread that sleeps at two polls and was not scheduled in between waits for work or for a peer: not for a
    processor, and not for the interpreter, which this thread does not hold between the polls.
    """
    before = _worker_states()
    while before and time.monotonic() < deadline:
        time.sleep(_POLL_INTERVAL)
        now = _worker_states()
        if now == before and all(state == "S" for state, _ in now.values()):
            return
        before = now


def _worker_states() -> dict[str, tuple[str, int]]:
    """Return by id of each worker thread its state and how often it has left a processor."""
    workers = {}
    for task in _TASKS.iterdir() if _TASKS.is_dir() else ():
        try:
            if (task / "comm").read_text().strip() == _WORKER:
                status = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
                switches = int(status["voluntary_ctxt_switches"]) + int(status["nonvoluntary_ctxt_switches"])
                workers[task.name] = status["State"].split()[0], switches
        except (FileNotFoundError, ProcessLookupError):  # the thread has ended
            continue
    return workers
