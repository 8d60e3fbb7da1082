"""What is to be planned: a model, a length, devices, and the levers. Refuses what cannot be."""

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
    length_multiple,
    max_head_chunks,
    padded_length,
)
from .model import Model
from .optimizers import DEFAULT, OPTIMIZERS, PRECISIONS, Optimizer, Precision, check_optimizer

CHECKPOINTS = ("none", "full", "save-attention")
OFFLOADS = ("optimizer", "weights", "layers", "attention")


@dataclass(frozen=True)
class Job:
    """A training run.

    Attributes:
        length: tokens of the sequence, before padding to the layout's multiple.
        cp: devices that share one sequence; the rest is data parallel. 0: all of them.
        zero: what is sharded over all devices: 0 nothing (DDP), 1 optimizer, 2 gradients too (DeepSpeed), 3 weights
            too (FSDP2, DeepSpeed). `engine` names the engine of each.
        optimizer: of `OPTIMIZERS`, which has the Trainer's names.
        precision: of `PRECISIONS`, or "auto" for the engine's: DeepSpeed's has fp32 master weights, all others fp32
            weights. With `zero` 3, DeepSpeed is taken for "bf16-master", or if the optimizer alone is offloaded.
        offload: what lives in host memory, of `OFFLOADS`.
        checkpoint: what a layer keeps for backward: "none" everything, "full" its input alone, "save-attention" its
            input and the attention output, so that attention is never computed again.
        ffn_block, loss_block: tokens at a time, of all rows, in MLPs and in the head with its loss; 0: all at once.
        ulysses: ranks that exchange heads; 0 for automatic.
        head_chunks: in how many chunks a rank's heads are exchanged and attended with; 1: all at once.
        inner: ranks of a double ring's inner ring; 1 without.
        fused: norms and MLP activations that keep only their inputs (Liger, torch.compile).
        fp8: linear layers in fp8.
        node_bandwidth, network_bandwidth: bytes/s of a device to another, one way; 0 for the preset's.
        lora: rank of adapters on all projections, of experts too; the rest is frozen, in bf16. 0: all are trained.
    """

    model: Model
    length: int
    devices: int = 8
    device: str = "h100"
    per_node: int = 8
    cp: int = 0
    rows: int = 1
    zero: int = 0
    optimizer: str = DEFAULT
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
        if min(self.devices, self.per_node, self.rows, self.length) < 1:
            sizes = f"{self.devices} devices, {self.per_node} per node, {self.rows} rows, {self.length} tokens"
            raise ValueError(f"There is nothing to plan with {sizes}: each must be at least 1.")
        if self.cp == 0:
            object.__setattr__(self, "cp", self.devices)
        if self.cp < 1 or self.devices % self.cp:
            raise ValueError(
                f"--cp {self.cp} does not divide --devices {self.devices}. Sequences are shared by equal groups: "
                "choose a divisor, or leave --cp out for one group of all devices."
            )
        if self.ulysses == 0:
            model = self.model
            object.__setattr__(self, "ulysses", auto_ulysses(model.heads, model.kv_heads, self.cp, self.per_node))
        if self.ulysses < 1 or self.cp % self.ulysses:
            raise ValueError(f"--ulysses {self.ulysses} does not divide --cp {self.cp}. Choose a divisor, or auto.")
        if self.ulysses > self.model.heads:
            raise ValueError(
                f"--ulysses {self.ulysses}: {self.model.name} has {self.model.heads} query heads, and every rank "
                "needs one. Choose a smaller split; the ring takes the rest."
            )
        most = max_head_chunks(self.model.heads, self.model.kv_heads, self.ulysses)
        if not 1 <= self.head_chunks <= most:
            raise ValueError(
                f"--head-chunks {self.head_chunks}: with --ulysses {self.ulysses}, the busiest rank exchanges "
                f"{most if self.ulysses > 1 else 'no'} query heads of {self.model.name}. Choose at most {most}"
                + ("." if self.ulysses > 1 else ", or a --ulysses of at least 2.")
            )
        if self.inner != 1 and (not 1 < self.inner < self.ring or self.ring % self.inner):
            raise ValueError(
                f"--inner {self.inner} does not cut a ring of {self.ring} into several equal rings. Choose a divisor "
                "in between, or 1."
            )
        if self.inner > 1 and self.transport not in ("auto", "double_ring"):
            raise ValueError(
                f"--inner {self.inner} means a double ring, but --transport is {self.transport}. Use double_ring or "
                "auto, or leave --inner out."
            )
        if self.transport == "double_ring" and self.inner == 1:
            raise ValueError("--transport double_ring needs --inner, the ranks of an inner ring: those of a node.")
        if min(self.node_bandwidth, self.network_bandwidth) < 0:
            slow = min(self.node_bandwidth, self.network_bandwidth)
            raise ValueError(f"A bandwidth of {slow:g} bytes/s moves nothing. Give a positive one, or none.")
        if self.lora < 0:
            raise ValueError(f"--lora {self.lora} is no rank. Give a positive one, or 0 to train all parameters.")
        self.device_facts.rates(self.kernel)

    def _check_names(self) -> None:
        choices: dict[str, Collection[str]] = {"device": DEVICES, "optimizer": OPTIMIZERS}
        choices |= {"checkpoint": CHECKPOINTS, "layout": LAYOUTS, "precision": ("auto", *PRECISIONS)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} {getattr(self, name)!r} is not known. Choose one of {', '.join(allowed)}.")
        if self.transport not in ("auto", *TRANSPORTS):
            names = ", ".join(TRANSPORTS)
            raise ValueError(f"--transport {self.transport!r} is not known. Choose one of auto, {names}.")
        unknown = [name for name in self.offload if name not in OFFLOADS]
        if unknown:
            raise ValueError(f"--offload {unknown[0]!r} is not known. Choose from {', '.join(OFFLOADS)}.")
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"--zero {self.zero} is no stage of ZeRO. Choose 0, 1, 2 or 3 (3 is FSDP).")
        if "attention" in self.offload and self.checkpoint != "save-attention":
            raise ValueError(
                f"--offload attention moves saved attention outputs, but --checkpoint {self.checkpoint} saves none. "
                "Add --checkpoint save-attention."
            )
        if "layers" in self.offload and self.checkpoint == "none":
            raise ValueError("--offload layers moves the inputs of checkpointed layers. Add --checkpoint full.")
        self._check_engine()

    def _check_engine(self) -> None:
        """Refuse what no engine does with weights, gradients and optimizer states."""
        offload = [name for name in ("optimizer", "weights") if name in self.offload]
        if offload and not self.zero:
            raise ValueError(
                f"--offload {','.join(offload)} with --zero 0: nothing but DeepSpeed and FSDP2 offloads states. Add "
                "--zero 3, or for the optimizer alone --zero 1 or 2."
            )
        if "weights" in offload and self.zero != 3:
            raise ValueError(f"--offload weights needs --zero 3, not {self.zero}: whole weights stay on the device.")
        if offload == ["weights"]:
            raise ValueError("--offload weights needs its optimizer there, too. Write --offload optimizer,weights.")
        if self.zero == 0 and self.precision == "bf16-master":
            raise ValueError("--precision bf16-master is DeepSpeed's, but --zero 0 is DDP. Add --zero 1, 2 or 3.")
        if self.zero in (1, 2) and not self.is_deepspeed:
            raise ValueError(
                f"--precision {self.precision} with --zero {self.zero}: DeepSpeed trains with fp32 master weights. "
                "Use --precision bf16-master, or FSDP2 (--zero 3)."
            )
        if self.zero == 3 and offload == ["optimizer"] and not self.is_deepspeed:
            raise ValueError(
                f"--offload optimizer with --precision {self.precision}: FSDP2 offloads weights with it. Write "
                "--offload optimizer,weights, or use DeepSpeed with --precision bf16-master."
            )
        if self.zero:
            check_optimizer(self.optimizer, self.is_deepspeed, bool(offload))

    @property
    def device_facts(self) -> Device:
        return DEVICES[self.device]

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed holds the states, rather than FSDP2, DDP or one process."""
        if self.precision != "auto":
            return self.precision == "bf16-master"
        alone = "optimizer" in self.offload and "weights" not in self.offload
        return self.zero in (1, 2) or (self.zero == 3 and alone)

    @property
    def precision_facts(self) -> Precision:
        name = "bf16-master" if self.is_deepspeed else "fp32"
        return PRECISIONS[name if self.precision == "auto" else self.precision]

    @property
    def optimizer_facts(self) -> Optimizer:
        return OPTIMIZERS[self.optimizer]

    @property
    def hardware(self) -> Hardware:
        links = {"node_bandwidth": self.node_bandwidth, "network_bandwidth": self.network_bandwidth}
        own = {name: value for name, value in links.items() if value}
        return dataclasses.replace(self.device_facts.hardware(self.kernel, self.per_node), **own)  # type: ignore[arg-type]

    @property
    def dp(self) -> int:
        """Sequences that are worked on at a time."""
        return self.devices // self.cp

    @property
    def ring(self) -> int:
        """Places of the ring."""
        return self.cp // self.ulysses

    @property
    def multiple(self) -> int:
        """Lengths the layout can deal are multiples of this."""
        return length_multiple(self.layout, self.cp, self.ulysses)

    @property
    def padded(self) -> int:
        return padded_length(self.layout, self.length, self.cp, self.ulysses)

    @property
    def tokens(self) -> int:
        """Tokens of a rank, over all rows: `c`."""
        return self.padded // self.cp * self.rows

    def sequence(self) -> ShardedSequence:
        return ShardedSequence(self.layout, self.padded, self.cp, ulysses=self.ulysses)

    def chosen(self, window: int | None) -> tuple[str, int]:
        """Transport and inner ring for layers that see so far; "auto" asks the cost model, as training does."""
        if self.ring == 1:
            return "ring", 1
        if self.transport != "auto":
            return self.transport, self.inner if self.transport == "double_ring" else 1
        mask, shape = Mask(window=window), self.model.shape(2, self.rows)
        name = choose_transport(self.sequence(), mask, shape, self.inner, self.hardware).transport
        return name, self.inner if name == "double_ring" else 1

    def but(self, **changes: object) -> "Job":
        """The same job with some settings changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
