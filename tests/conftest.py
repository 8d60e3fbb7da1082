"""Settings for every test: poisoned buffers, one hypothesis profile, workers stopped at the end."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from ring_hf.testing import poison_empty
from tests.harness import stop_workers

os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile("ring_hf", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.load_profile("ring_hf")
poison_empty()
# What waits for processes most begins first, so that no worker ends alone.
_FIRST = ("engines", "trainer", "silent", "recipes", "verify", "distributed", "hf", "memory")


def pytest_collection_modifyitems(items):
    """The order of folders; within one it stays."""

    def rank_of_item(item):
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        return _FIRST.index(folder) if folder in _FIRST else len(_FIRST)

    items.sort(key=rank_of_item)


@pytest.fixture(scope="session", autouse=True)
def _stop_workers():
    yield
    stop_workers()
