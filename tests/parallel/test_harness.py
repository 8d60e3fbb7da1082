"""The harness itself: forked processes have everything imported, and what goes wrong in one of them shows."""

import sys

import pytest

from tests.support.harness import launch_forked, start_workers

SCRIPT = """
import os, sys, time
print("rank", os.environ.get("RANK"), "of", os.environ.get("WORLD_SIZE"), sys.argv[1:], __name__, flush=True)
if sys.argv[1] == "fails" and os.environ["RANK"] == "1":
    sys.exit("rank 1 has failed")
if sys.argv[1] in ("fails", "hangs"):
    time.sleep(600)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def has_imported(rank, world_size, name):
    return name in sys.modules


def test_new_workers_have_imported_everything():
    """The server leaves out what it cannot import, and then every worker would take seconds."""
    workers = start_workers(1)
    try:
        assert workers.run(has_imported, 1, "ring_hf.hf.trainer.parallelism_config", timeout=120) == [True]
    finally:
        workers.stop()


def test_forked_scripts_find_rank_and_arguments(script):
    assert launch_forked([script, "a", "b"]) == "rank None of None ['a', 'b'] __main__\n"
    two = launch_forked([script, "a"], 2)
    assert two == "rank 0 of 2 ['a'] __main__\nrank 1 of 2 ['a'] __main__\n"


def test_a_forked_script_that_fails_ends_its_peers_and_shows_its_output(script):
    with pytest.raises(AssertionError, match=r"(?s)exit codes \[-9, 1\].*rank 1 has failed"):
        launch_forked([script, "fails"], 2)
    with pytest.raises(TimeoutError, match=r"1 ranks did not end in 1 s"):
        launch_forked([script, "hangs"], timeout=1)
