"""A launch as a child process that never outlives this one, and leaves no process behind.

Launchers start their ranks in sessions of their own, so a signal to a process group does not reach them. Three things
make up for it, the last two on Linux only: the launcher is told to end, and ends its ranks; a rank is killed by the
kernel when its launcher dies (`end_with_parent`); and ranks whose launcher died first become children of this process
(a "child subreaper", see prctl(2)), which kills whatever is left.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import psutil

PARENT_DEATH, SUBREAPER = 1, 36  # options of prctl(2)
VARIABLE = "RING_HF_END_WITH_PARENT"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 40.0  # seconds to end after a signal; torchrun gives its ranks 30
POLL = 0.5  # seconds


class Interrupted(Exception):
    """A signal ended the launch; `number` is that of the signal."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def prctl(option: int, value: int) -> None:
    """Call prctl(2) where it exists."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, if a driver asked for it."""
    parent = os.environ.get(VARIABLE)
    if parent is not None:
        prctl(PARENT_DEATH, signal.SIGKILL)


def run_child(command: list[str], log: Path, environment: dict[str, str], report: Callable[[], None]) -> int:
    """Run a command until it ends, its output appended to a file, and return its exit status.

    Args:
        report: called about twice a second.

    Raises:
        Interrupted: after SIGINT, SIGTERM or SIGHUP, when all its processes have ended. A second signal kills them.
    """
    prctl(SUBREAPER, 1)
    driver = os.getpid()

    def prepare() -> None:
        prctl(PARENT_DEATH, signal.SIGTERM)
        if os.getppid() != driver:  # it died before the line above
            os._exit(1)

    with log.open("ab") as file, _forward_signals() as received:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**environment, VARIABLE: "1"},
            start_new_session=True,
            preexec_fn=prepare,  # one prctl; there are no threads of ours that could hold a lock
        )
        try:
            code = _wait(child, received, report)
        finally:
            end_descendants()
    report()
    if received:
        raise Interrupted(received[0])
    return code


def _wait(child: "subprocess.Popen[bytes]", received: list[int], report: Callable[[], None]) -> int:
    num_sent, deadline = 0, float("inf")
    while True:
        try:
            return child.wait(POLL)
        except subprocess.TimeoutExpired:
            report()
        if len(received) > num_sent:
            num_sent = len(received)
            deadline = min(deadline, time.monotonic() + GRACE) if num_sent == 1 else 0.0
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
        if time.monotonic() > deadline:
            return child.returncode or 1  # the caller kills it


@contextlib.contextmanager
def _forward_signals() -> Iterator[list[int]]:
    """Collect the signals that would end this process, in the order in which they come."""
    received: list[int] = []

    def collect(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, collect) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def end_descendants() -> None:
    """Kill all processes that descend from this one, also those whose parent has died."""
    left = psutil.Process().children(recursive=True)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=10)
