"""Settings for every test: poisoned buffers, one hypothesis profile, workers stopped at the end."""

import os

import pytest
from hypothesis import HealthCheck, settings

from tests.harness import poison_empty, stop_workers

os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile("ring_hf", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.load_profile("ring_hf")
poison_empty()


@pytest.fixture(scope="session", autouse=True)
def _stop_workers():
    yield
    stop_workers()
