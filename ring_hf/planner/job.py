"""What is to be planned: a model, a length, devices, and the levers. Refuses what cannot be."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass

from ..geometry import LAYOUTS, TRANSPORTS, Mask, WholeSequence, auto_ulysses, multiple, padded_length
from ..geometry.cost import choose_transport
from ..geometry.hardware import Hardware
from .device import DEVICES, Device
from .model import Model

CHECKPOINTS = ("none", "full", "save-attention")
OFFLOADS = ("optimizer", "weights", "layers", "attention")
# Bytes per parameter: weights, gradients, and what the optimizer keeps, sharded with it.
OPTIMIZERS = {
    "adamw": (4, 4, 8, "fp32 weights and gradients, two fp32 moments; compute in bf16 (FSDP2, DDP with autocast)"),
    "adamw-bf16-master": (2, 4, 12, "bf16 weights, fp32 gradients, fp32 master and moments (DeepSpeed)"),
    "adamw-bf16": (2, 2, 4, "weights, gradients and moments in bf16"),
    "adamw-8bit": (4, 4, 2, "fp32 weights and gradients, two moments of one byte (bitsandbytes)"),
    "sgd": (4, 4, 0, "fp32 weights and gradients"),
}


@dataclass(frozen=True)
class Job:
    """A training run.

    Attributes:
        length: tokens of the sequence, before padding to the layout's multiple.
        cp: devices that share one sequence; the rest is data parallel. 0: all of them.
        zero: what is sharded over all devices: 0 nothing (DDP, which training accepts), 1 optimizer, 2 gradients too,
            3 (FSDP2) weights too. `engine` names the engine of each and says whether training accepts it.
        offload: what lives in host memory, of `OFFLOADS`.
        checkpoint: what a layer keeps for backward: "none" everything, "full" its input alone, "save-attention" its
            input and the attention output, so that attention is never computed again.
        ffn_block, loss_block: tokens at a time, of all rows, in MLPs and in the head with its loss; 0: all at once.
        ulysses: ranks that exchange heads; 0 for automatic.
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
    optimizer: str = "adamw"
    offload: tuple[str, ...] = ()
    checkpoint: str = "full"
    ffn_block: int = 0
    loss_block: int = 0
    layout: str = "zigzag"
    transport: str = "auto"
    ulysses: int = 1
    inner: int = 1
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
        choices |= {"checkpoint": CHECKPOINTS, "layout": LAYOUTS}
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
        if "weights" in self.offload and self.zero != 3:
            raise ValueError(f"--offload weights needs --zero 3, not {self.zero}: whole weights stay on the device.")

    @property
    def device_facts(self) -> Device:
        return DEVICES[self.device]

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
        return multiple(self.layout, self.cp, self.ulysses)

    @property
    def padded(self) -> int:
        return padded_length(self.layout, self.length, self.cp, self.ulysses)

    @property
    def tokens(self) -> int:
        """Tokens of a rank, over all rows: `c`."""
        return self.padded // self.cp * self.rows

    def sequence(self) -> WholeSequence:
        return WholeSequence(self.layout, self.padded, self.cp, ulysses=self.ulysses)

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
