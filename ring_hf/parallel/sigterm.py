"""SIGTERM as an event that a thread waits for.

When a rank was killed, launchers send SIGTERM to the others at once, and by default that ends them before they have
said where they were. Python runs handlers of signals in the main thread between two bytecodes, so that none runs while
the main thread waits in a collective. `signal.set_wakeup_fd` writes the number of a signal to a socket as soon as it
arrives, and any thread can read that.
"""

import contextlib
import os
import signal
import socket
import threading
import types


class SigtermEvent:
    """SIGTERM of this process. While it is installed, the signal does not end the process; the thread that calls
    `wait` has to.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._has_arrived = False

    def install(self) -> None:
        """Install the handler, unless there is another one or this is not the main thread."""
        global _installed
        is_default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        if not is_default or threading.current_thread() is not threading.main_thread():
            return
        previous = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        if previous != -1:  # of an event loop
            signal.set_wakeup_fd(previous)
            return
        signal.signal(signal.SIGTERM, _leave_to_thread)
        _installed = self

    def remove(self) -> None:
        """Restore the default action of SIGTERM, in the main thread. A handler that was installed later stays."""
        global _installed
        if _installed is not self or threading.current_thread() is not threading.main_thread():
            return
        _installed = None
        if signal.getsignal(signal.SIGTERM) is _leave_to_thread:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        previous = signal.set_wakeup_fd(-1)
        if previous != self._writer.fileno():
            signal.set_wakeup_fd(previous)

    def wait(self, timeout: float) -> bool:
        """Wait for SIGTERM, for any other signal, or for `wake`.

        Args:
            timeout: in seconds.

        Returns:
            Whether SIGTERM has arrived, now or before, and nothing else handles it.
        """
        if self._has_arrived:
            return True
        self._reader.settimeout(timeout)
        try:
            numbers = self._reader.recv(4096)
        except TimeoutError:
            return False
        self._has_arrived = signal.SIGTERM in numbers and signal.getsignal(signal.SIGTERM) is _leave_to_thread
        return self._has_arrived

    def close(self) -> None:
        """Close the socket, once no thread waits and nothing is installed."""
        self._reader.close()
        self._writer.close()

    def wake(self) -> None:
        """End a `wait`."""
        self._send(b"\0")

    def _send(self, number: bytes) -> None:
        with contextlib.suppress(BlockingIOError):
            self._writer.send(number)


def _leave_to_thread(number: int, frame: types.FrameType | None) -> None:
    """The handler. The thread has read the signal already, unless an event loop has set a wakeup fd of its own."""
    if _installed is not None:
        _installed._send(bytes([number]))


_installed: SigtermEvent | None = None


class _Forking(threading.local):
    mask: set[signal.Signals] | set[int] | None = None  # of the thread that forks, before


_forking = _Forking()


def _before_fork() -> None:
    if _installed is not None:
        _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _after_fork() -> None:
    if _forking.mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)
        _forking.mask = None


def _after_fork_in_child() -> None:
    # A forked process, such as a worker of a data loader, would write its own signals into the parent's socket. One
    # that has arrived by now waits until the mask is restored.
    if _installed is not None:
        _installed.remove()
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
