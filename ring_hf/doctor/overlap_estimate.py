"""Whether compute hides the exchange: measured rates in the cost model that `transport="auto"` decides with.

A step of the ring on c tokens computes `4 c^2 H D phi / F` seconds (phi = 1/2: causal, evenly dealt) and sends keys
and values, `bytes` a token, over B bytes/s. They are hidden from `c = bytes F / (2 H (D + Dv) phi B)` on, which is
`(e / 2 phi) (d_kv / d_q) (F / B)` of Ring Attention (Liu et al. 2023, arXiv 2310.01889, section 3) with grouped heads.
Backward has 2.5 times the FLOPs, and gradients in fp32 beside keys and values. Latency comes on top.
"""

import math
from dataclasses import replace

from ..costmodel.devices import BACKWARD_FLOPS_RATIO, Hardware, Shape, hardware_of
from ..costmodel.pass_cost import WorkMatrices, estimate_pass
from ..costmodel.timeline import LayerCost
from ..geometry import Mask, ShardedSequence, auto_ulysses, padded_length
from .facts import AlgorithmEstimate, AttentionGroup, Diagnosis, Overlap, Query, Speed

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_CAUSAL = 0.5


def predict(facts: Diagnosis) -> Overlap | None:
    """From what was measured; None if there is nothing to predict from."""
    question, layers = facts.question, facts.layers
    if not facts.speeds or not layers or question.ranks == 1:
        return None
    hardware, where = machine_of(facts)
    ways = []
    for name, layout, transport, ulysses in _algorithms(question, layers, hardware):
        costs = [_cost(one, question, hardware, layout, transport, ulysses) for one in layers]
        totals = [sum(column) for column in zip(*costs, strict=True)]
        ways.append(AlgorithmEstimate(name, *totals))
    dense = [one for one in layers if one.visible is None]
    forward, backward = None, None
    if dense:
        forward, backward = _least(_shape(dense[0], question.dtype), hardware, question.ranks)
    tokens = padded_length(question.layout, question.sequence, question.ranks, 1) // question.ranks
    return Overlap(tokens, forward, backward, tuple(ways), bool(facts.links.times), where)


def machine_of(facts: Diagnosis) -> tuple[Hardware, str]:
    """This machine for the cost model, and in words where its links' figures come from."""
    local = facts.environment.get("LOCAL_WORLD_SIZE")
    devices = len(facts.devices.names) if facts.devices.kind == "cuda" else facts.question.ranks
    per_node = int(local) if local else devices
    preset = hardware_of(facts.devices.kind, per_node)
    flops, backward_flops, launch = rates(facts.speeds)
    found = replace(preset, name="measured", flops=flops, backward_flops=backward_flops, launch_overhead=launch)
    found = replace(found, full_precision=1.0)  # measured in the dtype that was asked for
    links, nodes = facts.links, math.ceil(facts.question.ranks / per_node)
    if not links.times:
        return found, f"links assumed as of the preset {preset.name}"
    if links.processes > per_node:  # the slowest link was one between nodes
        return replace(found, network_bandwidth=links.bandwidth, network_latency=links.latency), "links measured"
    found = replace(found, node_bandwidth=links.bandwidth, node_latency=links.latency)
    if nodes > 1:
        return found, f"links inside a node measured, between nodes assumed as of the preset {preset.name}"
    return found, "links measured"


def rates(speeds: tuple[Speed, ...]) -> tuple[float, float, float]:
    """FLOP/s forward and backward from the longest run, and from the shortest the seconds of a call beyond them."""
    short, long = speeds[0], speeds[-1]
    forward, backward = long.flops / long.forward, BACKWARD_FLOPS_RATIO * long.flops / long.backward
    return forward, backward, max(short.forward - short.flops / forward, 1e-6)


def _least(shape: Shape, hardware: Hardware, ranks: int) -> tuple[int, int]:
    bandwidth = hardware.network_bandwidth if ranks > hardware.ranks_per_node else hardware.node_bandwidth
    found = []
    for backward in (False, True):
        layer = LayerCost(shape, hardware, 1, backward)
        sent = layer.kv_bytes + layer.grad_bytes * backward
        found.append(math.ceil(sent / bandwidth / (layer.seconds_per_pair * _CAUSAL)))
    return found[0], found[1]


def _algorithms(
    question: Query, layers: tuple[AttentionGroup, ...], hardware: Hardware
) -> list[tuple[str, str, str, int]]:
    """Name, layout, transport and Ulysses ranks; the ring comes first."""
    found = [(name, question.layout, name, 1) for name in ("ring", "direct", "allgather")]
    ranks = question.ranks
    largest = min(auto_ulysses(one.num_heads, one.num_kv_heads, ranks, hardware.ranks_per_node) for one in layers)
    if largest == ranks:
        found.append(("ulysses", "contiguous", "ring", ranks))
    elif largest > 1 and ranks % largest == 0:
        found.append((f"hybrid, ulysses {largest}", question.layout, "ring", largest))
    return found


def _cost(
    layers: AttentionGroup, question: Query, hardware: Hardware, layout: str, transport: str, ulysses: int
) -> tuple[float, float, float, float]:
    length = padded_length(layout, question.sequence, question.ranks, ulysses)
    sequence = ShardedSequence(layout, length, question.ranks, None, None, None, ulysses)
    matrices = WorkMatrices.estimate(sequence, Mask(True, layers.window, layers.chunk))
    shape = _shape(layers, question.dtype)
    passes = [estimate_pass(matrices, shape, hardware, transport, 1, backward) for backward in (False, True)]
    return tuple(layers.count * n for n in (*(p.total for p in passes), *(p.exposed for p in passes)))  # type: ignore


def _shape(layers: AttentionGroup, dtype: str) -> Shape:
    return Shape(layers.num_heads, layers.num_kv_heads, layers.head_dim, layers.v_head_dim, BYTES[dtype])
