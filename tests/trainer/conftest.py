"""One launch per world size, shared by all tests of this folder, also by several workers (pytest -n)."""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.harness import accelerate_launch


class Launches:
    """Results of the launched script by world size; each is started when first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.of = cache(self._launch)

    def path(self, world_size: int) -> Path:
        return self.folder / f"world{world_size}"

    def _launch(self, world_size: int) -> dict[str, Any]:
        folder = self.path(world_size)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                folder.mkdir()
                accelerate_launch(["tests/trainer/train_script.py", str(folder)], world_size, timeout=560)
            return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="session")
def launches(tmp_path_factory) -> Launches:
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "launches"
    folder.mkdir(exist_ok=True)
    return Launches(folder)
