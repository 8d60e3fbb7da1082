"""Know where every rank is: errors that name rank and phase, and an end in bounded time when a rank stalls.

A rank that waits in a collective cannot tell for whom. The timeouts of process groups end the wait, but their message
names no rank; torch's flight recorder and `monitored_barrier` name one only for collectives that they run themselves.
So a thread of each process writes once a second where its main thread is into the store that made the processes'
group, over a connection of its own. Nothing is added to a training step but a counter.

- A process that ends with an exception says so in the store, and adds to the exception where every other rank was last
  heard of. It waits up to `PATIENCE` for the others to repeat it, since launchers kill the other ranks at once.
- The others log which rank failed, and in which phase. A main thread that then waits on a device for longer than
  `GRACE` is ended: NCCL's collectives do not fail when a peer is gone.
- A process without progress for `timeout` says where all ranks are and exits with `EXIT_CODE`.
- A process that gets SIGTERM says where it is and where the others were last heard of.

A killed process says nothing. Its peers' connections break under gloo, and their exceptions tell when and where it was
last heard of. Under NCCL, or if the launcher is faster, they do so when they get its SIGTERM. Without a launcher, this
watch ends the peers after `timeout`.
"""

import atexit
import contextlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from .sigterm import SigtermEvent

INTERVAL = 1.0  # seconds between two reports of a rank
PATIENCE = 5.0  # seconds that a failed rank waits until the others have repeated its error
GRACE = 30.0  # seconds after another rank's failure, as torchrun gives ranks between SIGTERM and SIGKILL
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed

_PREFIX = "ring_hf/liveness"


class LivenessWatch:
    """Reports where this process is, and watches the others.

    Args:
        store: through which the processes report, used by no other thread.
        rank, num_ranks: of the default group.
        timeout: seconds without progress after which this process ends.
        describe: returns in words where a stack is, of its frames, the outermost first.
        is_active: returns whether the main thread is still inside the code that reports progress; called with its
            frames. While it is not, nothing times out.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        num_ranks: int,
        timeout: float,
        describe: Callable[[list[types.FrameType]], str],
        is_active: Callable[[list[types.FrameType]], bool],
    ) -> None:
        self.store, self.rank, self.num_ranks, self.timeout = store, rank, num_ranks, timeout
        self._describe, self._is_active = describe, is_active
        self._process, self._main = os.getpid(), threading.main_thread().ident
        self._stopped, self._paused = threading.Event(), False
        self._sigterm = SigtermEvent()
        self._step: int | None = None
        self._last_progress = time.monotonic()
        self._report_of_host: dict[str, Any] | None = None  # of rank 0, with which the store may go
        self._num_reports = 0
        self._has_failed = False
        self._has_logged = threading.Event()  # after a failure of the main thread
        self._thread = threading.Thread(target=self._run, name="ring_hf liveness", daemon=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> "LivenessWatch":
        return self  # it belongs to the process: a copy of a model (for an average of its weights) copies its hooks

    def start(self) -> None:
        self._sigterm.install()
        self._thread.start()

    def stop(self) -> None:
        """End the thread. The interpreter must not end before: the thread may be inside a call of the store."""
        self._stopped.set()
        if self._process == os.getpid() and self._thread.is_alive():
            self._sigterm.wake()
            self._thread.join(2 * PATIENCE)  # a host that is lost may let a call of the store wait
        self._sigterm.remove()
        if not self._thread.is_alive():
            self._sigterm.close()

    def record_progress(self, step: int | None = None) -> None:
        """Record that the main thread has come further.

        Args:
            step: number of the optimizer step that is being trained, for messages.
        """
        self._last_progress = time.monotonic()
        self._step = self._step if step is None else step

    def resume(self) -> None:
        self.record_progress()
        self._paused = False

    def pause(self) -> None:
        """Let this process take any time, until `resume`."""
        self._paused = True

    # In the main thread, at its end

    def report_failure(self, error: BaseException) -> None:
        """Say that this process ends with an exception: to the other ranks, and in a note of the exception."""
        if self._has_failed or self._process != os.getpid():
            return
        self._has_failed = True
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        position = self._describe(frames)
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        text = f"rank {self.rank} failed in {self._in_step(position)} ({reason[:300]})"
        try:
            first = self._publish_failure(text)
            self.store.set(f"{_PREFIX}/repeated/{self.rank}", "")
            others = self._list_others()
        except RuntimeError:  # the process that hosts the store has ended
            first, others = None, self._describe_lost_store()
        note = f"ring_hf: rank {self.rank} failed in {self._in_step(position)}."
        if first is not None and reason[:300] not in first:  # else all raise the same error
            note += f" Before that, {first}."
        error.add_note(f"{note} Of the other ranks: {others}.")

    def wait_until_repeated(self) -> None:
        """Give the other ranks time to log this rank's failure, which is logged here, before a launcher ends them."""
        self._has_logged.set()
        if not self._has_failed or self._paused or self._process != os.getpid():
            return
        deadline = time.monotonic() + PATIENCE
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < deadline:
                if all(self.store.check([f"{_PREFIX}/repeated/{rank}"]) for rank in self._others()):
                    return
                time.sleep(0.05)

    # In the thread

    def _run(self) -> None:
        try:
            self._watch_ranks()
        except Exception:
            _write(f"ring_hf: rank {self.rank} no longer watches the other ranks, after\n{traceback.format_exc()}")
            while not self._stopped.is_set():  # no other thread can end this process by SIGTERM
                if self._sigterm.wait(INTERVAL):
                    self._exit("", 128 + signal.SIGTERM)

    def _watch_ranks(self) -> None:
        failed_at: float | None = None
        while not self._stopped.is_set():
            if self._sigterm.wait(INTERVAL):
                self._end_by_sigterm(has_repeated=failed_at is not None)
            if self._paused or self._stopped.is_set():
                continue
            try:
                self._report()
                if failed_at is None and self._repeat_failure():
                    failed_at = time.monotonic()
                active = self._is_active(self._main_frames())
                if not active:
                    self._last_progress = time.monotonic()
                elif failed_at is not None and time.monotonic() - failed_at > min(GRACE, self.timeout):
                    self._end("still waits for a rank that has failed")
                elif time.monotonic() - self._last_progress > self.timeout:
                    self._end(f"has made no progress for {self.timeout:g} s")
            except RuntimeError:
                if time.monotonic() - self._last_progress > self.timeout and self._is_active(self._main_frames()):
                    self._exit(
                        f"ring_hf: rank {self.rank} has made no progress for {self.timeout:g} s, in "
                        f"{self._in_step(self._describe(self._main_frames()))}. {self._describe_lost_store()}."
                    )

    def _report(self) -> None:
        frames = self._main_frames()
        self._num_reports += 1
        report = {
            "number": self._num_reports,
            "position": self._in_step(self._describe(frames)),
            "idle": time.monotonic() - self._last_progress,
        }
        self.store.set(f"{_PREFIX}/report/{self.rank}", json.dumps(report))
        if self.rank != 0 and self.store.check([f"{_PREFIX}/report/0"]):
            self._report_of_host = json.loads(self.store.get(f"{_PREFIX}/report/0"))

    def _repeat_failure(self) -> bool:
        """Log the first failure of another rank; return whether there is one."""
        if self._has_failed or not self.store.check([f"{_PREFIX}/failure"]):
            return False
        text = self.store.get(f"{_PREFIX}/failure").decode()
        if text.startswith(f"rank {self.rank} "):
            return False
        position = self._in_step(self._describe(self._main_frames()))
        _write(f"ring_hf: {text}. Rank {self.rank} was in {position}.")
        self.store.set(f"{_PREFIX}/repeated/{self.rank}", "")
        return True

    def _end(self, reason: str) -> None:
        position = self._in_step(self._describe(self._main_frames()))
        text = f"rank {self.rank} {reason} and ends, in {position}"
        self._publish_failure(text)
        self._has_failed = True
        self.store.set(f"{_PREFIX}/repeated/{self.rank}", "")
        _write(
            f"ring_hf: {text}. Of the other ranks: {self._list_others()}. A rank in an exchange or a collective waits "
            "for one that is not there yet: look at those elsewhere. If all are, they wait in different ones."
        )
        self.wait_until_repeated()
        self._exit("")

    def _end_by_sigterm(self, has_repeated: bool) -> None:
        """End as by SIGTERM, once this process has logged why.

        Args:
            has_repeated: whether it has logged the failure of another rank.
        """
        text = ""
        if self._has_failed:
            self._has_logged.wait(PATIENCE)
        elif not has_repeated:
            try:
                others = self._list_others()
            except RuntimeError:
                others = self._describe_lost_store()
            position = self._in_step(self._describe(self._main_frames()))
            text = f"ring_hf: rank {self.rank} was ended by SIGTERM, in {position}. Of the other ranks: {others}."
        self._exit(text, 128 + signal.SIGTERM)

    def _exit(self, text: str, code: int = EXIT_CODE) -> None:
        _write(text)
        for child in multiprocessing.active_children():  # a worker of a data loader looks for us between batches only
            child.kill()
        os._exit(code)  # the main thread cannot be woken up

    # Both

    def _publish_failure(self, text: str) -> str:
        """Write this rank's failure if it is the first one; return the first one."""
        if self.store.add(f"{_PREFIX}/failures", 1) == 1:
            self.store.set(f"{_PREFIX}/failure", text)
            return text
        self.store.wait([f"{_PREFIX}/failure"], timedelta(seconds=PATIENCE))
        return str(self.store.get(f"{_PREFIX}/failure").decode())

    def _describe_lost_store(self) -> str:
        host = "" if self._report_of_host is None else f"; rank 0 {_describe_report(self._report_of_host)}"
        return f"the store of the processes has gone with the process that hosts it{host}"

    def _list_others(self) -> str:
        listed = []
        for rank in self._others():
            key = f"{_PREFIX}/report/{rank}"
            if not self.store.check([key]):
                listed.append(f"rank {rank} has not reported yet")
                continue
            listed.append(f"rank {rank} {_describe_report(json.loads(self.store.get(key)))}")
        return "; ".join(listed)

    def _others(self) -> list[int]:
        return [rank for rank in range(self.num_ranks) if rank != self.rank]

    def _in_step(self, position: str) -> str:
        return position if self._step is None else f"{position} of optimizer step {self._step}"

    def _main_frames(self) -> list[types.FrameType]:
        """Return the frames of the main thread, the outermost first."""
        frames, frame = [], sys._current_frames().get(self._main or 0)
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back
        return frames[::-1]


def _describe_report(report: dict[str, Any]) -> str:
    idle = f", without progress for {report['idle']:.0f} s" if report["idle"] >= 2 * INTERVAL else ""
    return f"was last heard of in {report['position']}{idle}"


def _write(text: str) -> None:
    if text:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


_watch: LivenessWatch | None = None


def watch_ranks(
    timeout: float,
    describe: Callable[[list[types.FrameType]], str],
    is_active: Callable[[list[types.FrameType]], bool],
) -> LivenessWatch | None:
    """Watch all processes of the default group, until this one exits; see `LivenessWatch`. A collective call.

    Args:
        timeout: seconds without progress after which a process ends.
        describe, is_active: see `LivenessWatch`.

    Returns:
        The watch of this process, the same for every call (with the new timeout); None if there is one process.
    """
    global _watch
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    if _watch is not None and _watch._process == os.getpid() and not _watch._stopped.is_set():
        _watch.timeout, _watch._describe, _watch._is_active = timeout, describe, is_active
    else:
        default: Any = distributed_c10d._get_default_store()
        store = default.clone()
        store.set_timeout(timedelta(seconds=PATIENCE))
        _watch = LivenessWatch(store, dist.get_rank(), dist.get_world_size(), timeout, describe, is_active)
        _watch.start()
        atexit.register(_watch.stop)
        _report_uncaught_exceptions(_watch)
    _watch.resume()
    return _watch


def _report_uncaught_exceptions(watch: LivenessWatch) -> None:
    original = sys.excepthook

    def report(kind: type[BaseException], error: BaseException, origin: types.TracebackType | None) -> None:
        if isinstance(error, Exception):
            watch.report_failure(error)
        original(kind, error, origin)
        watch.wait_until_repeated()

    sys.excepthook = report
