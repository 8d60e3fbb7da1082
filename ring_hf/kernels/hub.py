"""FlashAttention from the Hugging Face hub, through the package `kernels`: built for many versions of PyTorch.

A kernel is loaded, and downloaded if it is not in the cache, only if it is named by its repository, and only for
tensors that it can support; "auto" never loads one. The modules are those of `flash_attn_2`, `_3` and `_4` in a
submodule, which is an attribute of the loaded module because it cannot be imported by name. The versions are those
that Transformers 5 pins (modeling_flash_attention_utils.py: FLASH_ATTN_KERNEL_VERSIONS).
"""

import functools
import importlib.metadata
from dataclasses import dataclass, replace

import torch

from . import flash_attn_2, flash_attn_3, flash_attn_4, flash_packages, flash_varlen
from .flash_packages import ApiVariant, CheckLimits, Package
from .flash_varlen import FlashKernel, PaddedHeadDims
from .kernel import SupportCheck


@dataclass(frozen=True, slots=True)
class Repository:
    """A kernel on the hub.

    Args:
        version: the number under which the hub has it.
        submodule: the submodule with the functions.
        variant: their API.
        check_limits: see `make_kernel`.
        padded_head_dims: see `FlashKernel`.
        equivalent_version: the version of the package with the same features, used if the module does not state one.
        split_tall_tiles: see `FlashKernel`.
    """

    version: int
    submodule: str
    variant: ApiVariant
    check_limits: CheckLimits
    padded_head_dims: PaddedHeadDims
    equivalent_version: str
    split_tall_tiles: bool = False


# The second generation of flash-attn2 requires PyTorch 2.10.
_FLASH_ATTN_2_VERSION = 4 if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10) else 3
REPOSITORIES: dict[str, Repository] = {
    "kernels-community/flash-attn2": Repository(
        version=_FLASH_ATTN_2_VERSION,
        submodule="flash_attn_interface",
        variant=flash_attn_2.VARIANTS[2, 7, 0],
        check_limits=flash_attn_2.check_limits,
        padded_head_dims=flash_varlen.shared_head_dim,
        equivalent_version="2.8.3",
        split_tall_tiles=True,
    ),
    "kernels-community/flash-attn3": Repository(
        version=1,
        submodule="flash_attn_interface",
        variant=flash_attn_3.WITH_DEFAULTS,
        check_limits=flash_attn_3.check_limits,
        padded_head_dims=flash_attn_3.padded_head_dims,
        equivalent_version="3.0.0",
    ),
    "kernels-community/vllm-flash-attn3": Repository(
        version=1,
        submodule="flash_attn_interface",
        variant=flash_attn_3.WITHOUT_DEFAULTS,
        check_limits=flash_attn_3.check_limits,
        padded_head_dims=flash_attn_3.padded_head_dims,
        equivalent_version="3.0.0",
    ),
    "kernels-community/flash-attn4": Repository(
        version=0,
        submodule="interface",
        variant=flash_attn_4.VARIANT,
        check_limits=flash_attn_4.check_limits,
        padded_head_dims=flash_attn_4.padded_head_dims,
        equivalent_version="4.0.0.beta8",
    ),
}
# Older releases of `kernels` read versions as specifiers such as ">=1", not as the numbers of the hub.
_FIRST_RELEASE = (0, 13, 0)
_REQUIREMENT = "kernels>=0.13"


@functools.lru_cache(maxsize=len(REPOSITORIES))
def load(name: str) -> Package | str:
    """Return the kernel of this repository, or the reason why it cannot be used."""
    repository = REPOSITORIES[name]
    try:
        release = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return f"the package kernels, which loads it from the hub, is not installed; pip install '{_REQUIREMENT}'"
    if flash_packages.parse_version(release) < _FIRST_RELEASE:
        return f"kernels {release} cannot load a kernel by the number of its version; pip install '{_REQUIREMENT}'"
    kernels = flash_packages.import_package(f"kernels {release}", "kernels")
    if isinstance(kernels, str):
        return kernels
    version = repository.version
    try:
        loaded = kernels.get_kernel(name, version=version)
    # No network, no build for this machine, a build that cannot be loaded: the hub's client raises many types.
    except Exception as error:
        return f"version {version} of it could not be loaded from the hub ({type(error).__name__}: {error})"
    module = getattr(loaded, repository.submodule, None)
    if module is None:
        return f"version {version} of it has no submodule {repository.submodule}"
    if repository.variant is flash_attn_4.VARIANT:
        features = flash_attn_4.parse_beta(str(getattr(loaded, "__version__", repository.equivalent_version)))
    else:
        features = flash_packages.parse_version(repository.equivalent_version)
    advice = "install the package itself, or name another kernel"
    return flash_packages.match_variant(f"{name} (version {version})", features, module, (repository.variant,), advice)


def _make_kernel(name: str, repository: Repository) -> FlashKernel:
    kernel = flash_packages.make_kernel(
        name,
        functools.partial(load, name),
        repository.check_limits,
        repository.padded_head_dims,
        repository.split_tall_tiles,
    )
    return replace(kernel, why_unsupported=functools.partial(_why_unsupported, kernel.why_unsupported))


def _why_unsupported(
    why_unsupported: SupportCheck, q: torch.Tensor, v: torch.Tensor, softcap: float | None
) -> str | None:
    # A kernel is not downloaded for tensors that no FlashAttention supports.
    return flash_varlen.why_unsupported(q, v) or why_unsupported(q, v, softcap)


KERNELS: dict[str, FlashKernel] = {name: _make_kernel(name, repository) for name, repository in REPOSITORIES.items()}
