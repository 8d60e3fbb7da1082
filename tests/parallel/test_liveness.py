"""The watch of all ranks: who stalls is named, who fails is repeated, and only stalls end a process."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from unittest import mock

import pytest
import torch.distributed as dist

from ring_hf.parallel import LivenessWatch, liveness, sigterm

# The end of the process is replaced by that of the thread.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(autouse=True)
def fast():
    exits = []

    def leave(code):
        exits.append(code)
        sys.exit()  # ends the thread

    with (
        mock.patch.multiple(liveness, INTERVAL=0.02, PATIENCE=0.5),
        mock.patch.object(liveness.os, "_exit", leave),
        mock.patch.object(liveness.multiprocessing, "active_children", list),  # those of pytest serve other tests
    ):
        yield exits


@pytest.fixture
def watches(request):
    """Two ranks in one process, whose main threads are "in the forward pass" and "in the collator"."""
    store, made = dist.HashStore(), []

    def make(timeouts, is_active=(True, True)):
        for rank, position in enumerate(("the forward pass", "the collator")):
            watch = LivenessWatch(
                store,
                rank,
                2,
                timeouts[rank],
                lambda frames, position=position: position,
                lambda frames, active=is_active[rank]: active,
            )
            watch.record_progress(step=7)
            made.append(watch)
        return made

    yield make
    for watch in made:
        watch.stop()


def wait_until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_a_rank_without_progress_ends_and_says_where_all_are(watches, fast, capsys):
    first, second = watches((0.3, 60))
    second.start()
    assert wait_until(lambda: second.store.check(["ring_hf/liveness/report/1"]))
    first.start()
    assert wait_until(lambda: fast == [liveness.EXIT_CODE])
    text = capsys.readouterr().err
    assert "rank 0 has made no progress for 0.3 s and ends, in the forward pass of optimizer step 7" in text
    assert "rank 1 was last heard of in the collator of optimizer step 7" in text
    assert "Rank 1 was in the collator of optimizer step 7." in text  # said by rank 1


def test_workers_of_a_rank_end_with_it(watches, fast):
    watch, _ = watches((0.3, 60))
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    worker.start()
    with mock.patch.object(liveness.multiprocessing, "active_children", lambda: [worker]):
        watch.start()
        assert wait_until(lambda: fast == [liveness.EXIT_CODE])
    worker.join(10)
    assert worker.exitcode == -signal.SIGKILL


def test_progress_pauses_and_other_code_keep_a_rank_alive(watches, fast):
    working, elsewhere = watches((0.3, 0.3), is_active=(True, False))
    working.start()
    elsewhere.start()
    for _ in range(20):
        working.record_progress()
        time.sleep(0.03)
    working.pause()
    time.sleep(0.5)
    assert fast == []


def test_a_failure_is_noted_and_repeated_by_the_other_rank(watches, fast, capsys):
    failing, other = watches((60, 60))
    other.start()
    assert wait_until(lambda: other.store.check(["ring_hf/liveness/report/1"]))
    try:
        raise MemoryError("no memory left\nmore lines")
    except MemoryError as error:
        failing.report_failure(error)
        (note,) = error.__notes__
    failing.wait_until_repeated()
    assert "rank 0 failed in the forward pass of optimizer step 7." in note
    assert "rank 1 was last heard of in the collator of optimizer step 7" in note
    text = capsys.readouterr().err
    assert "rank 0 failed in the forward pass of optimizer step 7 (MemoryError: no memory left)" in text
    assert "Rank 1 was in the collator" in text and fast == []


def test_a_rank_that_still_waits_for_a_failed_one_ends(watches, fast, capsys):
    failing, other = watches((60, 60))
    with mock.patch.object(liveness, "GRACE", 0.2):
        other.start()
        failing.report_failure(RuntimeError("broken"))
        assert wait_until(lambda: fast == [liveness.EXIT_CODE])
    assert "rank 1 still waits for a rank that has failed" in capsys.readouterr().err


def test_a_second_failure_names_the_first(watches):
    first, second = watches((60, 60))
    first.report_failure(ValueError("the cause"))
    error = RuntimeError("Connection closed by peer")
    second.report_failure(error)
    assert "Before that, rank 0 failed in the forward pass of optimizer step 7 (ValueError: the cause)" in str(
        error.__notes__
    )


def test_sigterm_while_the_main_thread_waits_says_where_all_are(watches, fast, capsys):
    ended, other = watches((60, 60))
    other._report()
    ended.start()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=1))
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(dist.DistStoreError):
        store.wait(["never set"])  # in C++, where no handler of Python runs
    assert fast == [128 + signal.SIGTERM]
    text = capsys.readouterr().err
    assert (
        "rank 0 was ended by SIGTERM, in the forward pass of optimizer step 7. Of the other ranks: rank 1 was" in text
    )


def test_sigterm_after_a_failure_of_another_rank_adds_nothing(watches, fast, capsys):
    failing, ended = watches((60, 60))
    ended.start()
    failing.report_failure(ValueError("the cause"))
    failing.wait_until_repeated()
    assert "the cause" in capsys.readouterr().err
    os.kill(os.getpid(), signal.SIGTERM)
    assert wait_until(lambda: fast == [128 + signal.SIGTERM])
    assert "SIGTERM" not in capsys.readouterr().err


def test_sigterm_waits_until_a_failure_is_logged(watches, fast):
    failing, _ = watches((60, 60))
    failing.start()
    failing.report_failure(ValueError("the cause"))
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
    assert fast == []
    failing.wait_until_repeated()
    assert wait_until(lambda: fast == [128 + signal.SIGTERM])


@pytest.mark.parametrize("delay", [0, 0.2])
def test_forked_processes_end_by_sigterm_as_always(watches, fast, delay):
    watch, _ = watches((60, 60))
    watch.start()
    for _ in range(1 if delay else 20):
        child = os.fork()
        if child == 0:
            time.sleep(10)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(delay)
        os.kill(child, signal.SIGTERM)  # at once: before the child runs any code of its own
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    time.sleep(0.2)
    assert fast == [] and signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


@pytest.mark.parametrize("fails_at", ["a report", "the end"])
def test_sigterm_ends_a_rank_whose_watch_has_failed(watches, fast, capsys, fails_at):
    watch, _ = watches((60, 60))
    asked = threading.Event()

    def describe(frames):
        asked.set()
        raise KeyError("unforeseen")

    watch._describe = describe
    if fails_at == "the end":
        watch.pause()  # no report
    watch.start()
    assert fails_at == "the end" or asked.wait(5)
    os.kill(os.getpid(), signal.SIGTERM)
    assert wait_until(lambda: fast == [128 + signal.SIGTERM])
    text = capsys.readouterr().err
    assert "rank 0 no longer watches the other ranks, after" in text and "KeyError: 'unforeseen'" in text


def test_a_handler_of_the_user_keeps_sigterm(watches, fast):
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append("before"))
    try:
        first, second = watches((60, 60))
        first.start()
        os.kill(os.getpid(), signal.SIGTERM)
        first.stop()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        second.start()
        signal.signal(signal.SIGTERM, lambda *_: received.append("later"))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        second.stop()
        assert received == ["before", "later"] and fast == []
        assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, sigterm._leave_to_thread)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sigterm_arrives_beside_an_event_loop(watches, fast):
    watch, _ = watches((60, 60))
    watch.start()
    own = signal.set_wakeup_fd(-1)  # as `loop.add_signal_handler` replaces it
    os.kill(os.getpid(), signal.SIGTERM)
    assert wait_until(lambda: fast == [128 + signal.SIGTERM])
    signal.set_wakeup_fd(own)


def test_the_end_of_the_watch_gives_sigterm_back(watches):
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    watch, _ = watches((60, 60))
    watch.start()
    assert signal.getsignal(signal.SIGTERM) is sigterm._leave_to_thread
    watch.stop()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and signal.set_wakeup_fd(-1) == -1


def test_one_thread_watches_and_ends_before_the_interpreter(watches):
    num_threads = threading.active_count()
    (watch, _) = watches((60, 60))
    watch.start()
    assert threading.active_count() == num_threads + 1
    watch.stop()
    assert threading.active_count() == num_threads
