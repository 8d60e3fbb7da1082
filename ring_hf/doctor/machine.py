"""Installed packages, hardware and environment variables, as PyTorch and the package metadata report them.

Minimum versions are those of pyproject.toml, tested versions those of constraints-newest.txt; a test compares them.
"""

import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from ..version import __version__
from .machine_report import Devices, InstalledPackage


@dataclass(frozen=True)
class PackageRequirement:
    """The versions of a package that ring_hf supports.

    Attributes:
        min_version: the oldest supported version, "0" for any.
        below_version: the first version that is no longer supported, None without a limit.
        tested_version: the newest version that was tested.
    """

    name: str
    min_version: str
    below_version: str | None
    tested_version: str | None
    is_required: bool


REQUIREMENTS = (
    PackageRequirement("torch", "2.9", None, "2.14.1", True),
    PackageRequirement("transformers", "5.15", "6", "5.24.0", True),
    PackageRequirement("accelerate", "1.12", None, "1.15.0", True),
    PackageRequirement("flash-attn", "2.6.2", "2.9", None, False),
    PackageRequirement("flash-attn-3", "0", None, None, False),
    PackageRequirement("flash-attn-4", "0", None, None, False),
    PackageRequirement("kernels", "0", None, None, False),
    PackageRequirement("deepspeed", "0.18.2", None, None, False),
)
PYTHON = "3.11"
# Variables that change how fast ranks communicate, or whether they can.
VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING",
    "NCCL_P2P_DISABLE",
    "NCCL_SHM_DISABLE",
    "NCCL_IB_DISABLE",
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
)


def parse_version(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, for comparisons.

    >>> parse_version("2.13.0+cpu"), parse_version("2.8.3.post1")
    ((2, 13, 0), (2, 8, 3))
    """
    numbers: list[int] = []
    for part in version.split("+")[0].split("."):
        digits = "".join(letter for letter in part if letter.isdigit())
        if not digits or not part[0].isdigit():
            break
        numbers.append(int(digits))
    return tuple(numbers)


def check_version(requirement: PackageRequirement, version: str | None, notes: str = "") -> InstalledPackage:
    """Return the record of a package with this installed version, None if it is not installed."""
    version_range = f">={requirement.min_version}" if requirement.min_version != "0" else "any"
    version_range += f",<{requirement.below_version}" if requirement.below_version else ""
    is_supported = not requirement.is_required if version is None else _in_range(version, requirement)
    return InstalledPackage(
        requirement.name,
        version,
        version_range,
        requirement.tested_version,
        requirement.is_required,
        is_supported,
        notes,
    )


def _in_range(version: str, requirement: PackageRequirement) -> bool:
    numbers, below = parse_version(version), requirement.below_version
    return numbers >= parse_version(requirement.min_version) and (below is None or numbers < parse_version(below))


def list_packages() -> tuple[InstalledPackage, ...]:
    """Return Python, the required and the optional packages, and ring_hf itself."""
    packages = [check_version(PackageRequirement("python", PYTHON, None, PYTHON, True), platform.python_version())]
    for requirement in REQUIREMENTS:
        notes = _torch_libraries() if requirement.name == "torch" else ""
        packages.append(check_version(requirement, _installed_version(requirement.name), notes))
    return (*packages, InstalledPackage("ring_hf", __version__, "", None, True))


def _installed_version(name: str) -> str | None:
    if name == "torch":
        return str(torch.__version__)
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_libraries() -> str:
    if torch.version.cuda is None:
        return "a build without CUDA"
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "?"
    return f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, NCCL {nccl}"


def find_devices() -> Devices:
    """Return all GPUs that PyTorch can use, or the CPU if there are none."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    has_driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    if not torch.cuda.is_available():
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        name = platform.processor() or platform.machine()
        return Devices("cpu", (name,), memory, num_cores, has_unused_gpu=has_driver)
    count = torch.cuda.device_count()
    gpus = [torch.cuda.get_device_properties(index) for index in range(count)]
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    return Devices(
        kind="cuda",
        names=tuple(gpu.name for gpu in gpus),
        memory=min(gpu.total_memory for gpu in gpus),
        num_cores=num_cores,
        capability=min((gpu.major, gpu.minor) for gpu in gpus),
        has_peer_access=all(torch.cuda.can_device_access_peer(a, b) for a, b in pairs) if pairs else None,
    )


def read_environment() -> dict[str, str]:
    """Return the variables of `VARIABLES` that are set."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}
