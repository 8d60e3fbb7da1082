"""Time of a training step: FLOPs at published rates, and the communication and transfers that no compute hides.

Model FLOPs are those of one forward and a backward of twice that, with causal masks and windows counted exactly; MFU
is measured with them. Executed FLOPs are those that a device runs: the forward of a checkpointed layer again, and an
attention backward of 2.5 times its forward (five products instead of two). Attention and its communication come from
the cost model that chooses transports (`costmodel.pass_cost`); all else is linear in the tokens.

Letters: s sequence length, c tokens of a rank, P weights that a token is multiplied with, N devices.
"""

import functools
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from ..costmodel.devices import BACKWARD_FLOPS_RATIO, HOST_MEMORY_BANDWIDTH, Hardware, Shape
from ..costmodel.pass_cost import PassCost, WorkMatrices, estimate_chunked_pass
from ..geometry import Mask, ShardedSequence
from ..text import format_bytes
from .memory_estimate import BF16, layer_bytes, mlp_bytes, optimizer_bytes, saved_bytes, trained_parameters
from .model import Model
from .training_job import TrainingJob


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of a step over all devices.

    Attributes:
        linear, attention: FLOPs of one forward.
        linear_executed, attention_executed: FLOPs that the devices run in a step.
    """

    linear: float
    attention: float
    linear_executed: float
    attention_executed: float

    @property
    def model(self) -> float:
        """FLOPs of a forward and a backward without recomputation."""
        return 3 * (self.linear + self.attention)

    @property
    def executed(self) -> float:
        return self.linear_executed + self.attention_executed


def count_flops(job: TrainingJob) -> StepFlops:
    """Count the FLOPs of a step of a job."""
    model, num_sequences = job.model, job.batch_size * job.dp
    tokens = job.padded_length * num_sequences
    linear = 2.0 * tokens * model.matmul_parameters
    attention = float(model.count_pairs(job.padded_length) * num_sequences * model.flops_per_pair)
    if job.checkpoint != "none":
        recomputed = model.matmul_parameters - model.vocab * model.hidden
    elif job.ffn_block:  # a checkpointed layer recomputes up to its MLP, whose blocks then run again
        recomputed = sum(model.mlp_matrices(layer, active=True) for layer in range(model.layers))
    else:
        recomputed = 0
    backward = 1 if job.lora else 2  # frozen weights have no gradient
    linear_executed = linear * (1 + backward) + 2.0 * tokens * recomputed
    attention_forwards = 2 if job.checkpoint == "full" else 1
    return StepFlops(linear, attention, linear_executed, attention * (attention_forwards + BACKWARD_FLOPS_RATIO))


def model_flops_per_token(model: Model, length: int) -> float:
    """Return the FLOPs per token of a forward and a backward without recomputation, at this sequence length."""
    return 3 * (2 * model.matmul_parameters + model.count_pairs(length) * model.flops_per_pair / length)


def cost_ratio(model: Model, length: int, base: int = 4096) -> float:
    """Return the model FLOPs of a token at this length over those at `base`."""
    return model_flops_per_token(model, length) / model_flops_per_token(model, base)


@functools.lru_cache(maxsize=256)
def _work_matrices(sequence: ShardedSequence, window: int | None, batch_size: int) -> WorkMatrices:
    return WorkMatrices.estimate(sequence, Mask(window=window), batch_size)


@functools.lru_cache(maxsize=1024)
def _pass_costs(
    sequence: ShardedSequence,
    window: int | None,
    shape: Shape,
    hardware: Hardware,
    transport: str,
    inner: int,
    head_chunks: int,
) -> tuple[PassCost, PassCost]:
    matrices = _work_matrices(sequence, window, shape.num_rows)
    forward = estimate_chunked_pass(matrices, shape, hardware, transport, inner, False, head_chunks)
    backward = estimate_chunked_pass(matrices, shape, hardware, transport, inner, True, head_chunks)
    return forward, backward


def estimate_passes(job: TrainingJob, window: int | None) -> tuple[PassCost, PassCost]:
    """Return the costs of the forward and the backward of one attention layer with this window, None without one."""
    transport, inner = job.resolve_transport(window)
    shape = job.model.shape(BF16, job.batch_size)
    return _pass_costs(job.make_sequence(), window, shape, job.hardware, transport, inner, job.head_chunks)


class AttentionTime(NamedTuple):
    """Attention of a step over all layers, recomputed forwards included.

    Attributes:
        compute: seconds that the busiest rank computes.
        exposed: seconds of communication that compute does not hide.
        bytes_sent: bytes that a rank sends, on average.
    """

    compute: float
    exposed: float
    bytes_sent: float


def estimate_attention(job: TrainingJob) -> AttentionTime:
    """Estimate the attention of a step of a job."""
    num_forwards = 2 if job.checkpoint == "full" else 1
    compute = exposed = bytes_sent = 0.0
    for window, num_layers in job.model.window_counts.items():
        forward, backward = estimate_passes(job, window)
        compute += num_layers * (num_forwards * forward.compute + backward.compute)
        exposed += num_layers * (num_forwards * forward.exposed + backward.exposed)
        bytes_sent += num_layers * (num_forwards * forward.mean_sent + backward.mean_sent)
    return AttentionTime(compute, exposed, bytes_sent)


def count_transports(job: TrainingJob) -> Counter[tuple[str, int]]:
    """Count the layers by their transport and ranks of the inner ring."""
    counts: Counter[tuple[str, int]] = Counter()
    for window, num_layers in job.model.window_counts.items():
        counts[job.resolve_transport(window)] += num_layers
    return counts


@dataclass(frozen=True)
class StepPart:
    """Seconds of one part of a step; of transfers that compute hides, only those that remain."""

    name: str
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class StepTimes:
    """A training step, part by part.

    Attributes:
        tokens: tokens of a step over all devices.
        peak: peak FLOP/s of a device in bf16.
        bytes_sent: bytes that a rank sends in a step.
    """

    parts: tuple[StepPart, ...]
    flops: StepFlops
    tokens: int
    devices: int
    peak: float
    bytes_sent: float

    @property
    def step(self) -> float:
        """Seconds of the whole step."""
        return sum(part.seconds for part in self.parts)

    @property
    def tokens_per_device(self) -> float:
        """Tokens per second and device."""
        return self.tokens / self.step / self.devices

    @property
    def mfu(self) -> float:
        return self.flops.model / self.step / self.devices / self.peak

    @property
    def hfu(self) -> float:
        return self.flops.executed / self.step / self.devices / self.peak


def estimate_times(job: TrainingJob) -> StepTimes:
    """Estimate a step of a job. Compute of a device is sequential; transfers run beside it."""
    flops, device, model = count_flops(job), job.device_spec, job.model
    tokens = job.padded_length * job.batch_size * job.dp
    head = 2.0 * tokens * model.vocab * model.hidden
    head *= 2.0 if job.lora else 3.0  # also in blocks, whose gradients are computed together with their logits
    rate = device.gemm_fp8 if job.fp8 else device.gemm
    linear = ((flops.linear_executed - head) / rate + head / device.gemm) / job.devices
    attention = estimate_attention(job)
    elementwise = _memory_traffic(job) / job.hardware.memory_bandwidth
    compute = linear + attention.compute + elementwise
    weight_seconds, weight_bytes = _weight_communication(job)
    offload_seconds = _offload_seconds(job)
    linear_tflop = flops.linear_executed / job.devices / 1e12
    attention_tflop = flops.attention_executed / job.devices / 1e12
    parts = (
        StepPart("linear layers", linear, f"{linear_tflop:,.0f} TFLOP"),
        StepPart("attention", attention.compute, f"{attention_tflop:,.0f} TFLOP on average, time of the busiest rank"),
        StepPart("norms, activations, rounding", elementwise, "memory traffic"),
        StepPart("exposed attention communication", attention.exposed, "keys, values, gradients, heads"),
        StepPart(
            "exposed weight communication",
            max(0.0, weight_seconds - compute),
            f"{weight_seconds:.3g} s of communication beside compute",
        ),
        StepPart(
            "exposed offload copies",
            max(0.0, offload_seconds - compute),
            f"{offload_seconds:.3g} s of copies beside compute",
        ),
        _optimizer_part(job),
    )
    return StepTimes(
        parts=parts,
        flops=flops,
        tokens=tokens,
        devices=job.devices,
        peak=device.peak,
        bytes_sent=attention.bytes_sent + weight_bytes,
    )


def _memory_traffic(job: TrainingJob) -> float:
    """Return the bytes that norms and activations of a rank read and write.

    Every byte that a layer keeps is written and read once in each forward; the backward reads it and a gradient, and
    writes one. MLPs in blocks keep nothing, but move as much, and run again.
    """
    unblocked, layers = job.replace(ffn_block=0), range(job.model.layers)
    num_forwards = 1 if job.checkpoint == "none" else 2
    moved = sum(layer_bytes(unblocked, layer) for layer in layers) * (2 * num_forwards + 3)
    if job.ffn_block and job.checkpoint == "none":
        moved += 2 * sum(mlp_bytes(job, layer)[0] for layer in layers)
    return moved * job.tokens_per_rank


def _weight_communication(job: TrainingJob) -> tuple[float, float]:
    """Return the seconds and bytes that a rank sends for weights and their gradients.

    Sharded weights are gathered in bf16 in forward and backward, and their gradients are reduce-scattered. Otherwise
    gradients are all-reduced in the dtype of the weights, or (ZeRO-1 and 2, with the same number of bytes)
    reduce-scattered, and the updated weights gathered. With HSDP, shards of gradients are then all-reduced over the
    copies of the states.
    """
    if job.devices == 1:
        return 0.0, 0.0
    share = (job.num_shards - 1) / job.num_shards
    trained = trained_parameters(job.model, job.lora)
    if job.zero == 3:
        sent = share * (BF16 * (2 * job.model.parameters + trained))
    else:
        sent = share * (2 * job.precision_spec.weights * trained)
    reduced = 2 * (job.dp_replicate - 1) / job.dp_replicate * BF16 * trained / job.num_shards
    seconds = sent / _bandwidth_of(job, job.num_shards) + reduced / _bandwidth_of(job, job.devices)
    return seconds, sent + reduced


def _bandwidth_of(job: TrainingJob, num_ranks: int) -> float:
    """Return the bytes/s of a collective over neighbouring ranks, one way."""
    hardware = job.hardware
    if num_ranks <= job.per_node:
        return hardware.node_bandwidth
    return min(hardware.node_bandwidth, hardware.network_bandwidth * job.per_node)


def _offload_seconds(job: TrainingJob) -> float:
    """Return the seconds of copies between device and host that run beside compute."""
    num_tokens = job.tokens_per_rank * job.model.layers
    moved = 0.0
    if "layers" in job.offload:
        moved += 2.0 * BF16 * job.model.hidden * num_tokens
    if "attention" in job.offload:
        moved += 2.0 * saved_bytes(job) * num_tokens
    if "weights" in job.offload:  # copied in forward and backward in their own dtype; FSDP2 rounds them on the device
        element = BF16 if job.lora else job.precision_spec.weights
        moved += 2 * element * job.model.parameters / job.num_shards
    return moved / job.device_spec.host_bandwidth


def _optimizer_part(job: TrainingJob) -> StepPart:
    """Return the time of the optimizer, which reads and writes every state once.

    On the host, all ranks of a node share its memory bandwidth. Shards of gradients are copied there and, unless the
    weights stay there, rounded weights back.
    """
    precision, num_shards = job.precision_spec, job.num_shards if job.zero else 1
    trained = trained_parameters(job.model, job.lora) / num_shards
    traffic = 2 * (trained * (precision.weights + precision.gradients) + optimizer_bytes(job) / num_shards)
    if "optimizer" not in job.offload:
        return StepPart("optimizer", traffic / job.hardware.memory_bandwidth)
    traffic *= min(job.devices, job.per_node)
    copied = trained * (precision.gradients + (0 if "weights" in job.offload else BF16))
    seconds = traffic / HOST_MEMORY_BANDWIDTH + copied / job.device_spec.host_bandwidth
    note = f"{format_bytes(copied)} between device and host, then {format_bytes(traffic)} of host memory"
    return StepPart("optimizer", seconds, note)
