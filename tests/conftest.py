"""Settings for every test: poisoned buffers, one hypothesis profile, workers stopped at the end."""

import gc
import os
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported: threads of OpenMP that wait spin, and several workers on two cores then mostly wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from ring_hf.testing import poison_empty
from tests.support.harness import stop_workers

settings.register_profile("ring_hf", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.load_profile("ring_hf")
poison_empty()
# What waits for processes most begins first, so that no worker ends alone.
_FIRST = ("engines", "trainer", "silent", "repository", "recipes", "scripts", "verify", "parallel", "hf", "memory")


def pytest_collection_modifyitems(items):
    """The order of folders; within one it stays."""

    def rank_of_item(item):
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        return _FIRST.index(folder) if folder in _FIRST else len(_FIRST)

    items.sort(key=rank_of_item)


def pytest_collection_finish(session):
    gc.collect()
    gc.freeze()  # see tests/support/freeze.py


@pytest.fixture(scope="session", autouse=True)
def _own_dataset_cache(tmp_path_factory):
    """Datasets are cached in a folder of this session, shared by the processes that the tests start."""
    folder = str(tmp_path_factory.mktemp("datasets"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", folder)
        if "datasets" in sys.modules:  # it has read the variable
            patch.setattr(sys.modules["datasets"].config, "HF_DATASETS_CACHE", folder)
        yield


@pytest.fixture(scope="session", autouse=True)
def _stop_workers():
    yield
    stop_workers()
