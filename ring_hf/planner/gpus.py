"""Devices: memory, peak, and the rates that kernels are known to reach on them, each with its source.

A rate is a *stated efficiency*: what somebody published for a kernel alone. No number here was chosen to make a whole
run come out right.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..costmodel.devices import HARDWARE, Hardware

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        memory: bytes that torch reports as total.
        peak: dense FLOP/s in bf16, the denominator of MFU.
        gemm, gemm_fp8: FLOP/s that large matrix products reach.
        kernels: by kernel name, FLOP/s of causal attention forward and backward, head dim 128.
        host_bandwidth: bytes/s between the device and host memory, one way.
        links: the cost model's preset for links, memory bandwidth and launches.
    """

    name: str
    memory: float
    peak: float
    gemm: float
    gemm_fp8: float
    kernels: Mapping[str, tuple[float, float]]
    host_bandwidth: float
    links: str
    source: str

    def rates(self, kernel: str) -> tuple[float, float]:
        """FLOP/s forward and backward of a kernel, "auto" for the fastest.

        Raises:
            ValueError: if no rate of that kernel on this device is known.
        """
        name = next(iter(self.kernels)) if kernel == "auto" else kernel
        if name not in self.kernels:
            raise ValueError(
                f"--kernel {kernel!r} has no published rate on {self.name}. Choose one of auto, "
                f"{', '.join(self.kernels)}."
            )
        return self.kernels[name]

    def hardware(self, kernel: str, per_node: int) -> Hardware:
        """What the cost model takes."""
        forward, backward = self.rates(kernel)
        return replace(HARDWARE[self.links], flops=forward, backward_flops=backward, ranks_per_node=per_node)


# FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608, figures 5 and 6, H100 SXM5, 16K tokens, head dim 128): forward,
# causal 335 (FA2), 539 (cuDNN), 616 (FA3); backward 322, 516, 561 TFLOP/s, drawn without a causal mask.
_HOPPER = {"flash_attn_3": (616e12, 561e12), "cuda_cudnn": (539e12, 516e12), "flash_attn_2": (335e12, 322e12)}
# FlashAttention-2 (Dao 2023, arXiv 2307.08691): up to 73 % of an A100's peak forward, 63 % backward, at best; 200 and
# 175 for causal attention in training.
_AMPERE = {"flash_attn_2": (200e12, 175e12)}
_SHEET = "NVIDIA data sheet; "

DEVICES = {
    "a100-40": Device(
        "A100 40 GB", 39.4 * GIB, 312e12, 220e12, 220e12, _AMPERE, 25e9, "a100", _SHEET + "GEMM 70 % of the peak"
    ),
    "a100": Device(
        "A100 80 GB", 79.1 * GIB, 312e12, 220e12, 220e12, _AMPERE, 25e9, "a100", _SHEET + "GEMM 70 % of the peak"
    ),
    "h100": Device(
        "H100 80 GB", 79.1 * GIB, 989e12, 600e12, 900e12, _HOPPER, 50e9, "h100", _SHEET + "GEMM 61 % of the peak"
    ),
    "h100-96": Device(
        "H100 96 GB", 95.0 * GIB, 989e12, 600e12, 900e12, _HOPPER, 50e9, "h100", _SHEET + "GEMM 61 % of the peak"
    ),
    "h200": Device(
        "H200 141 GB", 139.8 * GIB, 989e12, 600e12, 900e12, _HOPPER, 50e9, "h200", _SHEET + "GEMM 61 % of the peak"
    ),
    "b200": Device(
        "B200 180 GB",
        178.3 * GIB,
        2250e12,
        1370e12,
        2050e12,
        {"assumed": (1400e12, 1280e12)},
        50e9,
        "b200",
        _SHEET + "attention and GEMM assumed at the shares of the peak that H100 reaches",
    ),
}

HOST_MEMORY_BANDWIDTH = 2e11  # bytes/s of a node's host memory while the optimizer runs on the CPU: assumed
HOST_MEMORY = 2e12  # bytes of a node: NVIDIA data sheet of DGX H100, 2 TB
RUNTIME = 2.5e9  # bytes: CUDA context, cuBLAS workspaces and NCCL buffers; assumed
FRAGMENTATION = 0.05  # of what activations take at most, lost between blocks of the allocator; assumed
