"""Attention on tiles with the flash-attn package, version 2 (Dao 2023, arXiv 2307.08691; CUDA, with soft-capping).

Dense and packed launches have separate functions. Since 2.7, `window_size=(left, right)` is two arguments, backward
no longer returns the gradients that it writes to dq, dk, dv, and the functions are custom operators. Blackwell is
supported since 2.7.3. 2.6.0 and 2.6.1 accept a softcap that their backward ignores. The host code computes tiles with
more queries than keys wrongly (`flash_varlen.split_tall_tile`).
"""

import functools
import importlib.metadata

from . import flash_packages, flash_varlen
from .flash_packages import ApiVariant, Package, Requirements, parse_version

_CONSTANTS = {"dropout_p": 0.0, "alibi_slopes": None, "causal": False}
_variant = functools.partial(
    ApiVariant,
    forward=("_flash_attn_forward", "_flash_attn_varlen_forward"),
    backward=("_flash_attn_backward", "_flash_attn_varlen_backward"),
    forward_constants=_CONSTANTS | {"return_softmax": False},
    backward_constants=_CONSTANTS,
)
# By the first version that has the variant, in order; the last one ends before `_FIRST_UNKNOWN`.
VARIANTS: dict[tuple[int, ...], ApiVariant] = {
    (2, 6, 2): _variant(window_args=("window_size",), lse_index=5),
    (2, 7, 0): _variant(window_args=("window_size_left", "window_size_right")),
}
_FIRST_UNKNOWN = (2, 9, 0)
_ADVICE = "install flash-attn>=2.6.2,<2.9"


@functools.lru_cache(maxsize=1)
def locate_package() -> Package | str:
    """Return the installed package, or the reason why it cannot be used."""
    try:
        version = importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return "the package flash-attn is not installed"
    variant = find_variant(version)
    if variant is None:
        return (
            f"flash-attn {version} is not a version whose functions are known here; {_ADVICE} "
            "(2.6.0 and 2.6.1 ignore soft-capping in backward)"
        )
    module = flash_packages.import_package(f"flash-attn {version}", "flash_attn.flash_attn_interface")
    if isinstance(module, str):
        return module
    return flash_packages.match_variant(f"flash-attn {version}", parse_version(version), module, (variant,), _ADVICE)


def find_variant(version: str) -> ApiVariant | None:
    """Return the variant of a version such as "2.7.4.post1", or None if the version is not known."""
    numbers = parse_version(version)
    matching = [variant for first, variant in VARIANTS.items() if first <= numbers < _FIRST_UNKNOWN]
    return matching[-1] if matching else None


def check_limits(package: Package, requirements: Requirements) -> str | None:
    """Return what the package lacks for these requirements, or None."""
    if package.version < (2, 7, 3) and requirements.capability > (9, 0):
        capability = flash_varlen.format_version(requirements.capability)
        return f"does not support compute capability {capability}; 2.7.3 and later do"
    return None


KERNEL = flash_packages.make_kernel("flash_attn_2", locate_package, check_limits, split_tall_tiles=True)
