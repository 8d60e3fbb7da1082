"""Attention on tiles with FlashAttention-4, written in CuTe DSL: `flash_attn.cute` of the package flash-attn-4.

Wheels of flash-attn 2.8 contain an older `flash_attn.cute` without windows in backward, so the package is located by
its own name. Unlike versions 2 and 3 it takes None for a bound that does not bind (-1 is a bound), None for forward's
missing softcap and 0.0 for backward's, and returns lse only with `return_lse=True`. The first two results are out and
lse; since beta19 there are four. Which beta supports what, and where it was read: tests/kernels/README.md.
"""

import functools
import importlib.metadata
import re

import torch

from . import flash_packages, flash_varlen
from .flash_packages import ApiVariant, Package, Requirements

VARIANT = ApiVariant(
    forward=("_flash_attn_fwd", "_flash_attn_fwd"),
    backward=("_flash_attn_bwd", "_flash_attn_bwd"),
    window_args=("window_size_left", "window_size_right"),
    no_bound=None,
    lse_arg="lse",
    no_softcap=None,
    forward_constants={"return_lse": True},
)
# By major compute capability, the first beta whose backward has windows and packed documents there.
_FIRST_BETA = {9: 5, 10: 0, 11: 0, 12: 21}
_FIRST_SOFTCAP_BETA = 24  # soft-capping of packed documents in backward
_FIRST_DIM_256_BETA = 11  # head dim 256 on 10.x and 11.x
_ADVICE = "install a beta of flash-attn-4: pip install --pre flash-attn-4"


@functools.lru_cache(maxsize=1)
def locate_package() -> Package | str:
    """Return the installed package, or the reason why it cannot be used."""
    try:
        version = importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return "the package flash-attn-4 is not installed"
    module = flash_packages.import_package(f"flash-attn-4 {version}", "flash_attn.cute.interface")
    if isinstance(module, str):
        return module
    return flash_packages.match_variant(f"flash-attn-4 {version}", parse_beta(version), module, (VARIANT,), _ADVICE)


def parse_beta(version: str) -> tuple[int, ...]:
    """Return (9,) for "4.0.0b9" and "4.0.0.beta9", (999,) for 4.0.0 and later, and (0,) for anything else."""
    match = re.match(r"4\.0\.0\.?b(?:eta)?(\d+)", version)
    if match:
        return (int(match[1]),)
    return (999,) if flash_packages.parse_version(version) >= (4, 0, 0) else (0,)


def check_limits(package: Package, requirements: Requirements) -> str | None:
    """Return what the package lacks for these requirements, or None."""
    beta = package.version[0]
    major = requirements.capability[0]
    capability = flash_varlen.format_version(requirements.capability)
    if major not in _FIRST_BETA:
        return f"has no backward for compute capability {capability}, only for 9.x to 12.x"
    if beta < _FIRST_BETA[major]:
        return f"has no backward for windows and documents on {capability}; 4.0.0b{_FIRST_BETA[major]} and later do"
    softcap = requirements.softcap
    if softcap is not None and beta < _FIRST_SOFTCAP_BETA:
        return (
            f"has no soft-capping (softcap={softcap}) of documents in backward; "
            f"4.0.0b{_FIRST_SOFTCAP_BETA} and later do"
        )
    head_dims = _kernel_head_dims(requirements.head_dim, requirements.value_dim, major)
    if head_dims is None:
        return f"has no head dims {requirements.head_dim}, {requirements.value_dim} on {capability}"
    if major != 9 and head_dims == (256, 256) and (beta < _FIRST_DIM_256_BETA or softcap is not None):
        return f"has head dim 256 on {capability} only since 4.0.0b{_FIRST_DIM_256_BETA}, and never with soft-capping"
    if major == 12 and torch.are_deterministic_algorithms_enabled():
        return f"has no deterministic backward on {capability}"
    return None


def _kernel_head_dims(head_dim: int, value_dim: int, major: int) -> tuple[int, int] | None:
    """Return the smallest head dims of a kernel for this major compute capability that hold these, or None."""
    head_dim, value_dim = flash_varlen.round_up_8(head_dim), flash_varlen.round_up_8(value_dim)
    max_head_dim = 256 if major == 9 else 128
    if head_dim <= max_head_dim and value_dim <= max_head_dim:
        return head_dim, value_dim
    # Beyond 128, 10.x and 11.x have two sizes only. 12.x checks no head dim, but its shared memory is small.
    larger = ((192, 128), (256, 256)) if major in (10, 11) else ()
    return next((dims for dims in larger if head_dim <= dims[0] and value_dim <= dims[1]), None)


def padded_head_dims(q: torch.Tensor, v: torch.Tensor) -> tuple[int, int]:
    """Return the head dims to which q and k, and v and out, are padded, from `q [..., D]` and `v [..., E]`."""
    capability = flash_varlen.get_capability(q.device)
    assert capability is not None
    head_dims = _kernel_head_dims(q.shape[-1], v.shape[-1], capability[0])
    assert head_dims is not None
    return head_dims


KERNEL = flash_packages.make_kernel("flash_attn_4", locate_package, check_limits, padded_head_dims)
