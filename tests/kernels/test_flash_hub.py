"""Kernels of the hub: loaded when they are named, through a stand-in for the package `kernels`, never by chance."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from ring_hf.kernels import candidates, check_name, choose, hub
from tests.flash_stand_ins import CALLS, kernel_named, stand_in

HUB = tuple(hub.REPOSITORIES)


def _half():
    return (torch.zeros(1, 1, 1, 64, dtype=torch.float64),) * 2


def test_auto_loads_nothing_from_the_hub():
    with stand_in(HUB[0]) as name:
        CALLS.clear()
        assert not set(candidates("auto", *_half())) & set(HUB)
        assert choose("auto", *_half()) is not kernel_named(name)
        assert CALLS["loaded"] == 0
        assert choose(name, *_half()) is choose(name, *_half()) is kernel_named(name)
        assert CALLS["loaded"] == 1


def test_names_of_the_hub_are_checked_without_loading():
    with stand_in(HUB[0]):
        CALLS.clear()
        for name in HUB:
            check_name(name)
        known = "kernels-community/flash-attn2, kernels-community/flash-attn3"
        with pytest.raises(ValueError, match=f"'kernels-community/flash-attn5' is not known.* or of the hub {known}"):
            check_name("kernels-community/flash-attn5")
        assert CALLS["loaded"] == 0


HUB_REFUSALS = {
    "no package": (
        None,
        r"the package kernels, which loads it .*, is not installed .*; pip install kernels",
    ),
    "another package of this name": (SimpleNamespace(), "the package kernels, .* is not installed"),
    "an old package": (
        SimpleNamespace(get_kernel=lambda repo_id, revision="main": None),
        "cannot load a kernel by version; pip install -U kernels",
    ),
    "no submodule": (
        SimpleNamespace(get_kernel=lambda repo_id, revision=None, version=None: SimpleNamespace()),
        "version 1 of it has no submodule flash_attn_interface",
    ),
}


@pytest.mark.parametrize("name", HUB_REFUSALS)
def test_hub_kernels_that_cannot_be_had_are_refused_by_why(name, monkeypatch):
    package, message = HUB_REFUSALS[name]

    def import_module(module):
        if package is None:
            raise ModuleNotFoundError(f"No module named {module!r}")
        return package

    with stand_in("kernels-community/flash-attn3") as kernel, monkeypatch.context() as patch:
        patch.setattr(importlib, "import_module", import_module)
        with pytest.raises(ValueError, match=message):
            choose(kernel, *_half())


def test_a_hub_kernel_that_is_not_there_is_refused_with_what_the_hub_said():
    said = r"version 1 of it could not be loaded .* \(FileNotFoundError: Cannot find .*vllm-flash-attn3 in the"
    with stand_in("kernels-community/flash-attn3"), pytest.raises(ValueError, match=said):
        choose("kernels-community/vllm-flash-attn3", *_half())
