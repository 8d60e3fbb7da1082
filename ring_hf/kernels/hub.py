"""FlashAttention from the Hugging Face hub, through the package `kernels`: built for many versions of PyTorch.

A kernel is loaded, and downloaded if it is not in the cache, only when it is named by its repository, and only for
tensors it could serve; "auto" never does that. The modules are those of `flash_attn_2`, `_3` and `_4` in a submodule,
which is taken from the loaded one as it cannot be imported by name. Versions as Transformers 5 pins them
(modeling_flash_attention_utils.py: FLASH_ATTN_KERNEL_VERSIONS).
"""

import functools
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from . import flash_attn_2, flash_attn_3, flash_attn_4, flash_packages, flash_varlen
from .flash_packages import ApiVariant, Limits, Package, Provenance
from .flash_varlen import FlashKernel, Widths


@dataclass(frozen=True, slots=True)
class Repository:
    """A kernel on the hub, and what its functions have in common with a package."""

    version: int
    submodule: str
    form: ApiVariant
    limits: Limits
    widths: Widths
    like: str  # the version of the package whose abilities it has, if the module does not say


def _read(form: ApiVariant, name: str, file: str, *lines: int) -> ApiVariant:
    where = Provenance("40d4194f", lines, "huggingface/kernels-community", f"{name}/torch-ext/{file}")
    return replace(form, read=(where,))


_TWO, _THREE, _VLLM, _FOUR = (
    _read(flash_attn_2.FORMS[2, 7, 0], "flash-attn2", "flash_attn2/flash_attn_interface.py", *(85, 164, 264, 358)),
    _read(flash_attn_3.WITH_DEFAULTS, "flash-attn3", "flash_attn3/flash_attn_interface.py", 41, 240),
    _read(flash_attn_3.WITHOUT_DEFAULTS, "vllm-flash-attn3", "vllm_flash_attn3/flash_attn_interface.py", *(19, 103)),
    _read(flash_attn_4.FORM, "flash-attn4", "flash_attn4/interface.py", 297, 968),
)
# The second generation of flash-attn2 is for PyTorch 2.10 and later.
_RECENT = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)
REPOSITORIES: dict[str, Repository] = {
    "kernels-community/flash-attn2": Repository(
        4 if _RECENT else 3, "flash_attn_interface", _TWO, flash_attn_2.limits, flash_varlen.one_width, "2.8.3"
    ),
    "kernels-community/flash-attn3": Repository(
        1, "flash_attn_interface", _THREE, flash_attn_3.limits, flash_attn_3.widths, "3.0.0"
    ),
    "kernels-community/vllm-flash-attn3": Repository(
        1, "flash_attn_interface", _VLLM, flash_attn_3.limits, flash_attn_3.widths, "3.0.0"
    ),
    "kernels-community/flash-attn4": Repository(
        0, "interface", _FOUR, flash_attn_4.limits, flash_attn_4.widths, "4.0.0.beta8"
    ),
}


# Kernels are numbered in the hub's present way; before, versions were read as specifiers such as ">=1".
_SINCE, _KERNELS = (0, 13, 0), "kernels>=0.13"


@functools.lru_cache(maxsize=len(REPOSITORIES))
def load(name: str) -> Package | str:
    """The kernel of this repository, or why there is none."""
    wanted = REPOSITORIES[name]
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return f"the package kernels, which loads it from the hub, is not installed; pip install '{_KERNELS}'"
    if flash_packages.numbers(version) < _SINCE:
        return f"kernels {version} loads no kernel by the number of its version; pip install '{_KERNELS}'"
    package = flash_packages.imported(f"kernels {version}", "kernels")
    if isinstance(package, str):
        return package
    try:
        module = package.get_kernel(name, version=wanted.version)
    # No network, no build for this machine, or a build that cannot be loaded: the hub's client has many words for it.
    except Exception as error:
        return f"version {wanted.version} of it could not be loaded from the hub ({type(error).__name__}: {error})"
    functions = getattr(module, wanted.submodule, None)
    if functions is None:
        return f"version {wanted.version} of it has no submodule {wanted.submodule}"
    itself = str(getattr(module, "__version__", wanted.like))
    of_form = flash_attn_4.beta(itself) if wanted.form is _FOUR else flash_packages.numbers(wanted.like)
    instead = "install the package itself, or name another kernel"
    return flash_packages.fitting(f"{name} (version {wanted.version})", of_form, functions, (wanted.form,), instead)


def _kernel(name: str, repository: Repository) -> FlashKernel:
    cuts_rows = repository.form is _TWO
    made = flash_packages.kernel(name, functools.partial(load, name), repository.limits, repository.widths, cuts_rows)
    return replace(made, why_unsupported=functools.partial(_why_unsupported, made.why_unsupported))


def _why_unsupported(
    why_unsupported: Callable[[torch.Tensor, torch.Tensor, float | None], str | None],
    q: torch.Tensor,
    v: torch.Tensor,
    softcap: float | None,
) -> str | None:
    """Nothing is downloaded for tensors that it cannot serve."""
    return flash_varlen.why_unsupported(q, v) or why_unsupported(q, v, softcap)


KERNELS: dict[str, FlashKernel] = {name: _kernel(name, repository) for name, repository in REPOSITORIES.items()}
