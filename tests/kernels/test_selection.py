"""`choose` asks the kernels once per kind of call, and again whenever something changes that any of them reads."""

import contextlib
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ring_hf.kernels import KERNELS, choose, cuda_flash, selection
from ring_hf.parallel import local_attention
from tests.support import aten_stand_ins, flash_stand_ins


class CountingKernel:
    """A kernel that counts how often it is asked whether it supports a call."""

    def __init__(self, kernel, counts):
        self._kernel = kernel
        self._counts = counts

    def __getattr__(self, name):
        return getattr(self._kernel, name)

    def why_unsupported(self, q, v, softcap):
        self._counts[self.NAME] += 1
        return self._kernel.why_unsupported(q, v, softcap)


@pytest.fixture
def counts(monkeypatch):
    """The number of questions to each kernel, with an empty cache of choices."""
    counts = Counter()
    for name, kernel in list(KERNELS.items()):
        monkeypatch.setitem(KERNELS, name, CountingKernel(kernel, counts))
    selection.clear_cache()
    yield counts
    selection.clear_cache()


def _tensors(dim=8, value_dim=8, dtype=torch.float32, rows=1, heads=2, device="cpu"):
    return (
        torch.empty(rows, heads, 4, dim, dtype=dtype, device=device),
        torch.empty(rows, heads, 4, value_dim, dtype=dtype, device=device),
    )


def test_layers_and_passes_of_one_kind_ask_each_kernel_once(counts):
    for length in (4, 9):
        q = torch.randn(1, 2, length, 8, requires_grad=True)
        for _ in range(3):
            local_attention(q, q, q)[0].sum().backward()
    assert counts == dict.fromkeys(KERNELS, 1)


CHANGES = {
    "dtype": {"dtype": torch.bfloat16},
    "head dim": {"dim": 16},
    "value dim": {"value_dim": 16},
    "rows": {"rows": 2},
    "heads": {"heads": 4},
    "device": {"device": "meta"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_tensors_ask_the_kernels_again(name, counts):
    for repetition in (1, 2):
        choose("auto", *_tensors())
        choose("auto", *_tensors(**CHANGES[name]))
        assert counts["reference"] == 2, repetition


def test_another_softcap_or_name_asks_the_kernels_again(counts):
    tensors = _tensors()
    assert choose("auto", *tensors).NAME == "cpu" and choose("auto", *tensors, 2.0).NAME == "reference"
    assert choose("reference", *tensors).NAME == "reference"
    assert counts["reference"] == 3 and counts["cpu"] == 2


def _deterministic(monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)


def _cudnn_disabled(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)


def _implementation_activated(monkeypatch):
    monkeypatch.setattr(cuda_flash, "activated_implementation", lambda: "FA3")


def _recompilation_avoided(monkeypatch):
    monkeypatch.setenv("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "1")


@pytest.mark.parametrize(
    "change", [_deterministic, _cudnn_disabled, _implementation_activated, _recompilation_avoided]
)
def test_another_setting_of_the_process_asks_the_kernels_again(change, counts, monkeypatch):
    choose("auto", *_tensors())
    change(monkeypatch)
    for _ in range(2):
        choose("auto", *_tensors())
    assert counts == dict.fromkeys(KERNELS, 2)


def test_a_refusal_is_not_cached(counts):
    for number in (1, 2):
        with pytest.raises(ValueError, match="has no soft-capping"):
            choose("cpu", *_tensors(), 2.0)
        assert counts["cpu"] == number


def test_a_replaced_kernel_is_returned_without_clearing_the_cache(counts, monkeypatch):
    choose("auto", *_tensors())
    replacement = SimpleNamespace(NAME="cpu")
    monkeypatch.setitem(KERNELS, "cpu", replacement)
    assert choose("auto", *_tensors()) is replacement


def test_symbolic_sizes_are_not_cached(counts):
    mode = FakeTensorMode(shape_env=ShapeEnv())
    q, v = (mode.from_tensor(x, static_shapes=False) for x in _tensors(rows=3))
    assert any(isinstance(size, torch.SymInt) for size in q.shape)
    for _ in range(2):
        choose("cpu", q, v)
    assert counts["cpu"] == 2


@pytest.mark.parametrize("adapter", [*flash_stand_ins.ADAPTERS, *aten_stand_ins.ADAPTERS, "cpu", "reference"])
def test_kernels_read_only_properties_of_tensors_in_the_cache_key(adapter):
    # Any other attribute raises AttributeError, and comparing the number of tokens TypeError.
    num_tokens = None
    q = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float64, shape=(1, 2, num_tokens, 8))
    v = SimpleNamespace(shape=(None, None, num_tokens, 8))
    stand_in = aten_stand_ins.aten_stand_in if adapter in aten_stand_ins.ADAPTERS else flash_stand_ins.stand_in
    install = contextlib.nullcontext(adapter) if adapter in ("cpu", "reference") else stand_in(adapter)
    with install as kernel:
        assert flash_stand_ins.kernel_named(kernel).why_unsupported(q, v, None) is None
