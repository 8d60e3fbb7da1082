"""How packages of FlashAttention are found, told apart by their signatures, and refused by message."""

import importlib
import importlib.metadata
import logging
from pathlib import Path

import pytest
import torch

from ring_hf import kernels
from ring_hf.kernels import (
    FAMILIES,
    KERNELS,
    candidates,
    choose,
    flash_attn_2,
    flash_attn_3,
    flash_attn_4,
    flash_packages,
    flash_varlen,
    hub,
    reference,
)
from tests.flash_stand_ins import BEHAVIOUR, CALLS, MODULES, PACKAGES, installed, kernel_named, module, stand_in
from tests.flash_stand_ins_signatures import CUTE_OF_2_8_3, SIGNATURES, THREE_OF_2_7_4

SEARCHES = {"2": flash_attn_2.installed, "3": flash_attn_3.installed, "4": flash_attn_4.installed}
HUB = tuple(hub.REPOSITORIES)


def _find(adapter: str) -> flash_packages.Package | str:
    return hub.load(adapter) if adapter in HUB else SEARCHES[adapter[0]]()


def _half(dim=64, value_dim=None, dtype=torch.float64):
    return torch.zeros(1, 1, 1, dim, dtype=dtype), torch.zeros(1, 1, 1, value_dim or dim, dtype=dtype)


FORMS = {
    "2.6.3": flash_attn_2.FORMS[2, 6, 2],
    "2.7.2.post1": flash_attn_2.FORMS[2, 7, 0],
    "2.8.3": flash_attn_2.FORMS[2, 7, 0],
    "3-2.8.3": flash_attn_3.WITHOUT_DEFAULTS,
    "3-2025-09": flash_attn_3.WITH_DEFAULTS,
    **{name: flash_attn_4.FORM for name in PACKAGES if name.startswith("4-")},
    **{name: repository.form for name, repository in hub.REPOSITORIES.items()},
}


@pytest.mark.parametrize("adapter", PACKAGES)
def test_each_version_is_recognised_by_its_functions(adapter):
    with installed(adapter):
        found = _find(adapter)
    assert not isinstance(found, str), found
    assert found.form is FORMS[adapter] and found.functions is MODULES[adapter]
    assert flash_packages.compare(MODULES[adapter], found.form) == []
    # Nothing is passed by position, so no function may have renamed what is passed.
    others = [form for form in FORMS.values() if form.windows != found.form.windows]
    assert others and all(flash_packages.compare(MODULES[adapter], form) for form in others)


@pytest.mark.parametrize("package", ["flash-attn", "flash_attn_3", "flash-attn-4"])
def test_an_installed_package_has_the_functions_that_were_read(package):
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed here")
    number = package[-1] if package[-1].isdigit() else "2"
    found = SEARCHES[number]()
    assert not isinstance(found, str), found
    alike = [name for name in PACKAGES if name[0] == number and FORMS[name] is found.form]
    for function in found.form.functions:
        have = list(flash_packages.signature(getattr(found.functions, function)).parameters)
        read = [list(flash_packages.signature(getattr(MODULES[name], function)).parameters) for name in alike]
        assert any(have[: len(names)] == names for names in read), f"{package} {version}: {function} takes {have}"


@pytest.mark.parametrize("version", ["2.5.9", "2.6.1", "2.9.0", "3.0.0", "source"])
def test_unknown_versions_are_refused(version, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    reason = flash_attn_2.installed.__wrapped__()
    assert f"flash-attn {version} is not one whose functions are known here; install flash-attn>=2.6.2" in reason


DIFFERENT = {
    "2-with-older-functions": (
        "2.8.3",
        SIGNATURES["2.6.3"],
        r"flash-attn 2.8.3 differs from what was read: _flash_attn_forward takes no window_size_left, "
        r"window_size_right; _flash_attn_forward wants window_size;.*; install flash-attn>=2.6.2,<2.9",
    ),
    "3-of-2.7.4": (
        "3-2.8.3",
        THREE_OF_2_7_4,
        r"flash-attn-3 3.0.0b1 differs from what was read: _flash_attn_forward takes no "
        "qv, seqlens_rotary.*; install hopper/ of flash-attention v2.8.0 to v2.8.3, or of September 2025 and later",
    ),
    "3-of-before": (
        "3-2025-09",
        {"_flash_attn_forward": "q, k, v, softmax_scale, causal"},
        r"flash-attn-3 3.0.0 differs .*: _flash_attn_forward takes no .*; there is no _flash_attn_backward",
    ),
    "4-in-a-wheel-of-2.8.3": (
        "4-beta26",
        CUTE_OF_2_8_3,
        r"flash-attn-4 4.0.0b26 differs .*: _flash_attn_fwd takes no max_seqlen_k, max_seqlen_q, return_lse; "
        r"_flash_attn_bwd takes no cu_seqlens_k, .*window_size_right; install a beta of flash-attn-4: pip",
    ),
    "hub": (
        "kernels-community/flash-attn3",
        SIGNATURES["3-2.8.3"],
        r"flash-attn3 \(version 1\) differs from what was read: .* takes no window_size_.*; install the package",
    ),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_functions_that_changed_are_refused_by_what_differs(name, monkeypatch):
    adapter, signatures, message = DIFFERENT[name]
    monkeypatch.setitem(MODULES, adapter, module(signatures, *BEHAVIOUR[adapter][:4]))
    with stand_in(adapter) as kernel, pytest.raises(ValueError, match=message):
        choose(kernel, *_half())


def test_cute_of_another_package_is_not_flash_attention_4():
    with stand_in("2.8.3"), pytest.raises(ValueError, match="the package flash-attn-4 is not installed"):
        choose("flash_attn_4", *_half())


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError])
@pytest.mark.parametrize("adapter", ["2.8.3", "3-2025-09", "4-beta26"])
def test_a_package_that_cannot_be_imported_is_refused_by_why(adapter, error, monkeypatch):
    def broken(name):
        raise error("undefined symbol")

    with stand_in(adapter) as kernel, monkeypatch.context() as patch:
        patch.setattr(importlib, "import_module", broken)
        with pytest.raises(ValueError, match=rf"cannot be imported \({error.__name__}: undefined symbol\)"):
            choose(kernel, *_half())


def test_betas_are_read_from_both_spellings():
    versions = ("4.0.0b9", "4.0.0.beta19", "4.0.0b28.dev3+g1234567", "4.0.0", "4.1.0", "0.0.0")
    assert [flash_attn_4.beta(version) for version in versions] == [(9,), (19,), (28,), (999,), (999,), (0,)]


# What is asked for -> adapter, compute capability, head dims, softcap, deterministic, what is said (None: it fits).
LIMITS = {
    "2 before Blackwell": ("2.7.2.post1", (10, 0), (64, 64), None, False, "flash-attn 2.7.2.post1 is not for .* 10.0"),
    "2 on Blackwell": ("2.8.3", (12, 0), (64, 64), None, False, None),
    "2 of the hub on Blackwell": ("kernels-community/flash-attn2", (10, 0), (64, 64), 2.0, False, None),
    "3 on Ampere": ("3-2.8.3", (8, 0), (64, 64), None, False, r"is for compute capability 9.x, not 8.0"),
    "3 on Blackwell": ("kernels-community/vllm-flash-attn3", (10, 0), (64, 64), None, False, "9.x, not 10.0"),
    "3 wide": ("3-2025-09", (9, 0), (256, 256), 3.0, False, None),
    "3 wide, deterministic": (
        "3-2025-09",
        (9, 0),
        (200, 64),
        None,
        True,
        "no deterministic backward for .* 200",
    ),
    "3 deterministic": ("3-2025-09", (9, 0), (192, 192), None, True, None),
    "4 on Ampere": (
        "4-beta26",
        (8, 0),
        (64, 64),
        None,
        False,
        "no backward for compute capability 8.0, only",
    ),
    "4 early on Hopper": ("4-beta4", (9, 0), (64, 64), None, False, "no backward for windows .* on 9.0; 4.0.0b5"),
    "4 on a small Blackwell": ("4-beta10", (12, 0), (64, 64), None, False, "windows and documents on 12.0; 4.0.0b21"),
    "4 on a newer small Blackwell": ("4-beta24", (12, 0), (64, 128), 2.0, False, None),
    "4 there, deterministic": ("4-beta24", (12, 0), (64, 64), None, True, "no deterministic backward on 12.0"),
    "4 there, wide": ("4-beta24", (12, 0), (192, 128), None, False, "has no head dims 192, 128 on 12.0"),
    "4 wide on Hopper": ("4-beta26", (9, 0), (256, 200), 2.0, False, None),
    "4 wide on Blackwell": ("4-beta26", (10, 0), (256, 256), None, True, None),
    "4 wide and early": (
        "4-beta10",
        (10, 0),
        (256, 256),
        None,
        False,
        "head dim 256 on 10.0 since 4.0.0b11 alone",
    ),
    "4 wide and capped": (
        "4-beta26",
        (10, 3),
        (160, 160),
        2.0,
        False,
        "256 on 10.3 .*, and never with soft-capping",
    ),
    "4 latent": ("4-beta10", (11, 0), (192, 128), None, True, None),
    "4 of the hub, capped": (
        "kernels-community/flash-attn4",
        (9, 0),
        (64, 64),
        2.0,
        False,
        "has no soft-capping",
    ),
}


@pytest.mark.parametrize("name", LIMITS)
def test_what_a_version_cannot_do_is_refused_by_its_reason(name, monkeypatch):
    adapter, capability, dims, softcap, deterministic, message = LIMITS[name]
    with stand_in(adapter) as kernel:
        monkeypatch.setattr(flash_varlen, "capability", lambda device: capability)
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
        if message is None:
            assert choose(kernel, *_half(*dims), softcap) is kernel_named(kernel)
        else:
            with pytest.raises(ValueError, match=message):
                choose(kernel, *_half(*dims), softcap)


BF16 = torch.bfloat16
UNFIT = {
    "device": ("DEVICE", "cuda", _half(dtype=BF16), "the tensors are on cpu"),
    "dtype": ("DTYPES", (BF16,), _half(dtype=torch.float32), "dtype torch.float32 is not one of"),
    "head dim": ("DTYPES", (BF16,), _half(264, dtype=BF16), "head dim 264 is above 256"),
    "old device": ("capability", lambda device: (7, 5), _half(), "capability 7.5 is below 8.0"),
    "no device": ("capability", lambda device: None, _half(), "PyTorch finds no CUDA device"),
}


@pytest.mark.parametrize("adapter", ["aten", "2.8.3", "3-2.8.3", "4-beta26", *HUB])
@pytest.mark.parametrize("name", UNFIT)
def test_what_no_flash_attention_serves_is_refused_and_not_downloaded(name, adapter, monkeypatch):
    attribute, value, tensors, message = UNFIT[name]
    with stand_in(adapter) as kernel, monkeypatch.context() as patch:
        patch.setattr(flash_varlen, attribute, value)
        CALLS.clear()
        with pytest.raises(ValueError, match=message):
            choose(kernel, *tensors)
        assert CALLS["loaded"] == 0


def test_auto_takes_the_first_that_fits_and_says_once_why(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="ring_hf")
    monkeypatch.setattr(kernels, "_told", set())
    tensors = _half()
    for adapter in ("3-2025-09", "4-beta26", "2.8.3"):
        with stand_in(adapter):
            assert choose("auto", *tensors) is KERNELS[f"flash_attn_{adapter[0]}"]
    with stand_in("aten"):
        assert [choose("auto", *tensors), choose("auto", *tensors)] == [KERNELS["cuda_flash"]] * 2
        assert choose("auto", *tensors, 2.0) is reference  # soft-capping: no other of PyTorch has it
    said = [record.message for record in caplog.records]
    assert len(said) == 5 and said[0] == "kernel flash_attn_3: the first choice"
    assert said[1].startswith("kernel flash_attn_4: not flash_attn_3, as the package flash-attn-3 (module ")
    assert "kernel flash_attn_2: not flash_attn_3, as " in said[2] and "; not flash_attn_4, as the package" in said[2]
    assert said[3].startswith("kernel cuda_flash: not flash_attn_3, as ") and "not flash_attn_2, as" in said[3]
    assert "not cuda_flash, as it has no soft-capping (softcap=2.0)" in said[4]


def test_a_family_stands_for_its_first_that_fits():
    for adapter, family in (("2.8.3", "flash_attn"), ("4-beta26", "flash_attn"), ("aten", "cuda")):
        with stand_in(adapter) as kernel:
            assert choose(family, *_half()) is choose(kernel, *_half())
            assert list(candidates(family, *_half())) == list(FAMILIES[family])
            with pytest.raises(ValueError, match=f"{family}' cannot .*{kernel}: head dim 264 is above"):
                choose(family, *_half(264))


def test_the_list_of_what_was_read_is_that_of_the_forms():
    rows = ["| kernel | repository and file | tag or commit | functions and their lines |", "|---|---|---|---|"]
    by_kernel = {
        "flash_attn_3": flash_attn_3.FORMS,
        "flash_attn_4": (flash_attn_4.FORM,),
        "flash_attn_2": tuple(flash_attn_2.FORMS.values()),
        **{name: (repository.form,) for name, repository in hub.REPOSITORIES.items()},
    }
    for name, forms in by_kernel.items():
        for form in forms:
            for read in form.read:
                functions = ", ".join(f"{f} {line}" for f, line in zip(form.functions, read.lines, strict=True))
                rows.append(f"| {name} | {read.repository}: {read.file} | {read.tags} | {functions} |")
    text = Path(__file__).with_name("README.md").read_text()
    listed = text.split("<!-- generated: forms -->\n")[1].split("\n<!-- end generated -->")[0]
    assert listed.split("\n") == rows, "\n".join(rows)
    assert len(rows) - 2 == 29
