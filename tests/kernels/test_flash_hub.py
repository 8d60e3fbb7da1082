"""Kernels of the hub are loaded only if they are named, here through a stand-in for the package `kernels`."""

import importlib
import importlib.metadata
from types import SimpleNamespace

import pytest
import torch

from ring_hf.kernels import candidates, check_name, choose, hub
from tests.support.flash_stand_ins import CALLS, kernel_named, stand_in

HUB = tuple(hub.REPOSITORIES)


def _tensors():
    return (torch.zeros(1, 1, 1, 64, dtype=torch.float64),) * 2


def test_auto_loads_nothing_from_the_hub():
    with stand_in(HUB[0]) as name:
        CALLS.clear()
        assert not set(candidates("auto", *_tensors())) & set(HUB)
        assert choose("auto", *_tensors()) is not kernel_named(name)
        assert CALLS["loaded"] == 0
        assert choose(name, *_tensors()) is choose(name, *_tensors()) is kernel_named(name)
        assert CALLS["loaded"] == 1


def test_names_of_the_hub_are_checked_without_loading():
    with stand_in(HUB[0]):
        CALLS.clear()
        for name in HUB:
            check_name(name)
        names = "kernels-community/flash-attn2, kernels-community/flash-attn3"
        with pytest.raises(ValueError, match=f"'kernels-community/flash-attn5' is not known.* or of the hub {names}"):
            check_name("kernels-community/flash-attn5")
        assert CALLS["loaded"] == 0


def _get_kernel(repo_id, revision=None, version=None):
    return SimpleNamespace()


# Version of the package `kernels` (None: not installed), the module that importing it gives (None: it fails) -> the
# message.
HUB_REFUSALS = {
    "no package": (
        None,
        None,
        r"the package kernels, which loads it from the hub, is not installed; pip install 'kern",
    ),
    "an old package": (
        "0.9.1",
        None,
        r"kernels 0.9.1 cannot load a kernel by the number of its version; pip install 'kern",
    ),
    "broken": (
        "0.18.2",
        None,
        r"kernels 0.18.2 cannot be imported \(ModuleNotFoundError: No module named 'tomlkit'\)",
    ),
    "another package of this name": (
        "1.0.0",
        SimpleNamespace(),
        "could not be loaded .*: .*no attribute 'get_kernel'",
    ),
    "no submodule": ("0.18.2", SimpleNamespace(get_kernel=_get_kernel), "version 1 .* no submodule flash_attn_interf"),
}


@pytest.mark.parametrize("name", HUB_REFUSALS)
def test_hub_kernels_that_cannot_be_loaded_are_refused_by_their_reason(name, monkeypatch):
    version, package, message = HUB_REFUSALS[name]

    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    def import_module(module):
        if package is None:
            raise ModuleNotFoundError("No module named 'tomlkit'")
        return package

    with stand_in("kernels-community/flash-attn3") as kernel, monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", installed)
        patch.setattr(importlib, "import_module", import_module)
        with pytest.raises(ValueError, match=message):
            choose(kernel, *_tensors())


def test_a_missing_hub_kernel_is_refused_with_the_message_of_the_hub():
    message = r"version 1 of it could not be loaded .* \(FileNotFoundError: Cannot find .*vllm-flash-attn3 in the"
    with stand_in("kernels-community/flash-attn3"), pytest.raises(ValueError, match=message):
        choose("kernels-community/vllm-flash-attn3", *_tensors())
