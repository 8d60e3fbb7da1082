"""The run to plan: a model, a length, devices and memory options. Settings that cannot run are refused."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass

from ..costmodel.devices import DEVICES, Device, Hardware
from ..costmodel.pass_cost import choose_transport
from ..geometry import (
    LAYOUTS,
    TRANSPORTS,
    Mask,
    ShardedSequence,
    auto_ulysses,
    check_inner_ring,
    length_multiple,
    max_head_chunks,
    padded_length,
)
from .model import Model
from .optimizers import DEFAULT_OPTIMIZER, OPTIMIZERS, PRECISIONS, OptimizerSpec, PrecisionSpec, check_optimizer

CHECKPOINTS = ("none", "full", "save-attention")
OFFLOADS = ("optimizer", "weights", "layers", "attention")


@dataclass(frozen=True)
class TrainingJob:
    """A training run.

    Attributes:
        length: tokens of the sequence, before padding to the layout's multiple.
        device: a key of `DEVICES`.
        per_node: devices of a node.
        cp: devices that share one sequence; the rest is data parallel. 0 for all of them.
        batch_size: sequences in a batch of each data-parallel group.
        zero: states that are sharded over all devices: 0 for none (DDP), 1 for optimizer states, 2 also gradients
            (DeepSpeed), 3 also weights (FSDP2, DeepSpeed). `engine_bytes` has the engine of each.
        dp_replicate: copies of the states, each sharded over its share of the devices: more than one is HSDP, which is
            FSDP2 (`zero=3`) on a mesh of two axes.
        optimizer: a key of `OPTIMIZERS`, which has the Trainer's names.
        precision: a key of `PRECISIONS`, or "auto" for that of the engine: DeepSpeed has fp32 master weights, all
            others fp32 weights. `zero=3` means DeepSpeed with "bf16-master", or if only the optimizer is offloaded.
        offload: names in `OFFLOADS`: tensors that are in host memory.
        checkpoint: tensors that a layer keeps for its backward: "none" for all, "full" for its input only,
            "save-attention" for its input and the attention output, so that attention is never recomputed.
        ffn_block, loss_block: tokens (of the whole batch) at a time in MLPs, and in the head with its loss; 0 for all.
        ulysses: ranks that exchange heads; 0 for automatic.
        inner: ranks of the inner ring of a double ring; 1 without.
        head_chunks: number of chunks in which a rank's heads are exchanged and attended with; 1 for all at once.
        kernel: the attention kernel whose published rate is used, "auto" for the fastest.
        fused: norms and MLP activations that keep only their inputs (Liger, torch.compile).
        fp8: linear layers in fp8.
        lora: rank of adapters on all projections, including those of experts, while the rest is frozen in bf16; 0 to
            train all parameters.
        node_bandwidth, network_bandwidth: bytes/s from a device to another, one way; 0 for those of the preset.

    Raises:
        ValueError: if a name is unknown, sizes do not divide each other, or no engine can run the settings.
    """

    model: Model
    length: int
    devices: int = 8
    device: str = "h100"
    per_node: int = 8
    cp: int = 0
    batch_size: int = 1
    zero: int = 0
    dp_replicate: int = 1
    optimizer: str = DEFAULT_OPTIMIZER
    precision: str = "auto"
    offload: tuple[str, ...] = ()
    checkpoint: str = "full"
    ffn_block: int = 0
    loss_block: int = 0
    layout: str = "zigzag"
    transport: str = "auto"
    ulysses: int = 1
    inner: int = 1
    head_chunks: int = 1
    kernel: str = "auto"
    fused: bool = False
    fp8: bool = False
    lora: int = 0
    node_bandwidth: float = 0.0
    network_bandwidth: float = 0.0

    def __post_init__(self) -> None:
        self._check_names()
        if min(self.devices, self.per_node, self.batch_size, self.length) < 1:
            sizes = f"{self.devices} devices, {self.per_node} per node, {self.batch_size} rows, {self.length} tokens"
            raise ValueError(f"There is nothing to plan with {sizes}: each must be at least 1.")
        if self.cp == 0:
            object.__setattr__(self, "cp", self.devices)
        if self.cp < 1 or self.devices % self.cp:
            raise ValueError(
                f"--cp {self.cp} does not divide --devices {self.devices}. Groups of equal size share a "
                "sequence: choose a divisor, or leave --cp out for one group of all devices."
            )
        if self.dp_replicate < 1 or self.dp % self.dp_replicate:
            raise ValueError(
                f"--dp-replicate {self.dp_replicate} does not divide the {self.dp} groups of --devices {self.devices} "
                f"with --cp {self.cp}. Every copy of the states belongs to whole groups: choose a divisor."
            )
        if self.ulysses == 0:
            model = self.model
            object.__setattr__(self, "ulysses", auto_ulysses(model.heads, model.kv_heads, self.cp, self.per_node))
        if self.ulysses < 1 or self.cp % self.ulysses:
            raise ValueError(f"--ulysses {self.ulysses} does not divide --cp {self.cp}. Choose a divisor, or auto.")
        if self.ulysses > self.model.heads:
            raise ValueError(
                f"--ulysses {self.ulysses}: {self.model.name} has {self.model.heads} query heads, and every rank "
                "needs one. Choose fewer; the ring uses the other ranks."
            )
        max_chunks = max_head_chunks(self.model.heads, self.model.kv_heads, self.ulysses)
        if not 1 <= self.head_chunks <= max_chunks:
            num_heads = max_chunks if self.ulysses > 1 else "no"
            raise ValueError(
                f"--head-chunks {self.head_chunks}: with --ulysses {self.ulysses}, the busiest rank exchanges "
                f"{num_heads} query heads of {self.model.name}. Choose at most {max_chunks}"
                + ("." if self.ulysses > 1 else ", or a --ulysses of at least 2.")
            )
        if self.inner != 1:
            check_inner_ring(self.inner, self.ring, f"--inner {self.inner}")
        if self.inner > 1 and self.transport not in ("auto", "double_ring"):
            raise ValueError(
                f"--inner {self.inner} means a double ring, but --transport is {self.transport}. Use double_ring or "
                "auto, or leave --inner out."
            )
        if self.transport == "double_ring" and self.inner == 1:
            raise ValueError(
                "--transport double_ring needs --inner, the ranks of an inner ring: as many as in a node."
            )
        if min(self.node_bandwidth, self.network_bandwidth) < 0:
            negative = min(self.node_bandwidth, self.network_bandwidth)
            raise ValueError(
                f"A bandwidth of {negative:g} bytes/s is not possible. Pass a positive one, or leave it out."
            )
        if self.lora < 0:
            raise ValueError(f"--lora {self.lora} is not a rank. Pass a positive one, or 0 to train all parameters.")
        self.device_spec.rates(self.kernel)

    def _check_names(self) -> None:
        choices: dict[str, Collection[str]] = {
            "device": DEVICES,
            "optimizer": OPTIMIZERS,
            "checkpoint": CHECKPOINTS,
            "layout": LAYOUTS,
            "precision": ("auto", *PRECISIONS),
            "transport": ("auto", *TRANSPORTS),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} {getattr(self, name)!r} is not known. Choose one of {', '.join(allowed)}.")
        unknown = [name for name in self.offload if name not in OFFLOADS]
        if unknown:
            raise ValueError(f"--offload {unknown[0]!r} is not known. Choose from {', '.join(OFFLOADS)}.")
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"--zero {self.zero} is not a stage of ZeRO. Choose 0, 1, 2 or 3 (3 is FSDP).")
        if "attention" in self.offload and self.checkpoint != "save-attention":
            raise ValueError(
                f"--offload attention moves saved attention outputs, but --checkpoint {self.checkpoint} saves none. "
                "Add --checkpoint save-attention."
            )
        if "layers" in self.offload and self.checkpoint == "none":
            raise ValueError("--offload layers moves the inputs of checkpointed layers. Add --checkpoint full.")
        self._check_engine()

    def _check_engine(self) -> None:
        """Raise if no engine shards or offloads weights, gradients and optimizer states as these settings ask."""
        offload = [name for name in ("optimizer", "weights") if name in self.offload]
        if offload and not self.zero:
            raise ValueError(
                f"--offload {','.join(offload)} with --zero 0: only DeepSpeed and FSDP2 offload states. Add "
                "--zero 3, or for the optimizer alone --zero 1 or 2."
            )
        if "weights" in offload and self.zero != 3:
            raise ValueError(f"--offload weights needs --zero 3, not {self.zero}: whole weights stay on the device.")
        if offload == ["weights"]:
            raise ValueError(
                "--offload weights needs the optimizer in host memory. Write --offload optimizer,weights."
            )
        if self.zero == 0 and self.precision == "bf16-master":
            raise ValueError("--precision bf16-master is DeepSpeed's, but --zero 0 is DDP. Add --zero 1, 2 or 3.")
        if self.zero in (1, 2) and not self.is_deepspeed:
            raise ValueError(
                f"--precision {self.precision} with --zero {self.zero}: DeepSpeed trains with fp32 master weights. "
                "Use --precision bf16-master, or FSDP2 (--zero 3)."
            )
        if self.zero == 3 and offload == ["optimizer"] and not self.is_deepspeed:
            raise ValueError(
                f"--offload optimizer with --precision {self.precision}: FSDP2 offloads the weights with the "
                "optimizer. Write --offload optimizer,weights, or use DeepSpeed with --precision bf16-master."
            )
        if self.dp_replicate > 1 and (self.zero != 3 or self.is_deepspeed):
            raise ValueError(
                f"--dp-replicate {self.dp_replicate} is HSDP, which FSDP2 alone does. Use --zero 3, without "
                "--precision bf16-master."
            )
        if self.zero:
            check_optimizer(self.optimizer, self.is_deepspeed, bool(offload))

    @property
    def device_spec(self) -> Device:
        """Memory and rates of the device."""
        return DEVICES[self.device]

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed holds the states, rather than FSDP2, DDP or one process."""
        if self.precision != "auto":
            return self.precision == "bf16-master"
        only_optimizer = "optimizer" in self.offload and "weights" not in self.offload
        return self.zero in (1, 2) or (self.zero == 3 and only_optimizer)

    @property
    def precision_spec(self) -> PrecisionSpec:
        name = "bf16-master" if self.is_deepspeed else "fp32"
        return PRECISIONS[name if self.precision == "auto" else self.precision]

    @property
    def optimizer_spec(self) -> OptimizerSpec:
        return OPTIMIZERS[self.optimizer]

    @property
    def hardware(self) -> Hardware:
        """Rates of the device and its links for the cost model."""
        links = {"node_bandwidth": self.node_bandwidth, "network_bandwidth": self.network_bandwidth}
        overrides = {name: value for name, value in links.items() if value}
        preset = self.device_spec.hardware(self.kernel, self.per_node)
        return dataclasses.replace(preset, **overrides)  # type: ignore[arg-type]

    @property
    def dp(self) -> int:
        """Data-parallel groups, each with a batch of its own."""
        return self.devices // self.cp

    @property
    def num_shards(self) -> int:
        """Devices over which sharded states are sharded."""
        return self.devices // self.dp_replicate

    @property
    def ring(self) -> int:
        """Ranks of the ring."""
        return self.cp // self.ulysses

    @property
    def length_multiple(self) -> int:
        """The layout needs lengths that are multiples of this."""
        return length_multiple(self.layout, self.cp, self.ulysses)

    @property
    def padded_length(self) -> int:
        """Tokens of the sequence, padding included."""
        return padded_length(self.layout, self.length, self.cp, self.ulysses)

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of a rank, over the whole batch: `c`."""
        return self.padded_length // self.cp * self.batch_size

    def make_sequence(self) -> ShardedSequence:
        """Return the padded sequence of a data-parallel group, sharded over its ranks."""
        return ShardedSequence(self.layout, self.padded_length, self.cp, ulysses=self.ulysses)

    def resolve_transport(self, window: int | None) -> tuple[str, int]:
        """Return transport and ranks of the inner ring for layers with this window, None for layers without.

        "auto" asks the cost model, as training does.
        """
        if self.ring == 1:
            return "ring", 1
        if self.transport != "auto":
            return self.transport, self.inner if self.transport == "double_ring" else 1
        mask, shape = Mask(window=window), self.model.shape(2, self.batch_size)
        name = choose_transport(self.make_sequence(), mask, shape, self.inner, self.hardware).transport
        return name, self.inner if name == "double_ring" else 1

    def replace(self, **changes: object) -> "TrainingJob":
        """Return the same job with some settings changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
