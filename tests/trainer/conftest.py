"""One launch per script and world size, shared by all tests of this folder and all workers (pytest -n)."""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.support.harness import accelerate_launch, launch_forked


class Launches:
    """Results of a script by world size. It is launched when they are first needed."""

    def __init__(self, folder: Path, script: str):
        self.folder = folder
        self.script = script
        self.results = cache(self._launch)

    def path(self, world_size: int) -> Path:
        return self.folder / f"world{world_size}"

    def _launch(self, world_size: int) -> dict[str, Any]:
        folder = self.path(world_size)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                folder.mkdir()
                start = accelerate_launch if world_size == 2 else launch_forked
                start([f"tests/trainer/{self.script}", str(folder)], world_size, timeout=560)
            return json.loads((folder / "results.json").read_text())


def shared_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    """Return a folder that is the same for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def launches(tmp_path_factory) -> Launches:
    return Launches(shared_folder(tmp_path_factory, "launches"), "train_script.py")


@pytest.fixture(scope="session")
def wrapper_launches(tmp_path_factory) -> Launches:
    launches = Launches(shared_folder(tmp_path_factory, "wrapper_launches"), "wrapper_script.py")
    launches.results(1)  # two processes resume from its checkpoint
    return launches
