"""What the cost model knows of a machine and of an attention layer: rates, links, heads."""

from dataclasses import dataclass, replace


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
        flops, backward_flops: what attention kernels reach in half precision.
        full_precision: how many times slower they are with elements of 4 bytes or more.
        memory_bandwidth: at which a partial result is merged into the output.
        launch: seconds that a step with work costs whatever its size.
        gather: bandwidth of a collective over that of point-to-point messages.
        room: bytes that gathered keys, values and their gradients may take before `auto` prefers a ring.
    """

    name: str
    flops: float
    backward_flops: float
    full_precision: float
    memory_bandwidth: float
    launch: float
    node_bandwidth: float
    node_latency: float
    network_bandwidth: float
    network_latency: float
    ranks_per_node: int
    gather: float = 1.0
    room: float = 4e9


# Peaks and links from NVIDIA's data sheets: A100 312 TFLOP/s, 2.0 TB/s HBM, 300 GB/s NVLink, HDR 200 Gb/s; H100 SXM
# 989, 3.35, 450, NDR 400; H200 as H100 with 4.8 TB/s; B200 2,250, 8.0, 900, NDR 400; one network card per device. 80
# % of NVLink and HBM and 90 % of the network are taken as reachable. Kernels: FlashAttention-2 on A100 (Dao 2023,
# arXiv 2307.08691: up to 73 % of the peak forward and 63 % backward; here 200 and 175), FlashAttention-3 on H100
# (Shah et al. 2024, arXiv 2407.08608, causal, head dim 128: 616 forward, 561 backward), the same share of the peak on
# B200 (assumed). Latencies and launch: assumed. CPU: measured with PyTorch's operator on one core of an Intel Xeon
# with AMX (bf16 370 and 205 GFLOP/s, fp32 134 and 133), and gloo over loopback between two processes (16 MiB: 1.8
# GB/s point to point, 0.42 gathering, 0.34 reduce-scattering); one machine is one node, whatever its processes.
HARDWARE = {
    "cpu": Hardware("cpu", 3.7e11, 2.0e11, 2.0, 6e9, 1e-4, 1.8e9, 1.5e-4, 1.0e8, 1e-3, 1024, gather=0.22, room=1e9),
    "a100": Hardware("a100", 2.0e14, 1.75e14, 8.0, 1.6e12, 1e-5, 2.4e11, 1e-5, 2.25e10, 2e-5, 8),
    "h100": Hardware("h100", 6.0e14, 5.6e14, 8.0, 2.7e12, 1e-5, 3.6e11, 1e-5, 4.5e10, 2e-5, 8),
    "h200": Hardware("h200", 6.0e14, 5.6e14, 8.0, 3.8e12, 1e-5, 3.6e11, 1e-5, 4.5e10, 2e-5, 8),
    "b200": Hardware("b200", 1.4e15, 1.28e15, 8.0, 6.4e12, 1e-5, 7.2e11, 1e-5, 4.5e10, 2e-5, 8),
}


def hardware_of(device_type: str, ranks_per_node: int) -> Hardware:
    """The preset for a torch device type: "cpu", or H100 for every accelerator, with this many ranks per node.

    Only device type and node size enter: every rank of a job knows them alike, whatever card it happens to have.
    """
    return replace(HARDWARE["cpu" if device_type == "cpu" else "h100"], ranks_per_node=max(1, ranks_per_node))
