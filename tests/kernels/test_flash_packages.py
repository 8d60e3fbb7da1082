"""Packages of FlashAttention are located, recognised by their signatures, and refused with a reason."""

import importlib
import importlib.metadata
import logging
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

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
    selection,
)
from ring_hf.text import markdown_table
from tests.kernels.provenance import PROVENANCE
from tests.support.flash_stand_ins import (
    BEHAVIOUR,
    CALLS,
    MODULES,
    PACKAGES,
    installed,
    kernel_named,
    make_module,
    stand_in,
)
from tests.support.flash_stand_ins_signatures import CUTE_OF_2_8_3, SIGNATURES, THREE_OF_2_7_4

LOCATE = {"2": flash_attn_2.locate_package, "3": flash_attn_3.locate_package, "4": flash_attn_4.locate_package}
HUB = tuple(hub.REPOSITORIES)


def _locate(adapter: str) -> flash_packages.Package | str:
    return hub.load(adapter) if adapter in HUB else LOCATE[adapter[0]]()


def _tensors(dim=64, value_dim=None, dtype=torch.float64):
    return torch.zeros(1, 1, 1, dim, dtype=dtype), torch.zeros(1, 1, 1, value_dim or dim, dtype=dtype)


VARIANTS = {
    "2.6.3": flash_attn_2.VARIANTS[2, 6, 2],
    "2.7.2.post1": flash_attn_2.VARIANTS[2, 7, 0],
    "2.8.3": flash_attn_2.VARIANTS[2, 7, 0],
    "3-2.8.3": flash_attn_3.WITHOUT_DEFAULTS,
    "3-2025-09": flash_attn_3.WITH_DEFAULTS,
    **{name: flash_attn_4.VARIANT for name in PACKAGES if name.startswith("4-")},
    **{name: repository.variant for name, repository in hub.REPOSITORIES.items()},
}


@pytest.mark.parametrize("adapter", PACKAGES)
def test_each_version_is_recognised_by_its_functions(adapter):
    with installed(adapter):
        package = _locate(adapter)
    assert not isinstance(package, str), package
    assert package.variant is VARIANTS[adapter] and package.module is MODULES[adapter]
    assert flash_packages.signature_mismatches(MODULES[adapter], package.variant) == []
    # All arguments are passed by name, so every variant with other names must be recognised as different.
    others = [variant for variant in VARIANTS.values() if variant.window_args != package.variant.window_args]
    assert others and all(flash_packages.signature_mismatches(MODULES[adapter], variant) for variant in others)


@pytest.mark.parametrize("name", ["flash-attn", "flash_attn_3", "flash-attn-4"])
def test_an_installed_package_has_the_known_functions(name):
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed here")
    major = name[-1] if name[-1].isdigit() else "2"
    package = LOCATE[major]()
    assert not isinstance(package, str), package
    stand_ins = [adapter for adapter in PACKAGES if adapter[0] == major and VARIANTS[adapter] is package.variant]
    for function in package.variant.functions:
        installed_args = list(flash_packages.get_signature(getattr(package.module, function)).parameters)
        known_args = [
            list(flash_packages.get_signature(getattr(MODULES[adapter], function)).parameters) for adapter in stand_ins
        ]
        message = f"{name} {version}: {function} takes {installed_args}"
        assert any(installed_args[: len(args)] == args for args in known_args), message


@pytest.mark.parametrize("version", ["2.5.9", "2.6.1", "2.9.0", "3.0.0", "source"])
def test_unknown_versions_are_refused(version, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    reason = flash_attn_2.locate_package.__wrapped__()
    assert f"flash-attn {version} is not a version whose functions are known here; install flash-attn>=2.6" in reason


# Stand-in, signatures of its functions -> the message.
OTHER_SIGNATURES = {
    "2-with-older-functions": (
        "2.8.3",
        SIGNATURES["2.6.3"],
        r"flash-attn 2.8.3 differs from the versions known here: _flash_attn_forward takes no window_size_left, "
        r"window_size_right; _flash_attn_forward requires window_size;.*; install flash-attn>=2.6.2,<2.9",
    ),
    "3-of-2.7.4": (
        "3-2.8.3",
        THREE_OF_2_7_4,
        r"flash-attn-3 3.0.0b1 differs from the versions known here: _flash_attn_forward takes no "
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
        r"flash-attn3 \(version 1\) differs from .* known here: .* takes no window_size_.*; install the package",
    ),
}


@pytest.mark.parametrize("name", OTHER_SIGNATURES)
def test_functions_with_other_signatures_are_refused_by_the_difference(name, monkeypatch):
    adapter, signatures, message = OTHER_SIGNATURES[name]
    monkeypatch.setitem(MODULES, adapter, make_module(signatures, BEHAVIOUR[adapter]))
    with stand_in(adapter) as kernel, pytest.raises(ValueError, match=message):
        choose(kernel, *_tensors())


def test_cute_of_another_package_is_not_flash_attention_4():
    with stand_in("2.8.3"), pytest.raises(ValueError, match="the package flash-attn-4 is not installed"):
        choose("flash_attn_4", *_tensors())


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError])
@pytest.mark.parametrize("adapter", ["2.8.3", "3-2025-09", "4-beta26"])
def test_a_package_that_cannot_be_imported_is_refused_by_its_error(adapter, error, monkeypatch):
    def import_module(name):
        raise error("undefined symbol")

    with stand_in(adapter) as kernel, monkeypatch.context() as patch:
        patch.setattr(importlib, "import_module", import_module)
        with pytest.raises(ValueError, match=rf"cannot be imported \({error.__name__}: undefined symbol\)"):
            choose(kernel, *_tensors())


def test_betas_are_read_from_both_spellings():
    versions = ("4.0.0b9", "4.0.0.beta19", "4.0.0b28.dev3+g1234567", "4.0.0", "4.1.0", "0.0.0")
    assert [flash_attn_4.parse_beta(version) for version in versions] == [(9,), (19,), (28,), (999,), (999,), (0,)]


@dataclass(frozen=True)
class LimitCase:
    """A call on a device, and the reason why the version does not support it (None if it does)."""

    adapter: str
    capability: tuple[int, int]
    head_dims: tuple[int, int]
    message: str | None = None
    softcap: float | None = None
    deterministic: bool = False


FLASH_2, FLASH_4 = "kernels-community/flash-attn2", "kernels-community/flash-attn4"
LIMITS = {
    "2 before Blackwell": LimitCase(
        "2.7.2.post1", (10, 0), (64, 64), "flash-attn 2.7.2.post1 does not support compute capability 10.0"
    ),
    "2 on Blackwell": LimitCase("2.8.3", (12, 0), (64, 64)),
    "2 of the hub on Blackwell": LimitCase(FLASH_2, (10, 0), (64, 64), softcap=2.0),
    "3 on Ampere": LimitCase("3-2.8.3", (8, 0), (64, 64), r"requires compute capability 9.x, not 8.0"),
    "3 on Blackwell": LimitCase("kernels-community/vllm-flash-attn3", (10, 0), (64, 64), "9.x, not 10.0"),
    "3 wide": LimitCase("3-2025-09", (9, 0), (256, 256), softcap=3.0),
    "3 wide, deterministic": LimitCase(
        "3-2025-09", (9, 0), (200, 64), "no deterministic backward for .* 200", deterministic=True
    ),
    "3 deterministic": LimitCase("3-2025-09", (9, 0), (192, 192), deterministic=True),
    "4 on Ampere": LimitCase("4-beta26", (8, 0), (64, 64), "no backward for compute capability 8.0, only"),
    "4 early on Hopper": LimitCase("4-beta4", (9, 0), (64, 64), "no backward for windows .* on 9.0; 4.0.0b5"),
    "4 on a small Blackwell": LimitCase("4-beta10", (12, 0), (64, 64), "windows and documents on 12.0; 4.0.0b21"),
    "4 on a newer small Blackwell": LimitCase("4-beta24", (12, 0), (64, 128), softcap=2.0),
    "4 there, deterministic": LimitCase(
        "4-beta24", (12, 0), (64, 64), "no deterministic backward on 12.0", deterministic=True
    ),
    "4 there, wide": LimitCase("4-beta24", (12, 0), (192, 128), "has no head dims 192, 128 on 12.0"),
    "4 wide on Hopper": LimitCase("4-beta26", (9, 0), (256, 200), softcap=2.0),
    "4 wide on Blackwell": LimitCase("4-beta26", (10, 0), (256, 256), deterministic=True),
    "4 wide and early": LimitCase("4-beta10", (10, 0), (256, 256), "head dim 256 on 10.0 only since 4.0.0b11"),
    "4 wide and capped": LimitCase(
        "4-beta26", (10, 3), (160, 160), "256 on 10.3 .*, and never with soft-capping", softcap=2.0
    ),
    "4 latent": LimitCase("4-beta10", (11, 0), (192, 128), deterministic=True),
    "4 of the hub, capped": LimitCase(FLASH_4, (9, 0), (64, 64), "has no soft-capping", softcap=2.0),
}


@pytest.mark.parametrize("name", LIMITS)
def test_calls_beyond_the_limits_of_a_version_are_refused(name, monkeypatch):
    case = LIMITS[name]
    tensors = _tensors(*case.head_dims)
    with stand_in(case.adapter) as kernel:
        monkeypatch.setattr(flash_varlen, "get_capability", lambda device: case.capability)
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: case.deterministic)
        if case.message is None:
            assert choose(kernel, *tensors, case.softcap) is kernel_named(kernel)
        else:
            with pytest.raises(ValueError, match=case.message):
                choose(kernel, *tensors, case.softcap)


BF16 = torch.bfloat16
# Attribute of `flash_varlen`, its value, tensors -> the message.
UNSUPPORTED = {
    "device": ("DEVICE_TYPE", "cuda", _tensors(dtype=BF16), "the tensors are on cpu"),
    "dtype": ("DTYPES", (BF16,), _tensors(dtype=torch.float32), "dtype torch.float32 is not one of"),
    "head dim": ("DTYPES", (BF16,), _tensors(264, dtype=BF16), "head dim 264 is above 256"),
    "old device": ("get_capability", lambda device: (7, 5), _tensors(), "capability 7.5 is below 8.0"),
    "no device": ("get_capability", lambda device: None, _tensors(), "PyTorch finds no CUDA device"),
}


@pytest.mark.parametrize("adapter", ["aten", "2.8.3", "3-2.8.3", "4-beta26", *HUB])
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_calls_for_no_flash_attention_are_refused_without_download(name, adapter, monkeypatch):
    attribute, value, tensors, message = UNSUPPORTED[name]
    with stand_in(adapter) as kernel, monkeypatch.context() as patch:
        patch.setattr(flash_varlen, attribute, value)
        CALLS.clear()
        with pytest.raises(ValueError, match=message):
            choose(kernel, *tensors)
        assert CALLS["loaded"] == 0


def test_auto_is_the_first_kernel_that_fits_and_logs_once_why(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="ring_hf")
    monkeypatch.setattr(selection, "_logged_choices", set())
    tensors = _tensors()
    for adapter in ("3-2025-09", "4-beta26", "2.8.3"):
        with stand_in(adapter):
            assert choose("auto", *tensors) is KERNELS[f"flash_attn_{adapter[0]}"]
    with stand_in("aten"):
        assert [choose("auto", *tensors), choose("auto", *tensors)] == [KERNELS["cuda_flash"]] * 2
        assert choose("auto", *tensors, 2.0) is reference  # soft-capping: no other of PyTorch has it
    messages = [record.message for record in caplog.records]
    assert len(messages) == 5 and messages[0] == "kernel flash_attn_3: the first choice"
    assert messages[1].startswith("kernel flash_attn_4: not flash_attn_3, as the package flash-attn-3 (module ")
    assert "kernel flash_attn_2: not flash_attn_3, as " in messages[2]
    assert "; not flash_attn_4, as the package" in messages[2]
    assert messages[3].startswith("kernel cuda_flash: not flash_attn_3, as ") and "not flash_attn_2, as" in messages[3]
    assert "not cuda_flash, as it has no soft-capping (softcap=2.0)" in messages[4]


def test_a_family_stands_for_its_first_kernel_that_fits():
    for adapter, family in (("2.8.3", "flash_attn"), ("4-beta26", "flash_attn"), ("aten", "cuda")):
        with stand_in(adapter) as kernel:
            assert choose(family, *_tensors()) is choose(kernel, *_tensors())
            assert list(candidates(family, *_tensors())) == list(FAMILIES[family])
            with pytest.raises(ValueError, match=f"{family}' cannot .*{kernel}: head dim 264 is above"):
                choose(family, *_tensors(264))


def test_the_readme_lists_the_sources_of_all_variants():
    variants_by_kernel = {
        "flash_attn_3": flash_attn_3.VARIANTS,
        "flash_attn_4": (flash_attn_4.VARIANT,),
        "flash_attn_2": tuple(flash_attn_2.VARIANTS.values()),
        **{name: (repository.variant,) for name, repository in hub.REPOSITORIES.items()},
    }
    assert list(PROVENANCE) == list(variants_by_kernel)
    rows = [["kernel", "repository and file", "tag or commit", "functions and their lines"]]
    for kernel, variants in variants_by_kernel.items():
        for variant, sources in zip(variants, PROVENANCE[kernel], strict=True):
            assert sources
            for source in sources:
                lines = zip(variant.functions, source.lines, strict=True)
                functions = ", ".join(f"{function} {line}" for function, line in lines)
                rows.append([kernel, f"{source.repository}: {source.file}", source.tags, functions])
    text = Path(__file__).with_name("README.md").read_text()
    listed = text.split("<!-- generated: sources -->\n")[1].split("\n<!-- end generated -->")[0]
    table = markdown_table(rows, align="l", padded=False)
    assert listed == table, table
    assert len(rows) - 1 == 29
