"""Attention on tiles with FlashAttention-3 for Hopper (Shah et al. 2024, arXiv 2407.08608): `flash_attn_interface`.

One function computes dense and packed launches. In 2.8 every argument up to `causal` is required and backward returns
the gradients. Since September 2025 they have defaults, which are the right ones here, `window_size` is two arguments,
and backward returns no gradients. vLLM's copy of 2.8 has no `attention_chunk` and one more argument at the end, whose
default is right. Versions without `qv` are refused. More, with sources: tests/kernels/README.md.
"""

import functools
import importlib.metadata
import importlib.util

import torch

from . import flash_packages, flash_varlen
from .flash_packages import ApiVariant, Package, Requirements, parse_version

_UNUSED = (
    *("k_new", "v_new", "qv", "out", "cu_seqlens_k_new", "seqused_q", "seqused_k", "page_table", "kv_batch_idx"),
    *("leftpad_k", "rotary_cos", "rotary_sin", "seqlens_rotary", "q_descale", "k_descale", "v_descale"),
)
_variant = functools.partial(
    ApiVariant,
    forward=("_flash_attn_forward", "_flash_attn_forward"),
    backward=("_flash_attn_backward", "_flash_attn_backward"),
)
WITH_DEFAULTS = _variant(window_args=("window_size_left", "window_size_right"))
WITHOUT_DEFAULTS = _variant(
    window_args=("window_size",),
    forward_constants=dict.fromkeys(_UNUSED) | {"causal": False},
    backward_constants={"sequed_q": None, "sequed_k": None, "causal": False},
)
VARIANTS = (WITH_DEFAULTS, WITHOUT_DEFAULTS)
_ADVICE = "install hopper/ of flash-attention v2.8.0 to v2.8.3, or of September 2025 and later"


@functools.lru_cache(maxsize=1)
def locate_package() -> Package | str:
    """Return the installed package, or the reason why it cannot be used."""
    if importlib.util.find_spec("flash_attn_interface") is None:
        return "the package flash-attn-3 (module flash_attn_interface) is not installed"
    try:
        version = importlib.metadata.version("flash_attn_3")
        name = f"flash-attn-3 {version}"
    except importlib.metadata.PackageNotFoundError:
        version, name = "", "flash_attn_interface"
    module = flash_packages.import_package(name, "flash_attn_interface")
    if isinstance(module, str):
        return module
    return flash_packages.match_variant(name, parse_version(version), module, VARIANTS, _ADVICE)


def check_limits(package: Package, requirements: Requirements) -> str | None:
    """Return what the package lacks for these requirements, or None."""
    if requirements.capability[0] != 9:
        return f"requires compute capability 9.x, not {flash_varlen.format_version(requirements.capability)}"
    if requirements.max_head_dim > 192 and torch.are_deterministic_algorithms_enabled():
        return f"has no deterministic backward for head dim {requirements.max_head_dim}, above 192"
    return None


def padded_head_dims(q: torch.Tensor, v: torch.Tensor) -> tuple[int, int]:
    """Return the head dims to which q and k, and v and out, are padded, from `q [..., D]` and `v [..., E]`.

    136 to 192 beside 104 to 128 (multi-head latent attention) needs no common size.
    """
    head_dim, value_dim = flash_varlen.round_up_8(q.shape[-1]), flash_varlen.round_up_8(v.shape[-1])
    if 128 < head_dim <= 192 and 96 < value_dim <= 128:
        return head_dim, value_dim
    return flash_varlen.shared_head_dim(q, v)


KERNEL = flash_packages.make_kernel("flash_attn_3", locate_package, check_limits, padded_head_dims)
