"""Memory of one rank, item by item, in the phase of a training step that needs most.

Some items are always in memory (states, layer inputs). Others belong to one of four phases, of which only the largest
counts: the attention forward and backward of a layer, the MLP backward of a layer (in a checkpointed layer, everything
it keeps has been recomputed by then), and the loss. A layer keeps the tensors that autograd saves in Transformers'
modules; `tests/planner/test_memory.py` compares the bytes with the tensors that are saved in a real run.

Letters: c tokens of a rank, h hidden size, L layers, N devices.
"""

from dataclasses import dataclass

from . import attention_buffers
from .attention_buffers import AttentionWidths
from .engine_bytes import DDP, select_engine
from .model import Model
from .training_job import TrainingJob

BF16, FP32 = 2, 4  # bytes of an element
RUNTIME = 2.5e9  # bytes: CUDA context, cuBLAS workspaces and NCCL buffers; assumed
FRAGMENTATION = 0.05  # share of the peak of activations, lost between blocks of the allocator; assumed


@dataclass(frozen=True)
class MemoryItem:
    """Bytes of one kind of tensors.

    Attributes:
        phase: the only phase in which they are in memory, "" for all.
        on_host: whether they are in host memory.
    """

    name: str
    num_bytes: float
    phase: str = ""
    on_host: bool = False


@dataclass(frozen=True)
class MemoryEstimate:
    """All items of a rank, in bytes."""

    items: tuple[MemoryItem, ...]

    @property
    def persistent(self) -> float:
        """Bytes on the device in all phases."""
        return sum(item.num_bytes for item in self.items if not item.phase and not item.on_host)

    @property
    def phases(self) -> dict[str, float]:
        """Bytes of each phase, besides the persistent ones."""
        phases: dict[str, float] = {}
        for item in self.items:
            if item.phase and not item.on_host:
                phases[item.phase] = phases.get(item.phase, 0.0) + item.num_bytes
        return phases

    @property
    def peak_phase(self) -> str:
        """The phase with most bytes."""
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def allocated(self) -> float:
        """Peak bytes of tensors, as `torch.cuda.max_memory_allocated` reports them."""
        return self.persistent + self.phases[self.peak_phase]

    @property
    def overhead(self) -> float:
        """Bytes of the runtime and of fragmentation, of which states have none."""
        states = sum(item.num_bytes for item in self.items if item.name in _STATES and not item.on_host)
        return RUNTIME + FRAGMENTATION * (self.allocated - states)

    @property
    def total(self) -> float:
        return self.allocated + self.overhead

    @property
    def host(self) -> float:
        """Bytes in host memory."""
        return sum(item.num_bytes for item in self.items if item.on_host)


_ATTENTION_TENSORS = "q, k, v with their norms, out, lse"
_STATES = ("weights", "gradients", "optimizer states", "frozen weights")


def estimate_memory(job: TrainingJob) -> MemoryEstimate:
    """Estimate the memory of one rank of a job."""
    items = [*_state_items(job), *_layer_items(job), *_attention_items(job), *_mlp_items(job), *_loss_items(job)]
    return MemoryEstimate(tuple(item for item in items if item.num_bytes))


def trained_parameters(model: Model, lora: int) -> int:
    """Return the number of parameters with gradients: all, or two thin matrices per projection, as PEFT creates them.

    The experts of a layer are two of its `target_parameters`, gate with up and down: each expert has its own adapters.

    Args:
        lora: rank of the adapters, 0 to train all parameters.
    """
    if not lora:
        return model.parameters
    attention = 2 * model.hidden + model.q_width + model.kv_width + model.hidden + model.out_width + model.hidden
    experts = model.experts * (2 * model.hidden + 3 * model.expert_ff)
    shared = 3 * (model.hidden + model.shared_ff) if model.shared_ff else 0
    mlp = sum(experts + shared if sparse else 3 * (model.hidden + model.ff) for sparse in model.sparse)
    return lora * (model.layers * attention + mlp)


def optimizer_bytes(job: TrainingJob) -> float:
    """Return the bytes of the optimizer states of all trained parameters over all ranks, master weights included."""
    model, precision = job.model, job.precision_spec
    trained = trained_parameters(model, job.lora)
    # DeepSpeed passes flat partitions to the optimizer, which sees no embedding there.
    embeddings = 0 if job.lora or job.is_deepspeed else model.vocab * model.hidden
    sides = [model.hidden, model.kv_heads * model.head_dim, *(width for width in (model.ff, model.expert_ff) if width)]
    shortest_side = job.lora or min(sides)
    states = job.optimizer_spec.total_bytes(precision, trained, embeddings, shortest_side, model.hidden)
    return states + precision.master * trained


def _state_items(job: TrainingJob) -> list[MemoryItem]:
    model, precision, num_shards = job.model, job.precision_spec, job.num_shards
    trained = trained_parameters(model, job.lora)
    frozen = model.parameters if job.lora else 0
    gradients = precision.gradients * trained
    weight_shards = num_shards if job.zero == 3 else 1
    gradient_shards = num_shards if job.zero >= 2 else 1
    optimizer_shards = num_shards if job.zero >= 1 else 1
    has_host_weights, has_host_optimizer = "weights" in job.offload, "optimizer" in job.offload
    items = [
        MemoryItem("frozen weights", BF16 * frozen / weight_shards, on_host=has_host_weights),
        MemoryItem("weights", precision.weights * trained / weight_shards, on_host=has_host_weights),
        MemoryItem("gradients", gradients / gradient_shards, on_host=has_host_optimizer),
        MemoryItem("optimizer states", optimizer_bytes(job) / optimizer_shards, on_host=has_host_optimizer),
    ]
    # The current and the prefetched layer; embedding and head stay from forward to backward.
    whole_weights = BF16 * (2 * model.largest_layer_parameters + model.non_layer_parameters)
    if select_engine(job) is DDP:
        # Accelerate leaves gradient_as_bucket_view False, so DDP keeps its buckets besides the gradients.
        items.append(MemoryItem("gradient buckets (DDP)", gradients))
    if job.zero == 3 and num_shards > 1:
        items.append(MemoryItem("gathered weights", whole_weights))
        if not job.lora:
            head = model.vocab * model.hidden
            items.append(MemoryItem("unsharded gradients", BF16 * (model.largest_layer_parameters + head)))
    elif has_host_weights:
        items.append(MemoryItem("fetched weights", whole_weights))
    elif precision.weights > BF16 and not job.lora:
        items.append(MemoryItem("weights in bf16 (autocast)", BF16 * model.parameters))
    return items


def norm_bytes(job: TrainingJob) -> tuple[float, float]:
    """Return the bytes per token that the norm before attention, and all other norms of a layer, keep with results."""
    model, h = job.model, job.model.hidden
    if job.fused:  # input and output; the input of the first norm is the layer's own, which is a separate item
        return BF16 * h, (model.norms - 1) * BF16 * h + BF16 * h
    # fp32 before and after scaling, or a copy in fp32 and its result in bf16
    kept_per_norm = 2 * FP32 if model.wide_norm else FP32 + BF16
    return (kept_per_norm + BF16) * h, (model.norms - 1) * kept_per_norm * h + BF16 * h


def _kept_widths(job: TrainingJob) -> AttentionWidths:
    """Return the widths of the tensors that attention keeps: after the exchange of heads, or before it in chunks."""
    return AttentionWidths.from_model(job.model, job.ulysses if job.head_chunks == 1 else 1)


def attention_bytes(job: TrainingJob) -> float:
    """Return the bytes per token that the attention of a layer keeps: q, k, v, out, lse, and norms of q and k."""
    model, widths = job.model, _kept_widths(job)
    num_bytes = BF16 * (widths.query + widths.kv + widths.out) + FP32 * widths.heads
    if job.ulysses > 1 and job.head_chunks == 1:
        num_bytes += BF16 * model.out_width  # the output as tokens, after the exchange
    kept_per_norm = BF16 if job.fused else FP32 + BF16
    if model.qk_norm:
        num_bytes += kept_per_norm * (model.q_width + model.kv_heads * model.head_dim)
    return num_bytes + (kept_per_norm + BF16) * (model.q_rank + model.kv_rank)


def saved_bytes(job: TrainingJob) -> float:
    """Return the bytes per token that a layer saves so that attention is not recomputed.

    `memory.selective_checkpoint` saves the results of attention, and of the exchanges of heads before and after it.
    """
    widths = _kept_widths(job)
    exchanged = 0.0
    if job.ulysses > 1 and job.head_chunks == 1:  # chunks are exchanged inside the one operator that is saved
        exchanged = BF16 * (widths.query + widths.kv + widths.out) + FP32 * widths.heads
    return BF16 * widths.out + FP32 * widths.heads + exchanged


def mlp_bytes(job: TrainingJob, layer: int) -> tuple[float, float]:
    """Return the bytes per token that the MLP of a layer keeps, and those that its backward needs on top."""
    model = job.model
    num_kept, num_extra = (3, 1) if job.fused else (4, 2)  # gate, up, product, and the activation of gate unless fused
    if not model.sparse[layer]:
        return num_kept * BF16 * model.ff, num_extra * BF16 * model.ff
    width = model.experts_per_token * model.expert_ff + model.shared_ff
    copies = 2 * model.experts_per_token * BF16 * model.hidden  # tokens as the experts get and return them
    return num_kept * BF16 * width + copies + FP32 * model.experts, num_extra * BF16 * width + copies


def _widest_mlp(job: TrainingJob) -> int:
    return max(range(job.model.layers), key=lambda layer: sum(mlp_bytes(job, layer)))


def layer_bytes(job: TrainingJob, layer: int) -> float:
    """Return the bytes per token that a whole layer keeps for its backward, besides its input."""
    mlp = 0.0 if job.ffn_block else mlp_bytes(job, layer)[0]
    return sum(norm_bytes(job)) + attention_bytes(job) + mlp


def _layer_items(job: TrainingJob) -> list[MemoryItem]:
    c, model = job.tokens_per_rank, job.model
    inputs = BF16 * model.hidden * c
    if job.checkpoint == "none":
        saved = sum(layer_bytes(job, layer) for layer in range(model.layers)) * c
        # Unless fused, norms keep a copy of their input in fp32, and nothing keeps the input itself.
        layer_inputs = model.layers * inputs if job.fused else 0.0
        return [MemoryItem("layer inputs", layer_inputs), MemoryItem("saved by all layers", saved)]
    items = [MemoryItem("layer inputs", model.layers * inputs, on_host="layers" in job.offload)]
    if "layers" in job.offload:
        items.append(MemoryItem("layer inputs in flight", 2 * inputs))
    if job.checkpoint == "save-attention":
        saved = saved_bytes(job) * c
        items.append(MemoryItem("saved attention", model.layers * saved, on_host="attention" in job.offload))
        if "attention" in job.offload:
            items.append(MemoryItem("saved attention in flight", 2 * saved))
    return items


def _attention_items(job: TrainingJob) -> list[MemoryItem]:
    c, model = job.tokens_per_rank, job.model
    widths, chunk = _kept_widths(job), AttentionWidths.from_model(model, job.ulysses, job.head_chunks)
    transports = {job.resolve_transport(window)[0] for window in model.window_counts}
    kernel = next(iter(job.device_spec.kernels)) if job.kernel == "auto" else job.kernel
    workspace = attention_buffers.workspace_bytes(chunk, BF16, kernel)
    if job.head_chunks > 1:
        forward = max(
            attention_buffers.chunked_forward_bytes(widths, chunk, BF16, job.ring, name) for name in transports
        )
        backward = max(
            attention_buffers.chunked_backward_bytes(widths, chunk, BF16, job.ring, name, workspace)
            for name in transports
        )
        workspace = exchange = 0.0  # both are part of the chunked passes
        output, suffix = "output", "; one chunk of heads"
    else:
        forward = max(attention_buffers.forward_bytes(widths, BF16, job.ring, name) for name in transports)
        backward = max(attention_buffers.backward_bytes(widths, BF16, job.ring, name) for name in transports)
        exchange = attention_buffers.exchange_bytes(widths, BF16) if job.ulysses > 1 else 0.0
        output, suffix = "output in fp32", ""
    # Bytes per token that are recomputed in these phases, unless the layers keep everything ("saved by all layers").
    norm = qkv = attention = 0.0
    if job.checkpoint != "none":
        norm, _ = norm_bytes(job)
        qkv = BF16 * (widths.query + widths.kv)
        attention = attention_bytes(job)
    idle = max(attention_buffers.idle_bytes(chunk, BF16, job.ring, name, c) for name in transports)
    items = [MemoryItem("idle exchange buffers", idle, phase) for phase in ("MLP backward", "loss")]
    if job.checkpoint != "save-attention":
        phase = "attention forward"
        items.insert(0, MemoryItem("idle exchange buffers", idle, phase))
        items += [
            MemoryItem("norm before attention", norm * c, phase),
            MemoryItem("q, k, v", qkv * c, phase),
            MemoryItem(f"{output} and K/V blocks{suffix}", forward * c, phase),
            MemoryItem("exchange of heads, beyond that", max(0.0, exchange - forward) * c, phase),
        ]
    phase = "attention backward"
    return [
        *items,
        MemoryItem("norm before attention", norm * c, phase),
        MemoryItem(_ATTENTION_TENSORS, attention * c, phase),
        MemoryItem("gradients of out and residual", BF16 * (widths.out + model.hidden) * c, phase),
        MemoryItem(f"fp32 dq, dK/dV and K/V blocks{suffix}", backward * c, phase),
        MemoryItem("kernel workspace", workspace * c, phase),
        MemoryItem("exchange of heads, beyond that", max(0.0, exchange - backward - workspace) * c, phase),
    ]


def _mlp_items(job: TrainingJob) -> list[MemoryItem]:
    c, model = job.tokens_per_rank, job.model
    kept_bytes, extra_bytes = mlp_bytes(job, _widest_mlp(job))
    norms = attention = 0.0  # bytes per token that were recomputed by then
    if job.checkpoint != "none":
        norms, attention = sum(norm_bytes(job)), attention_bytes(job)
    gradients = 2 * BF16 * model.hidden * c
    if job.ffn_block:
        mlp = (kept_bytes + extra_bytes) * min(job.ffn_block, c)
        gradients += BF16 * model.hidden * c
    else:
        mlp = (extra_bytes if job.checkpoint == "none" else kept_bytes + extra_bytes) * c
    phase = "MLP backward"
    return [
        MemoryItem("norms", norms * c, phase),
        MemoryItem(_ATTENTION_TENSORS, attention * c, phase),
        MemoryItem("MLP intermediates", mlp, phase),
        MemoryItem("gradients of the residual", gradients, phase),
    ]


def _loss_items(job: TrainingJob) -> list[MemoryItem]:
    c, model = job.tokens_per_rank, job.model
    block = min(job.loss_block, c) if job.loss_block else c
    # In fp32: log-probabilities, their gradient, and that of the logits. A caller that held the logits would add BF16.
    logits = 3 * FP32 * model.vocab * block
    # Tensors that the last norm keeps, and its result.
    hidden = (BF16 if job.fused else FP32 + BF16) * model.hidden * c + BF16 * model.hidden * c
    items = [
        MemoryItem("logits and their gradients", logits, "loss"),
        MemoryItem("last hidden states", hidden, "loss"),
    ]
    if job.loss_block and not job.lora:
        items.append(MemoryItem("gradient of the head, summed in fp32", FP32 * model.vocab * model.hidden, "loss"))
    return items
