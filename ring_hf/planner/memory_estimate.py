"""Memory of one rank, item by item: what a training step holds at its worst moment.

Some of it is there all the time (states, layer inputs). The rest comes and goes: the worst of four moments counts, the
attention forward and backward of a layer, the MLP backward of a layer (a checkpointed layer has by then recomputed all
it keeps), and the loss. What a layer keeps is what autograd saves in Transformers' modules, tensor by tensor;
`tests/planner/test_memory.py` compares it with the tensors that are really saved.

Letters: c tokens of a rank, h hidden size, e = 2 bytes of bf16, L layers, N devices.
"""

from dataclasses import dataclass

from . import attention_buffers
from .attention_buffers import Widths
from .engine_bytes import DDP, engine_of
from .model import Model
from .training_job import Job

E = 2  # bytes of bf16
RUNTIME = 2.5e9  # bytes: CUDA context, cuBLAS workspaces and NCCL buffers; assumed
FRAGMENTATION = 0.05  # of what activations take at most, lost between blocks of the allocator; assumed


@dataclass(frozen=True)
class Item:
    """Something that takes memory. `moment` is "" for what is always there; `on_host` for what was offloaded."""

    name: str
    num_bytes: float
    moment: str = ""
    on_host: bool = False


@dataclass(frozen=True)
class Memory:
    """All items of a rank."""

    items: tuple[Item, ...]

    @property
    def always(self) -> float:
        return sum(item.num_bytes for item in self.items if not item.moment and not item.on_host)

    @property
    def moments(self) -> dict[str, float]:
        """Bytes of each moment, besides what is always there."""
        found: dict[str, float] = {}
        for item in self.items:
            if item.moment and not item.on_host:
                found[item.moment] = found.get(item.moment, 0.0) + item.num_bytes
        return found

    @property
    def worst(self) -> str:
        """The moment that decides."""
        return max(self.moments, key=self.moments.__getitem__)

    @property
    def allocated(self) -> float:
        """Peak of what tensors take: what `torch.cuda.max_memory_allocated` would say."""
        return self.always + self.moments[self.worst]

    @property
    def allowance(self) -> float:
        """Runtime and fragmentation."""
        states = sum(item.num_bytes for item in self.items if item.name in _STATES and not item.on_host)
        return RUNTIME + FRAGMENTATION * (self.allocated - states)

    @property
    def total(self) -> float:
        return self.allocated + self.allowance

    @property
    def host(self) -> float:
        """Bytes of host memory."""
        return sum(item.num_bytes for item in self.items if item.on_host)


_KEPT = "q, k, v with their norms, out, lse"
_STATES = ("weights", "gradients", "optimizer states", "frozen weights")


def memory_of(job: Job) -> Memory:
    """The memory of a job's rank."""
    items = [*_states(job), *_kept(job), *_attention(job), *_mlp(job), *_loss(job)]
    return Memory(tuple(item for item in items if item.num_bytes))


def trained_parameters(model: Model, lora: int) -> int:
    """Parameters with gradients: all, or two thin matrices beside each projection, as PEFT makes them.

    The experts of a layer are two of its `target_parameters`, gate with up and down: each expert has its own adapters.
    """
    if not lora:
        return model.parameters
    attention = 2 * model.hidden + model.q_width + model.kv_width + model.hidden + model.out_width + model.hidden
    experts = model.experts * (2 * model.hidden + 3 * model.expert_ff)
    shared = 3 * (model.hidden + model.shared_ff) if model.shared_ff else 0
    mlp = sum(experts + shared if sparse else 3 * (model.hidden + model.ff) for sparse in model.sparse)
    return lora * (model.layers * attention + mlp)


def optimizer_bytes(job: Job) -> float:
    """Bytes of what the optimizer keeps of all trained parameters, sharded or not, master weights included."""
    model, precision = job.model, job.precision_facts
    trained = trained_parameters(model, job.lora)
    whole = 0 if job.lora or job.is_deepspeed else model.vocab * model.hidden  # DeepSpeed hands over flat partitions
    sides = [model.hidden, model.kv_heads * model.head_dim, *(width for width in (model.ff, model.expert_ff) if width)]
    narrowest = job.lora or min(sides)
    states = job.optimizer_facts.bytes_in_all(precision, trained, whole, narrowest, model.hidden)
    return states + precision.master * trained


def _states(job: Job) -> list[Item]:
    model, shards, precision = job.model, job.devices, job.precision_facts
    trained = trained_parameters(model, job.lora)
    frozen = model.parameters if job.lora else 0
    whole = 1 if job.zero < 3 else shards
    gradients = precision.gradients * trained
    on_host = {name: name in job.offload for name in ("optimizer", "weights")}
    items = [
        Item("frozen weights", E * frozen / whole, on_host=on_host["weights"]),
        Item("weights", precision.weights * trained / whole, on_host=on_host["weights"]),
        Item("gradients", gradients / (1 if job.zero < 2 else shards), on_host=on_host["optimizer"]),
        Item("optimizer states", optimizer_bytes(job) / (1 if job.zero < 1 else shards), on_host=on_host["optimizer"]),
    ]
    if engine_of(job) is DDP:
        # Of the all-reduce: Accelerate leaves gradient_as_bucket_view False, so DDP keeps them beside the gradients.
        items.append(Item("gradient buckets (DDP)", gradients))
    if job.zero == 3 and shards > 1:
        # The layer at work and the one fetched ahead; embedding and head stay from forward to backward.
        items.append(Item("gathered weights", E * (2 * model.largest_layer + model.outside_parameters)))
        if not job.lora:
            head = model.vocab * model.hidden
            items.append(Item("gradients before sharding", E * (model.largest_layer + head)))
    elif "weights" in job.offload:
        items.append(Item("fetched weights", E * (2 * model.largest_layer + model.outside_parameters)))
    elif precision.weights > E and not job.lora:
        items.append(Item("weights in bf16 (autocast)", E * model.parameters))
    return items


def norm_bytes(job: Job) -> tuple[float, float]:
    """Bytes of a token that the norms before attention, and all other norms of a layer, keep with their results."""
    model, h = job.model, job.model.hidden
    if job.fused:  # input and output; the first input is the layer's own, which is counted apart
        return E * h, (model.norms - 1) * E * h + E * h
    each = 8 if model.wide_norm else 4 + E  # in fp32 before and after scaling, or a copy in fp32 and its bf16 result
    return (each + E) * h, (model.norms - 1) * each * h + E * h


def _kept_widths(job: Job) -> Widths:
    """Of the heads of all tokens of its place that a rank attends with; in chunks it keeps its own tokens instead."""
    return Widths.of(job.model, job.ulysses if job.head_chunks == 1 else 1)


def attention_bytes(job: Job) -> float:
    """Bytes of a token that a layer's attention keeps: q, k, v, out, lse, and norms of q and k."""
    model, widths = job.model, _kept_widths(job)
    kept = E * (widths.query + widths.keys + widths.out) + 4 * widths.heads
    if job.ulysses > 1 and job.head_chunks == 1:
        kept += E * model.out_width  # the output as tokens, after the exchange
    each = E if job.fused else 4 + E
    if model.qk_norm:
        kept += each * (model.q_width + model.kv_heads * model.head_dim)
    return kept + (each + E) * (model.q_rank + model.kv_rank)


def saved_bytes(job: Job) -> float:
    """Bytes of a token that a layer saves so that attention is not computed again: `memory.saving` keeps the results
    of attention, and of the exchanges of heads before and after it."""
    widths = _kept_widths(job)
    exchanged = 0.0
    if job.ulysses > 1 and job.head_chunks == 1:  # chunks are exchanged inside the one operator that is saved
        exchanged = E * (widths.query + widths.keys + widths.out) + 4 * widths.heads
    return E * widths.out + 4 * widths.heads + exchanged


def mlp_bytes(job: Job, layer: int) -> tuple[float, float]:
    """Bytes of a token that a layer's MLP keeps, and needs on top of that in backward."""
    model = job.model
    kept, more = (3, 1) if job.fused else (4, 2)  # gate, up, product, and the activation of gate unless fused
    if not model.sparse[layer]:
        return kept * E * model.ff, more * E * model.ff
    width = model.experts_per_token * model.expert_ff + model.shared_ff
    copies = 2 * model.experts_per_token * E * model.hidden  # tokens as the experts get and return them
    return kept * E * width + copies + 4 * model.experts, more * E * width + copies


def _widest(job: Job) -> int:
    return max(range(job.model.layers), key=lambda layer: sum(mlp_bytes(job, layer)))


def layer_bytes(job: Job, layer: int) -> float:
    """Bytes of a token that a whole layer keeps for backward, its input apart."""
    mlp = 0.0 if job.ffn_block else mlp_bytes(job, layer)[0]
    return sum(norm_bytes(job)) + attention_bytes(job) + mlp


def _kept(job: Job) -> list[Item]:
    c, model = job.tokens, job.model
    inputs = E * model.hidden * c
    if job.checkpoint == "none":
        layers = sum(layer_bytes(job, layer) for layer in range(model.layers)) * c
        # Unless fused, norms keep a copy of their input in fp32, and nobody the input itself.
        return [Item("layer inputs", model.layers * inputs * job.fused), Item("saved by all layers", layers)]
    items = [Item("layer inputs", model.layers * inputs, on_host="layers" in job.offload)]
    if "layers" in job.offload:
        items.append(Item("layer inputs on their way", 2 * inputs))
    if job.checkpoint == "save-attention":
        saved = saved_bytes(job) * c
        items.append(Item("saved attention", model.layers * saved, on_host="attention" in job.offload))
        if "attention" in job.offload:
            items.append(Item("saved attention on its way", 2 * saved))
    return items


def _attention(job: Job) -> list[Item]:
    c, model = job.tokens, job.model
    widths, one = _kept_widths(job), Widths.of(model, job.ulysses, job.head_chunks)
    saves_all = job.checkpoint == "none"
    first, _ = norm_bytes(job)
    kinds = {job.chosen(window)[0] for window in model.window_counts}
    kernel = next(iter(job.device_facts.kernels)) if job.kernel == "auto" else job.kernel
    workspace = attention_buffers.workspace_bytes(one, E, kernel)
    if job.head_chunks > 1:
        forward = max(attention_buffers.chunked_forward_bytes(widths, one, E, job.ring, kind) for kind in kinds)
        backward = max(
            attention_buffers.chunked_backward_bytes(widths, one, E, job.ring, kind, workspace) for kind in kinds
        )
        workspace = exchange = 0.0  # counted there
    else:
        forward = max(attention_buffers.forward_bytes(widths, E, job.ring, kind) for kind in kinds)
        backward = max(attention_buffers.backward_bytes(widths, E, job.ring, kind) for kind in kinds)
        exchange = attention_buffers.exchange_bytes(widths, E) if job.ulysses > 1 else 0.0
    qkv = E * (widths.query + widths.keys)
    already = 0.0 if saves_all else 1.0
    in_fp32, of_chunk = ("", "; one chunk of heads") if job.head_chunks > 1 else (" in fp32", "")
    idle = max(attention_buffers.idle_bytes(one, E, job.ring, kind, c) for kind in kinds)
    moment = "attention forward"
    items = [Item("idle exchange buffers", idle, moment) for moment in ("attention forward", "MLP backward", "loss")]
    if job.checkpoint == "save-attention":
        items = items[1:]
    else:
        items += [
            Item("norm before attention", already * first * c, moment),
            Item("q, k, v", already * qkv * c, moment),
            Item(f"output{in_fp32} and K/V blocks{of_chunk}", forward * c, moment),
            Item("exchange of heads, beyond that", max(0.0, exchange - forward) * c, moment),
        ]
    moment = "attention backward"
    return [
        *items,
        Item("norm before attention", already * first * c, moment),
        Item(_KEPT, already * attention_bytes(job) * c, moment),
        Item("gradients of out and residual", E * (widths.out + model.hidden) * c, moment),
        Item(f"fp32 dq, dK/dV and K/V blocks{of_chunk}", backward * c, moment),
        Item("kernel workspace", workspace * c, moment),
        Item("exchange of heads, beyond that", max(0.0, exchange - backward - workspace) * c, moment),
    ]


def _mlp(job: Job) -> list[Item]:
    c, model, layer = job.tokens, job.model, _widest(job)
    moment = "MLP backward"
    already = 0.0 if job.checkpoint == "none" else 1.0
    first, rest = norm_bytes(job)
    kept, more = mlp_bytes(job, layer)
    residual = 2 * E * model.hidden * c
    if job.ffn_block:
        block = min(job.ffn_block, c)
        mlp, gradients = (kept + more) * block, residual + E * model.hidden * c
    else:
        mlp, gradients = (already * kept + more) * c, residual
    return [
        Item("norms", already * (first + rest) * c, moment),
        Item(_KEPT, already * attention_bytes(job) * c, moment),
        Item("MLP intermediates", mlp, moment),
        Item("gradients of the residual", gradients, moment),
    ]


def _loss(job: Job) -> list[Item]:
    c, model = job.tokens, job.model
    at_once = min(job.loss_block, c) if job.loss_block else c
    # In fp32 log-probabilities, their gradient, and that of the logits. A caller that held the logits would add E.
    logits = (4 + 4 + 4) * model.vocab * at_once
    hidden = (E if job.fused else 4 + E) * model.hidden * c + E * model.hidden * c  # the last norm's, and its result
    items = [Item("logits and their gradients", logits, "loss"), Item("last hidden states", hidden, "loss")]
    if job.loss_block and not job.lora:
        items.append(Item("gradient of the head, summed in fp32", 4 * model.vocab * model.hidden, "loss"))
    return items
