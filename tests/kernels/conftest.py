"""Skips tests of the cuDNN adapter where PyTorch is older than the first version that the adapter serves."""

import pytest
import torch

IS_TOO_OLD = torch.__version__ < (2, 11)
# Tests that run the adapter beside others, which their names do not say.
MORE = {"test_tiles_of_a_step_are_routed_to_two_kernels_by_their_masks", "test_fault_shows[tiles-twice]"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason=f"the cuDNN adapter needs torch 2.11, this is {torch.__version__}")
    for item in items:
        if (
            IS_TOO_OLD
            and item.path.name.startswith(("test_cuda_", "test_selection"))
            and ("cudnn" in item.name or item.name in MORE)
        ):
            item.add_marker(skip)
