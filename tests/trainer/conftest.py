"""One launch per world size, shared by all tests of this folder."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.harness import accelerate_launch


class Launches:
    """Results of the launched script by world size; each is started when first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.of = cache(self._launch)

    def path(self, world_size: int) -> Path:
        return self.folder / f"world{world_size}"

    def _launch(self, world_size: int) -> dict[str, Any]:
        self.path(world_size).mkdir()
        accelerate_launch(["tests/trainer/train_script.py", str(self.path(world_size))], world_size, timeout=560)
        return json.loads((self.path(world_size) / "results.json").read_text())


@pytest.fixture(scope="session")
def launches(tmp_path_factory) -> Launches:
    return Launches(tmp_path_factory.mktemp("launches"))
