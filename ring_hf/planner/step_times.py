"""How long a step takes: FLOPs at stated rates, and what no compute hides.

Model FLOPs are those of one forward and a backward of twice that, causal masks and windows counted exactly: what MFU
is measured with. Executed FLOPs are what a device runs: a layer's forward again if it was checkpointed, and an
attention backward of 2.5 times its forward (five products instead of two). Attention and its exchange come from the
cost model that chooses transports (`costmodel`); all else is linear in the tokens.

Letters: s sequence length, c tokens of a rank, P weights that a token meets, N devices.
"""

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any

from ..costmodel.devices import BACKWARD_FLOPS_RATIO, HOST_MEMORY_BANDWIDTH, Hardware, Shape
from ..costmodel.pass_cost import PassCost, WorkMatrices, estimate_chunked_pass
from ..geometry import Mask, ShardedSequence
from ..text import format_bytes
from .memory_estimate import E, layer_bytes, mlp_bytes, optimizer_bytes, saved_bytes, trained_parameters
from .model import Model
from .training_job import Job


@dataclass(frozen=True)
class Flops:
    """FLOPs of a step over all devices: one sequence of each data-parallel group, all rows."""

    linear: float
    attention: float
    linear_executed: float
    attention_executed: float

    @property
    def model(self) -> float:
        return 3 * (self.linear + self.attention)

    @property
    def executed(self) -> float:
        return self.linear_executed + self.attention_executed


def flops_of(job: Job) -> Flops:
    """`linear` and `attention` are one forward."""
    model, tokens = job.model, job.padded * job.rows * job.dp
    layers = model.multiplied - model.vocab * model.hidden
    linear = 2.0 * tokens * model.multiplied
    attention = float(model.pairs(job.padded) * job.rows * job.dp * model.flops_per_pair)
    again = 0 if job.checkpoint == "none" else layers
    if job.ffn_block and not again:  # a checkpointed layer recomputes up to its MLP, whose blocks then run again
        again = sum(model.mlp_matrices(n, active=True) for n in range(model.layers))
    backward = 1 if job.lora else 2  # frozen weights get no gradient
    linear_executed = linear * (1 + backward) + 2.0 * tokens * again
    attention_executed = attention * (1 + (job.checkpoint == "full") + BACKWARD_FLOPS_RATIO)
    return Flops(linear, attention, linear_executed, attention_executed)


def model_flops_per_token(model: Model, length: int) -> float:
    """Forward and backward, causal and exact."""
    return 3 * (2 * model.multiplied + model.pairs(length) * model.flops_per_pair / length)


@functools.lru_cache(maxsize=256)
def _matrices(sequence: ShardedSequence, window: int | None, rows: int) -> WorkMatrices:
    return WorkMatrices.estimate(sequence, Mask(window=window), rows)


@functools.lru_cache(maxsize=1024)
def _passes(
    sequence: ShardedSequence, window: int | None, rows: int, shape: Shape, hardware: Hardware, *how: Any
) -> tuple[PassCost, PassCost]:
    transport, inner, head_chunks = how
    settings = _matrices(sequence, window, rows), shape, hardware, transport, inner
    return estimate_chunked_pass(*settings, False, head_chunks), estimate_chunked_pass(*settings, True, head_chunks)


def attention_passes(job: Job, window: int | None) -> tuple[PassCost, PassCost]:
    """Forward and backward of one layer that sees so far."""
    transport, inner = job.chosen(window)
    facts = job.model.shape(E, job.rows), job.hardware
    return _passes(job.sequence(), window, job.rows, *facts, transport, inner, job.head_chunks)


def attention_seconds(job: Job) -> tuple[float, float, float]:
    """Over all layers, as often as they run: compute of the busiest rank, what waiting adds, bytes a rank sends."""
    forwards = 2 if job.checkpoint == "full" else 1
    compute = exposed = sent = 0.0
    for window, layers in job.model.window_counts.items():
        forward, backward = attention_passes(job, window)
        compute += layers * (forwards * forward.compute + backward.compute)
        exposed += layers * (forwards * forward.exposed + backward.exposed)
        sent += layers * (forwards * forward.mean_sent + backward.mean_sent)
    return compute, exposed, sent


@dataclass(frozen=True)
class Part:
    """Seconds of a step, and whether something else hides them (then only what is left over is counted)."""

    name: str
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Times:
    """A step, part by part."""

    parts: tuple[Part, ...]
    flops: Flops
    tokens: int
    devices: int
    peak: float
    sent: float

    @property
    def step(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def tokens_per_device(self) -> float:
        """Tokens a device and second."""
        return self.tokens / self.step / self.devices

    @property
    def mfu(self) -> float:
        return self.flops.model / self.step / self.devices / self.peak

    @property
    def hfu(self) -> float:
        return self.flops.executed / self.step / self.devices / self.peak


def times_of(job: Job) -> Times:
    """The parts of a step; a device works on one thing at a time, transfers run beside it."""
    flops, facts, model = flops_of(job), job.device_facts, job.model
    head = 2.0 * job.padded * job.rows * job.dp * model.vocab * model.hidden
    head *= 2.0 if job.lora else 3.0  # in blocks, too: gradients are computed where the logits are
    rate = facts.gemm_fp8 if job.fp8 else facts.gemm
    linear = ((flops.linear_executed - head) / rate + head / facts.gemm) / job.devices
    attention, waiting, sent = attention_seconds(job)
    elementwise = _traffic(job) / job.hardware.memory_bandwidth
    compute = linear + attention + elementwise
    weights, moved = _weights_exchange(job)
    host, each = _host(job), flops.attention_executed / job.devices / 1e12
    parts = [
        Part("linear layers", linear, f"{flops.linear_executed / job.devices / 1e12:,.0f} TFLOP"),
        Part("attention", attention, f"{each:,.0f} TFLOP on average, seconds of the busiest"),
        Part("norms, activations, rounding", elementwise, "memory traffic"),
        Part("exchange not hidden", waiting, "keys, values, gradients, heads"),
        Part("weights not hidden", max(0.0, weights - compute), f"{weights:.3g} s of gathering beside compute"),
        Part("offload not hidden", max(0.0, host - compute), f"{host:.3g} s of transfers beside compute"),
        Part("optimizer", *_optimizer(job)),
    ]
    tokens = job.padded * job.rows * job.dp
    return Times(tuple(parts), flops, tokens, job.devices, facts.peak, sent + moved)


def _traffic(job: Job) -> float:
    """Bytes that norms and activations move. Every byte a layer keeps was written and read once in each forward;
    backward reads it and a gradient, writes one. MLPs in blocks keep nothing, but move as much, and run again.
    """
    whole, layers = job.but(ffn_block=0), range(job.model.layers)
    again = job.checkpoint != "none"
    moved = sum(layer_bytes(whole, n) for n in layers) * (2 * (1 + again) + 3)
    if job.ffn_block and not again:
        moved += 2 * sum(mlp_bytes(job, n)[0] for n in layers)
    return moved * job.tokens


def _weights_exchange(job: Job) -> tuple[float, float]:
    """Seconds and bytes a rank sends for weights and their gradients.

    Sharded weights are gathered in bf16 forward and backward, their gradients reduced and scattered. Otherwise
    gradients are reduced in the dtype of the weights: all of them, or (ZeRO-1 and 2, which comes to the same) each
    rank's share, and updated weights gathered.
    """
    hardware, share = job.hardware, (job.devices - 1) / job.devices
    if job.devices == 1:
        return 0.0, 0.0
    trained = trained_parameters(job.model, job.lora)
    weight = job.precision_facts.weights
    sent = share * (E * (2 * job.model.parameters + trained) if job.zero == 3 else 2 * weight * trained)
    bandwidth = hardware.node_bandwidth
    if job.devices > job.per_node:
        bandwidth = min(bandwidth, hardware.network_bandwidth * job.per_node)
    return sent / bandwidth, sent


def _host(job: Job) -> float:
    """Seconds of transfers between device and host that run beside compute."""
    inputs = E * job.model.hidden * job.tokens * job.model.layers
    out = saved_bytes(job) * job.tokens * job.model.layers
    moved = 2.0 * (inputs * ("layers" in job.offload) + out * ("attention" in job.offload))
    if "weights" in job.offload:  # fetched forward and backward as they are stored; FSDP2 rounds them on the device
        stored = E if job.lora else job.precision_facts.weights
        moved += 2 * stored * job.model.parameters / job.devices
    return moved / job.device_facts.host_bandwidth


def _optimizer(job: Job) -> tuple[float, str]:
    """Seconds, and what they are. Every state is read and written once; on the host all ranks of a node share its
    memory, shards of gradients travel there and, unless they stay, rounded weights back.
    """
    precision, shards = job.precision_facts, job.devices if job.zero else 1
    trained = trained_parameters(job.model, job.lora) / shards
    traffic = 2 * (trained * (precision.weights + precision.gradients) + optimizer_bytes(job) / shards)
    if "optimizer" not in job.offload:
        return traffic / job.hardware.memory_bandwidth, ""
    traffic *= min(job.devices, job.per_node)
    travels = trained * (precision.gradients + E * ("weights" not in job.offload))
    note = f"{format_bytes(travels)} between device and host, then {format_bytes(traffic)} of host memory"
    return traffic / HOST_MEMORY_BANDWIDTH + travels / job.device_facts.host_bandwidth, note


def cost_ratio(model: Model, length: int, base: int = 4096) -> float:
    """Model FLOPs of a token at this length over those at `base`."""
    return model_flops_per_token(model, length) / model_flops_per_token(model, base)


def layer_kinds(job: Job) -> Counter[tuple[str, int]]:
    """How many layers use which transport and inner ring."""
    found: Counter[tuple[str, int]] = Counter()
    for window, layers in job.model.window_counts.items():
        found[job.chosen(window)] += layers
    return found
