"""Attention on tiles with FlashAttention-3 for Hopper (Shah et al. 2024, arXiv 2407.08608): `flash_attn_interface`.

One function serves dense and packed calls. In 2.8 every argument up to `causal` is required and backward returns
the gradients; since September 2025 they have defaults, `window_size` is two arguments, `out` is `out_`, backward's
`causal` is `is_causal`, and it returns none. The defaults are right here, so neither name is passed. vLLM's copy has
no `attention_chunk` and one more argument at the end, whose default is right too. Earlier ones (no `qv`) are refused.

Rows that see nothing have lse -inf, +inf where there is no key at all. No window is clamped wrongly. Queries and keys
of 136 to 192 dims beside values of 104 to 128 (multi-head latent attention) need no padding; other pairs share a size.
"""

import functools
import importlib.metadata
import importlib.util

import torch

from . import flash_packages, flash_varlen
from .flash_packages import ApiVariant, Package, Provenance, Requirements, numbers

_FILE = "hopper/flash_attn_interface.py"
_UNUSED = (
    *("k_new", "v_new", "qv", "out", "cu_seqlens_k_new", "seqused_q", "seqused_k", "page_table", "kv_batch_idx"),
    *("leftpad_k", "rotary_cos", "rotary_sin", "seqlens_rotary", "q_descale", "k_descale", "v_descale"),
)
_form = functools.partial(
    ApiVariant,
    forward=("_flash_attn_forward", "_flash_attn_forward"),
    backward=("_flash_attn_backward", "_flash_attn_backward"),
)
WITH_DEFAULTS = _form(
    windows=("window_size_left", "window_size_right"),
    read=(Provenance("0251105a (2025-09 and later)", (60, 259), file=_FILE),),
)
WITHOUT_DEFAULTS = _form(
    windows=("window_size",),
    read=(Provenance("v2.8.0 to v2.8.3.post1", (20, 104), file=_FILE),),
    forward_always=dict.fromkeys(_UNUSED) | {"causal": False},
    backward_always={"sequed_q": None, "sequed_k": None, "causal": False},
)
FORMS = (WITH_DEFAULTS, WITHOUT_DEFAULTS)
_INSTEAD = "install hopper/ of flash-attention v2.8.0 to v2.8.3, or of September 2025 and later"


@functools.lru_cache(maxsize=1)
def installed() -> Package | str:
    """The installed package, or why there is none."""
    if importlib.util.find_spec("flash_attn_interface") is None:
        return "the package flash-attn-3 (module flash_attn_interface) is not installed"
    try:
        name = f"flash-attn-3 {importlib.metadata.version('flash_attn_3')}"
    except importlib.metadata.PackageNotFoundError:
        name = "flash_attn_interface"
    module = flash_packages.imported(name, "flash_attn_interface")
    if isinstance(module, str):
        return module
    return flash_packages.fitting(name, numbers(name.rpartition(" ")[2]), module, FORMS, _INSTEAD)


def limits(package: Package, wanted: Requirements) -> str | None:
    """What the package cannot do, or None."""
    if wanted.capability[0] != 9:
        return f"is for compute capability 9.x, not {flash_varlen.dotted(wanted.capability)}"
    if wanted.widest > 192 and torch.are_deterministic_algorithms_enabled():
        return f"has no deterministic backward for head dim {wanted.widest}, above 192"
    return None


def widths(q: torch.Tensor, v: torch.Tensor) -> tuple[int, int]:
    """The head dims that q, k and v, out are padded to."""
    head_dim, value_dim = (flash_varlen.eights(x.shape[-1]) for x in (q, v))
    latent = 128 < head_dim <= 192 and 96 < value_dim <= 128
    return (head_dim, value_dim) if latent else (max(head_dim, value_dim),) * 2


KERNEL = flash_packages.kernel("flash_attn_3", installed, limits, widths)
