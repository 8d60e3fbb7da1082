"""One launch per family of engines and world size, shared by all tests of this folder and all workers."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.support.harness import accelerate_launch, launch_forked
from tests.trainer.conftest import shared_folder

# DeepSpeed takes its device from `use_cpu`, FSDP version 1 from Accelerate's own variable.
ENVIRONMENTS = {
    "ZeRO": {"ACCELERATE_USE_CPU": "false"},
    "FSDP": {"ACCELERATE_TORCH_DEVICE": "cpu"},
}


class EngineLaunches:
    """Results of the script by family and world size. It is launched when they are first needed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.results = cache(self._launch)

    def path(self, family: str, world_size: int) -> Path:
        return self.folder / f"{family}-{world_size}"

    def _launch(self, family: str, world_size: int) -> dict[str, Any]:
        if (family, world_size) == ("FSDP", 4):
            self.results("FSDP", 2)  # four processes resume from its checkpoints
        folder = self.path(family, world_size)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                folder.mkdir()
                command = ["tests/engines/train_script.py", str(folder), family]
                start = accelerate_launch if world_size == 2 else launch_forked
                start(command, world_size, ENVIRONMENTS.get(family), timeout=560)
            return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="session")
def engine_launches(tmp_path_factory) -> EngineLaunches:
    return EngineLaunches(shared_folder(tmp_path_factory, "engine_launches"))
