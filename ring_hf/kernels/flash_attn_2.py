"""Attention on tiles with the flash-attn package, version 2 (Dao 2023, arXiv 2307.08691; CUDA; soft-capping too).

Dense and packed calls have functions of their own. `window_size=(left, right)` became two arguments with 2.7, when
backward also stopped returning the gradients that it writes into dq, dk, dv, and the functions became custom
operators; 2.7.3 brought Blackwell. 2.6.0 and 2.6.1 take a softcap that their backward ignores. The host code gets
tiles with more queries than keys wrong (`flash_varlen.cut_rows`).
"""

import functools
import importlib.metadata

from . import flash_packages, flash_varlen
from .flash_packages import ApiVariant, Package, Provenance, Requirements, numbers

_ALWAYS = {"dropout_p": 0.0, "alibi_slopes": None, "causal": False}
_form = functools.partial(
    ApiVariant,
    forward=("_flash_attn_forward", "_flash_attn_varlen_forward"),
    backward=("_flash_attn_backward", "_flash_attn_varlen_backward"),
    forward_always=_ALWAYS | {"return_softmax": False},
    backward_always=_ALWAYS,
)
# From this version on; the last until `_UNREAD`.
FORMS: dict[tuple[int, ...], ApiVariant] = {
    (2, 6, 2): _form(windows=("window_size",), lse_at=5, read=(Provenance("v2.6.2, v2.6.3", (48, 70, 118, 168)),)),
    (2, 7, 0): _form(
        windows=("window_size_left", "window_size_right"),
        read=(
            Provenance("v2.7.0 to v2.7.0.post2", (77, 143, 236, 328)),
            Provenance("v2.7.1 to v2.7.2.post1", (82, 148, 241, 333)),
            Provenance("v2.7.3 to v2.7.4.post1", (82, 148, 243, 335)),
            Provenance("v2.8.0 to v2.8.3.post1", (77, 143, 238, 330)),
            Provenance("0251105a (2.8.4)", (85, 154, 253, 348)),
        ),
    ),
}
_UNREAD, _INSTEAD = (2, 9, 0), "install flash-attn>=2.6.2,<2.9"


@functools.lru_cache(maxsize=1)
def installed() -> Package | str:
    """The installed package, or why there is none."""
    try:
        version = importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return "the package flash-attn is not installed"
    form = form_of(version)
    if form is None:
        return (
            f"flash-attn {version} is not one whose functions are known here; {_INSTEAD} "
            "(2.6.0 and 2.6.1 ignore soft-capping in backward)"
        )
    module = flash_packages.imported(f"flash-attn {version}", "flash_attn.flash_attn_interface")
    if isinstance(module, str):
        return module
    return flash_packages.fitting(f"flash-attn {version}", numbers(version), module, (form,), _INSTEAD)


def form_of(version: str) -> ApiVariant | None:
    """The form of a version such as "2.7.4.post1", None if it is not known."""
    found = [form for since, form in FORMS.items() if since <= numbers(version) < _UNREAD]
    return found[-1] if found else None


def limits(package: Package, wanted: Requirements) -> str | None:
    """What the package cannot do, or None."""
    if package.version < (2, 7, 3) and wanted.capability > (9, 0):
        return f"is not for compute capability {flash_varlen.dotted(wanted.capability)}; 2.7.3 and later are"
    return None


KERNEL = flash_packages.kernel("flash_attn_2", installed, limits, cuts_rows=True)
