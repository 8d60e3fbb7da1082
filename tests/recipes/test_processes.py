"""A launch never outlives the driver, whatever is killed, and leaves no process behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from tests.support.harness import ROOT

# A driver, a launcher and a rank in a session of its own, as torchrun starts it; each writes its process id.
DRIVER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {recipes!r})
from processes import Interrupted, run_child
folder = Path({folder!r})
(folder / "driver").write_text(str(os.getpid()))
ticks = []
try:
    code = run_child([sys.executable, str(folder / "launcher.py")], folder / "output.log", dict(os.environ),
                     lambda: ticks.append(1))
except Interrupted as error:
    print("interrupted by", error, flush=True)
    sys.exit(128 + error.number)
print("ended with", code, len(ticks) > 0, flush=True)
"""
LAUNCHER = """
import os, signal, subprocess, sys, time
from pathlib import Path
folder = Path({folder!r})
(folder / "launcher").write_text(str(os.getpid()))
rank = subprocess.Popen([sys.executable, str(folder / "rank.py")], start_new_session=True)
signal.signal(signal.SIGTERM, lambda *_: rank.terminate())
print("launched", flush=True)
while rank.poll() is None and not ({leaves} and (folder / "rank").exists()):
    time.sleep(0.05)
sys.exit(abs(rank.returncode or 0))
"""
RANK = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {recipes!r})
if {watches}:
    from processes import end_with_parent
    end_with_parent()
Path({folder!r}, "rank").write_text(str(os.getpid()))
time.sleep({seconds})
"""


class Launch:
    """A driver that runs, and the process ids of all three."""

    def __init__(self, folder, leaves=False, watches=True, seconds=60):
        self.folder = folder
        values = {"recipes": str(ROOT / "recipes"), "folder": str(folder)}
        values |= {"leaves": leaves, "watches": watches, "seconds": seconds}
        for name, text in {"driver.py": DRIVER, "launcher.py": LAUNCHER, "rank.py": RANK}.items():
            (folder / name).write_text(textwrap.dedent(text).format(**values))
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(folder / "driver.py")]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self.processes = {name: psutil.Process(self.wait_for(name)) for name in ("driver", "launcher", "rank")}

    def wait_for(self, name):
        path = Path(self.folder, name)
        deadline = time.monotonic() + 60
        while not (path.exists() and path.read_text()):
            assert time.monotonic() < deadline, f"no {name}: {(self.folder / 'output.log').read_text()}"
            time.sleep(0.02)
        return int(path.read_text())

    def end(self):
        """Return the exit status and the output of the driver, when nothing of it is left."""
        output, _ = self.process.communicate(timeout=60)
        _, alive = psutil.wait_procs([self.processes["launcher"], self.processes["rank"]], timeout=20)
        assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
        return self.process.returncode, output


def test_a_launch_that_ends_reports_its_status_and_output(tmp_path):
    launch = Launch(tmp_path, seconds=0.5)
    assert launch.end() == (0, "ended with 0 True\n")
    assert "launched" in (tmp_path / "output.log").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_launcher_and_ranks_first(tmp_path, number):
    launch = Launch(tmp_path)
    launch.process.send_signal(number)
    assert launch.end() == (128 + number, f"interrupted by {number.name}\n")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux tells children that their parent died")
@pytest.mark.parametrize("victims", [("driver",), ("driver", "launcher"), ("launcher",), ("rank",)], ids="+".join)
def test_no_process_survives_a_kill(tmp_path, victims):
    launch = Launch(tmp_path)
    for name in victims:
        launch.processes[name].kill()
    code, output = launch.end()
    if "driver" in victims:
        assert code == -signal.SIGKILL
    else:
        assert code == 0 and output == f"ended with {-9 if victims == ('launcher',) else 9} True\n"


def test_ranks_that_a_launcher_leaves_behind_are_ended(tmp_path):
    launch = Launch(tmp_path, leaves=True, watches=False)
    assert launch.end() == (0, "ended with 0 True\n")
