"""Devices and attention layers as the cost model and the planner see them: memory, rates, links, heads.

A rate is a *stated efficiency*: what somebody published for a kernel alone. No number here was chosen to make a whole
run come out right.

Data sheets (NVIDIA, dense bf16): A100 312 TFLOP/s, 2.0 TB/s HBM, 300 GB/s NVLink, HDR 200 Gb/s; H100 SXM 989, 3.35,
450, NDR 400; H200 as H100 with 4.8 TB/s; B200 2,250, 8.0, 900, NDR 400; one network card per device. 80 % of NVLink
and HBM and 90 % of the network are taken as reachable. Latencies and launches of GPUs are assumed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

GIB = 2**30
BACKWARD_FLOPS_RATIO = 2.5  # FLOPs of an attention backward over its forward: five matrix products instead of two

HOST_MEMORY = 2e12  # bytes of a node: NVIDIA data sheet of DGX H100, 2 TB
HOST_MEMORY_BANDWIDTH = 2e11  # bytes/s of a node's host memory while the optimizer runs on the CPU: assumed


@dataclass(frozen=True)
class Shape:
    """One attention layer's heads and head dims, the bytes of an element, and the rows of a batch."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    bytes_per_element: int = 2
    num_rows: int = 1


@dataclass(frozen=True)
class Hardware:
    """Rates of one device and its links; bandwidths are bytes/s in one direction, for one device.

    Attributes:
        flops, backward_flops: FLOP/s that attention kernels reach in half precision.
        full_precision: how many times slower they are with elements of 4 bytes or more.
        memory_bandwidth: bytes/s at which a partial result is merged into the output.
        launch_overhead: seconds that a step with work costs whatever its size.
        collective_efficiency: bandwidth of a collective over that of point-to-point messages.
        memory_budget: bytes that gathered keys, values and their gradients may take before `auto` prefers a ring.
    """

    name: str
    flops: float
    backward_flops: float
    full_precision: float
    memory_bandwidth: float
    launch_overhead: float
    node_bandwidth: float
    node_latency: float
    network_bandwidth: float
    network_latency: float
    ranks_per_node: int
    collective_efficiency: float = 1.0
    memory_budget: float = 4e9


@dataclass(frozen=True)
class Device:
    """One accelerator; bandwidths are bytes/s in one direction.

    Attributes:
        key: its name on the command line and in `DEVICES`.
        memory: bytes that torch reports as total.
        peak: dense FLOP/s in bf16, the denominator of MFU.
        gemm, gemm_fp8: FLOP/s that large matrix products reach.
        kernels: by kernel name, FLOP/s of causal attention forward and backward, head dim 128; the fastest first.
        memory_bandwidth, node_bandwidth, network_bandwidth: reachable shares of HBM, NVLink and the network card.
        host_bandwidth: between the device and host memory.
        source: of memory, peak and matrix products.
    """

    key: str
    name: str
    memory: float
    peak: float
    gemm: float
    gemm_fp8: float
    kernels: Mapping[str, tuple[float, float]]
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float
    host_bandwidth: float
    source: str

    def rates(self, kernel: str) -> tuple[float, float]:
        """Return FLOP/s forward and backward of a kernel, "auto" for the fastest.

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

    def hardware(self, kernel: str = "auto", ranks_per_node: int = 8) -> Hardware:
        """Return the rates that the cost model takes.

        Raises:
            ValueError: if no rate of that kernel on this device is known.
        """
        flops, backward_flops = self.rates(kernel)
        return Hardware(
            self.key,
            flops,
            backward_flops,
            full_precision=8.0,
            memory_bandwidth=self.memory_bandwidth,
            launch_overhead=1e-5,
            node_bandwidth=self.node_bandwidth,
            node_latency=1e-5,
            network_bandwidth=self.network_bandwidth,
            network_latency=2e-5,
            ranks_per_node=ranks_per_node,
        )


_A100 = Device(
    "a100",
    "A100 80 GB",
    memory=79.1 * GIB,
    peak=312e12,
    gemm=220e12,
    gemm_fp8=220e12,
    # FlashAttention-2 (Dao 2023, arXiv 2307.08691): up to 73 % of an A100's peak forward, 63 % backward, at best; 200
    # and 175 for causal attention in training.
    kernels={"flash_attn_2": (200e12, 175e12)},
    memory_bandwidth=1.6e12,
    node_bandwidth=2.4e11,
    network_bandwidth=2.25e10,
    host_bandwidth=25e9,
    source="NVIDIA data sheet; GEMM 70 % of the peak",
)
_H100 = Device(
    "h100",
    "H100 80 GB",
    memory=79.1 * GIB,
    peak=989e12,
    gemm=600e12,
    gemm_fp8=900e12,
    # FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608, figures 5 and 6, H100 SXM5, 16K tokens, head dim 128):
    # forward, causal 335 (FA2), 539 (cuDNN), 616 (FA3); backward 322, 516, 561 TFLOP/s, drawn without a causal mask.
    kernels={"flash_attn_3": (616e12, 561e12), "cuda_cudnn": (539e12, 516e12), "flash_attn_2": (335e12, 322e12)},
    memory_bandwidth=2.7e12,
    node_bandwidth=3.6e11,
    network_bandwidth=4.5e10,
    host_bandwidth=50e9,
    source="NVIDIA data sheet; GEMM 61 % of the peak",
)
_B200 = Device(
    "b200",
    "B200 180 GB",
    memory=178.3 * GIB,
    peak=2250e12,
    gemm=1370e12,
    gemm_fp8=2050e12,
    kernels={"assumed": (1400e12, 1280e12)},
    memory_bandwidth=6.4e12,
    node_bandwidth=7.2e11,
    network_bandwidth=4.5e10,
    host_bandwidth=50e9,
    source="NVIDIA data sheet; attention and GEMM assumed at the shares of the peak that H100 reaches",
)
DEVICES = {
    device.key: device
    for device in (
        replace(_A100, key="a100-40", name="A100 40 GB", memory=39.4 * GIB),
        _A100,
        _H100,
        replace(_H100, key="h100-96", name="H100 96 GB", memory=95.0 * GIB),
        replace(_H100, key="h200", name="H200 141 GB", memory=139.8 * GIB, memory_bandwidth=3.8e12),
        _B200,
    )
}

# Measured with PyTorch's operator on one core of an Intel Xeon with AMX (bf16 370 and 205 GFLOP/s, fp32 134 and 133),
# and gloo over loopback between two processes (16 MiB: 1.8 GB/s point to point, 0.42 gathering, 0.34
# reduce-scattering). One machine is one node, whatever its processes.
_CPU = Hardware(
    "cpu",
    flops=3.7e11,
    backward_flops=2.0e11,
    full_precision=2.0,
    memory_bandwidth=6e9,
    launch_overhead=1e-4,
    node_bandwidth=1.8e9,
    node_latency=1.5e-4,
    network_bandwidth=1.0e8,
    network_latency=1e-3,
    ranks_per_node=1024,
    collective_efficiency=0.22,
    memory_budget=1e9,
)
HARDWARE = {"cpu": _CPU, **{key: device.hardware() for key, device in DEVICES.items()}}


def hardware_of(device_type: str, ranks_per_node: int) -> Hardware:
    """Return the preset of a torch device type: "cpu", or H100 for every accelerator, with this many ranks per node.

    Only device type and node size enter: all ranks of a job agree on both, whatever card each of them has.
    """
    return replace(HARDWARE["cpu" if device_type == "cpu" else "h100"], ranks_per_node=max(1, ranks_per_node))
