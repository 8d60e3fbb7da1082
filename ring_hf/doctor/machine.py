"""What is installed and what hardware there is, as far as PyTorch and the package metadata tell.

The floors are those of pyproject.toml and the tested versions those of constraints.txt; a test compares both tables.
"""

import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from .facts import Devices, Package


@dataclass(frozen=True)
class Wanted:
    """What is asked of a package's version."""

    name: str
    least: str
    below: str | None
    tested: str | None
    required: bool


WANTED = (
    Wanted("torch", "2.6", None, "2.13.0", True),
    Wanted("transformers", "5.15", "6", "5.23.0", True),
    Wanted("accelerate", "1.12", None, "1.15.0", True),
    Wanted("flash-attn", "2.6.2", "2.9", None, False),
    Wanted("flash-attn-3", "0", None, None, False),
    Wanted("flash-attn-4", "0", None, None, False),
    Wanted("kernels", "0", None, None, False),
    Wanted("deepspeed", "0.18.2", None, None, False),
)
PYTHON = "3.11"
# Variables that change how fast ranks exchange, or whether they can.
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


def numbers(version: str) -> tuple[int, ...]:
    """`"2.13.0+cpu"` as `(2, 13, 0)`, to compare; what is no number ends it."""
    found: list[int] = []
    for part in version.split("+")[0].split("."):
        digits = "".join(letter for letter in part if letter.isdigit())
        if not digits or not part[0].isdigit():
            break
        found.append(int(digits))
    return tuple(found)


def judge(wanted: Wanted, found: str | None, notes: str = "") -> Package:
    """A package as it was found, and whether its version is one that is asked for."""
    needs = f">={wanted.least}" if wanted.least != "0" else "any"
    needs += f",<{wanted.below}" if wanted.below else ""
    fits = not wanted.required if found is None else _within(found, wanted)
    return Package(wanted.name, found, needs, wanted.tested, wanted.required, fits, notes)


def _within(found: str, wanted: Wanted) -> bool:
    have = numbers(found)
    return have >= numbers(wanted.least) and (wanted.below is None or have < numbers(wanted.below))


def packages() -> tuple[Package, ...]:
    """Python, what we need, what we can use, and ourselves."""
    found = [judge(Wanted("python", PYTHON, None, PYTHON, True), platform.python_version())]
    found += [judge(wanted, _version(wanted.name), _torch_libraries() * (wanted.name == "torch")) for wanted in WANTED]
    from .. import __version__

    return (*found, Package("ring_hf", __version__, "", None, True))


def _version(name: str) -> str | None:
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


def devices() -> Devices:
    """All GPUs that PyTorch sees, else the CPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    if not torch.cuda.is_available():
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Devices("cpu", (platform.processor() or platform.machine(),), memory, cores, unused=driver)
    count = torch.cuda.device_count()
    properties = [torch.cuda.get_device_properties(n) for n in range(count)]
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    peers = all(torch.cuda.can_device_access_peer(a, b) for a, b in pairs) if pairs else None
    least = min((one.major, one.minor) for one in properties)
    memory = min(one.total_memory for one in properties)
    return Devices("cuda", tuple(one.name for one in properties), memory, cores, least, peers)


def environment() -> dict[str, str]:
    """Those of `VARIABLES` that are set."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}
