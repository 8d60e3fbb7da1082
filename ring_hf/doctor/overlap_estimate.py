"""Whether compute hides communication: measured rates in the cost model that `transport="auto"` decides with.

A ring step on c tokens computes `4 c^2 H D phi / F` seconds (phi = 1/2: causal, evenly balanced) and sends keys and
values, `bytes` per token, over B bytes/s. They are hidden from `c = bytes F / (2 H (D + Dv) phi B)` on, which is
`(e / 2 phi) (d_kv / d_q) (F / B)` of Ring Attention (Liu et al. 2023, arXiv 2310.01889, section 3) with grouped heads.
The backward has 2.5 times the FLOPs, and sends gradients in fp32 besides keys and values. Latency comes on top.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from ..costmodel.devices import BACKWARD_FLOPS_RATIO, Hardware, Shape, hardware_of
from ..costmodel.pass_cost import WorkMatrices, estimate_pass
from ..costmodel.timeline import LayerCost
from ..geometry import Mask, ShardedSequence, auto_ulysses, padded_length
from .machine_report import AlgorithmEstimate, AttentionGroup, AttentionTiming, MachineReport, OverlapEstimate, Query

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_CAUSAL_SHARE = 0.5


class Algorithm(NamedTuple):
    """A way to run attention: its name in the report, layout, transport, and ranks that exchange heads."""

    name: str
    layout: str
    transport: str
    ulysses: int


class KernelRates(NamedTuple):
    """FLOP/s of attention in both passes, and the seconds that a call costs whatever its length."""

    forward: float
    backward: float
    launch: float


def predict_overlap(report: MachineReport) -> OverlapEstimate | None:
    """Predict all algorithms from the measurements of a report; None if it has no measurement or a single rank."""
    query, groups = report.query, report.attention_groups
    if not report.timings or not groups or query.num_ranks == 1:
        return None
    hardware, links_source = measured_hardware(report)
    algorithms = _candidate_algorithms(query, groups, hardware)
    min_tokens_forward, min_tokens_backward = None, None
    dense = [group for group in groups if group.max_visible_keys is None]
    if dense:
        shape = _shape(dense[0], query.dtype)
        min_tokens_forward = _min_tokens(shape, hardware, query.num_ranks, backward=False)
        min_tokens_backward = _min_tokens(shape, hardware, query.num_ranks, backward=True)
    return OverlapEstimate(
        tokens=padded_length(query.layout, query.seq_length, query.num_ranks, 1) // query.num_ranks,
        min_tokens_forward=min_tokens_forward,
        min_tokens_backward=min_tokens_backward,
        algorithms=tuple(_estimate(algorithm, groups, query, hardware) for algorithm in algorithms),
        links_measured=bool(report.links.times),
        links_source=links_source,
    )


def measured_hardware(report: MachineReport) -> tuple[Hardware, str]:
    """Return this machine for the cost model, and the source of its link rates in words."""
    local_world_size = report.environment.get("LOCAL_WORLD_SIZE")
    num_devices = len(report.devices.names) if report.devices.kind == "cuda" else report.query.num_ranks
    ranks_per_node = int(local_world_size) if local_world_size else num_devices
    preset = hardware_of(report.devices.kind, ranks_per_node)
    rates = kernel_rates(report.timings)
    hardware = replace(
        preset,
        name="measured",
        flops=rates.forward,
        backward_flops=rates.backward,
        launch_overhead=rates.launch,
        full_precision=1.0,  # the rates were measured in the dtype of the query
    )
    links, num_nodes = report.links, math.ceil(report.query.num_ranks / ranks_per_node)
    if not links.times:
        return hardware, f"links assumed as of the preset {preset.name}"
    if links.num_processes > ranks_per_node:  # the slowest link was one between nodes
        return replace(hardware, network_bandwidth=links.bandwidth, network_latency=links.latency), "links measured"
    hardware = replace(hardware, node_bandwidth=links.bandwidth, node_latency=links.latency)
    if num_nodes > 1:
        return hardware, f"links inside a node measured, between nodes assumed as of the preset {preset.name}"
    return hardware, "links measured"


def kernel_rates(timings: tuple[AttentionTiming, ...]) -> KernelRates:
    """Return the FLOP/s of the longest run, and the seconds that the shortest run took beyond its FLOPs."""
    short, long = timings[0], timings[-1]
    forward, backward = long.flops / long.forward, BACKWARD_FLOPS_RATIO * long.flops / long.backward
    return KernelRates(forward, backward, max(short.forward - short.flops / forward, 1e-6))


def _min_tokens(shape: Shape, hardware: Hardware, num_ranks: int, backward: bool) -> int:
    bandwidth = hardware.network_bandwidth if num_ranks > hardware.ranks_per_node else hardware.node_bandwidth
    layer = LayerCost(shape, hardware, 1, backward)
    sent = layer.kv_bytes + (layer.grad_bytes if backward else 0)
    return math.ceil(sent / bandwidth / (layer.seconds_per_pair * _CAUSAL_SHARE))


def _candidate_algorithms(query: Query, groups: tuple[AttentionGroup, ...], hardware: Hardware) -> Iterator[Algorithm]:
    """Yield the algorithms to compare, the ring first."""
    for transport in ("ring", "direct", "allgather"):
        yield Algorithm(transport, query.layout, transport, 1)
    ranks_per_node = hardware.ranks_per_node
    ulysses = min(auto_ulysses(g.num_heads, g.num_kv_heads, query.num_ranks, ranks_per_node) for g in groups)
    if ulysses == query.num_ranks:
        yield Algorithm("ulysses", "contiguous", "ring", query.num_ranks)
    elif ulysses > 1 and query.num_ranks % ulysses == 0:
        yield Algorithm(f"hybrid, ulysses {ulysses}", query.layout, "ring", ulysses)


def _estimate(
    algorithm: Algorithm, groups: tuple[AttentionGroup, ...], query: Query, hardware: Hardware
) -> AlgorithmEstimate:
    length = padded_length(algorithm.layout, query.seq_length, query.num_ranks, algorithm.ulysses)
    sequence = ShardedSequence(algorithm.layout, length, query.num_ranks, ulysses=algorithm.ulysses)
    seconds = {False: 0.0, True: 0.0}  # by whether the pass is backward
    exposed = {False: 0.0, True: 0.0}
    for group in groups:
        matrices = WorkMatrices.estimate(sequence, Mask(True, group.window, group.chunk))
        for backward in (False, True):
            cost = estimate_pass(matrices, _shape(group, query.dtype), hardware, algorithm.transport, 1, backward)
            seconds[backward] += group.count * cost.total
            exposed[backward] += group.count * cost.exposed
    return AlgorithmEstimate(algorithm.name, seconds[False], seconds[True], exposed[False], exposed[True])


def _shape(group: AttentionGroup, dtype: str) -> Shape:
    return Shape(group.num_heads, group.num_kv_heads, group.head_dim, group.v_head_dim, ELEMENT_BYTES[dtype])
