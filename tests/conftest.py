"""Settings for every test: poisoned buffers, one hypothesis profile, workers stopped at the end."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.harness import poison_empty, stop_workers

os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile("ring_hf", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.load_profile("ring_hf")
poison_empty()
# What waits for processes most begins first, so that no worker ends alone.
_FIRST = ("trainer", "recipes", "distributed")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    """For several workers (pytest -n): tests that share processes stay together, those of a file or of the Trainer."""

    def folder(item):
        return item.path.relative_to(Path(__file__).parent).parts[0]

    for item in items:
        group = folder(item) if folder(item) == "trainer" else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: _FIRST.index(folder(item)) if folder(item) in _FIRST else len(_FIRST))


@pytest.fixture(scope="session", autouse=True)
def _stop_workers():
    yield
    stop_workers()
