"""Attention on tiles with FlashAttention-4, written in CuTe DSL: `flash_attn.cute` of the package flash-attn-4.

Wheels of flash-attn 2.8 hold an older `flash_attn.cute` without windows in backward; that is not it, so the package
is asked for by its own name. Unlike its elders it takes None for a side without bound (-1 is a bound), None for
forward's missing softcap and 0.0 for backward's, returns lse only with `return_lse=True`, and has `dout` fifth, which
matters to nobody who passes keywords. The first two results are out and lse; since beta19 there are four.

What the versions could do was read in the same file: windows and packed documents in backward on 9.x since beta5
(asserted before), windows in backward on 12.x since beta21 (silently ignored before), soft-capping of packed
documents in backward since beta24 (before: asserted, or ignored), head dim 256 on 10.x and 11.x since beta11. For 12.x
it checks no head dim; as shared memory is small there, more than 128 is refused here.
"""

import functools
import importlib.metadata
import re
from collections.abc import Mapping

import torch

from . import flash_packages, flash_varlen
from .flash_packages import ApiVariant, Package, Provenance, Requirements

# Tags -> line of forward, line of backward.
_LINES: Mapping[str, tuple[int, int]] = {
    "beta0 to beta4": (99, 577),
    "beta5, beta6": (288, 953),
    "beta7, beta8": (297, 968),
    "beta9": (281, 1058),
    "beta10": (282, 1150),
    "beta11": (286, 1183),
    "beta12": (286, 1205),
    "beta13": (287, 1207),
    "beta14, beta15": (292, 1208),
    "beta16": (292, 1250),
    "beta17, beta18": (294, 1250),
    "beta19": (297, 1305),
    "beta20": (297, 1292),
    "beta21": (297, 1294),
    "beta22 to beta24": (299, 1308),
    "beta25": (515, 1721),
    "beta26, beta27": (521, 1807),
}
FORM = ApiVariant(
    forward=("_flash_attn_fwd", "_flash_attn_fwd"),
    backward=("_flash_attn_bwd", "_flash_attn_bwd"),
    windows=("window_size_left", "window_size_right"),
    read=tuple(
        Provenance(f"fa4-v4.0.0.{tags}", lines, file="flash_attn/cute/interface.py") for tags, lines in _LINES.items()
    ),
    unbounded=None,
    lse="lse",
    uncapped=None,
    forward_always={"return_lse": True},
)
# Compute capability -> the first beta whose backward has windows and packed documents there.
_SINCE = {9: 5, 10: 0, 11: 0, 12: 21}
_SOFTCAP, _WIDE = 24, 11
_INSTEAD = "install a beta of flash-attn-4: pip install --pre flash-attn-4"


@functools.lru_cache(maxsize=1)
def installed() -> Package | str:
    """The installed package, or why there is none."""
    try:
        version = importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return "the package flash-attn-4 is not installed"
    module = flash_packages.imported(f"flash-attn-4 {version}", "flash_attn.cute.interface")
    if isinstance(module, str):
        return module
    return flash_packages.fitting(f"flash-attn-4 {version}", beta(version), module, (FORM,), _INSTEAD)


def beta(version: str) -> tuple[int, ...]:
    """(9,) of "4.0.0b9" or "4.0.0.beta9"; what is no beta of 4.0.0 comes after all of them, if later, else before."""
    found = re.match(r"4\.0\.0\.?b(?:eta)?(\d+)", version)
    return (int(found[1]) if found else 999 if flash_packages.numbers(version) >= (4, 0, 0) else 0,)


def limits(package: Package, wanted: Requirements) -> str | None:
    """What the package cannot do, or None."""
    major, (number, *_), device = wanted.capability[0], package.version, flash_varlen.dotted(wanted.capability)
    if major not in _SINCE:
        return f"has no backward for compute capability {device}, only for 9.x to 12.x"
    if number < _SINCE[major]:
        return f"has no backward for windows and documents on {device}; 4.0.0b{_SINCE[major]} and later do"
    if wanted.softcap is not None and number < _SOFTCAP:
        return (
            f"has no soft-capping (softcap={wanted.softcap}) of documents in backward; 4.0.0b{_SOFTCAP} and later do"
        )
    found = _widths(wanted.head_dim, wanted.value_dim, major)
    if found is None:
        return f"has no head dims {wanted.head_dim}, {wanted.value_dim} on {device}"
    if major != 9 and found == (256, 256) and (number < _WIDE or wanted.softcap is not None):
        return f"has head dim 256 on {device} since 4.0.0b{_WIDE} alone, and never with soft-capping"
    if major == 12 and torch.are_deterministic_algorithms_enabled():
        return f"has no deterministic backward on {device}"
    return None


def _widths(head_dim: int, value_dim: int, major: int) -> tuple[int, int] | None:
    """The smallest head dims that it has, each at least as given."""
    head_dim, value_dim = flash_varlen.eights(head_dim), flash_varlen.eights(value_dim)
    most = 256 if major == 9 else 128
    if head_dim <= most and value_dim <= most:
        return head_dim, value_dim
    # Beyond 128 Blackwell has two sizes alone.
    alone = ((192, 128), (256, 256)) if major in (10, 11) else ()
    return next((size for size in alone if head_dim <= size[0] and value_dim <= size[1]), None)


def widths(q: torch.Tensor, v: torch.Tensor) -> tuple[int, int]:
    """The head dims that q, k and v, out are padded to."""
    capability = flash_varlen.capability(q.device)
    assert capability is not None
    found = _widths(q.shape[-1], v.shape[-1], capability[0])
    assert found is not None
    return found


KERNEL = flash_packages.kernel("flash_attn_4", installed, limits, widths)
