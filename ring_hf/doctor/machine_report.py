"""Records of `ring-hf doctor`: plain values, which rules read and JSON can hold."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Query:
    """The run that the user asks about.

    Attributes:
        model: a folder, a `config.json`, or a name in the planner's table.
        seq_length: tokens of a sequence.
        num_ranks: ranks that share a sequence.
        layout: layout of the ring, such as "zigzag".
        dtype: name of a torch dtype.
    """

    model: str
    seq_length: int
    num_ranks: int
    layout: str
    dtype: str


@dataclass(frozen=True)
class InstalledPackage:
    """A package and whether its version is supported.

    Attributes:
        version: the installed version, None if it is not installed.
        version_range: the versions that ring_hf supports, such as ">=2.6".
        tested_version: the version that the tests run with, None if they do not run with it.
        is_required: whether ring_hf needs the package at all.
        notes: further versions, such as those of CUDA and NCCL for torch.
    """

    name: str
    version: str | None
    version_range: str
    tested_version: str | None
    is_required: bool
    is_supported: bool = True
    notes: str = ""


@dataclass(frozen=True)
class Devices:
    """The GPUs of this machine, or its CPU.

    Attributes:
        kind: "cuda" or "cpu".
        memory: bytes of the smallest device.
        num_cores: CPU cores that this process may use.
        capability: the lowest compute capability.
        has_peer_access: whether every GPU can access every other one directly; None with fewer than two GPUs.
        has_unused_gpu: an NVIDIA driver is installed, but this PyTorch cannot use it.
    """

    kind: str
    names: tuple[str, ...]
    memory: int
    num_cores: int
    capability: tuple[int, int] | None = None
    has_peer_access: bool | None = None
    has_unused_gpu: bool = False


@dataclass(frozen=True)
class AttentionGroup:
    """Layers with the same attention.

    Attributes:
        count: number of layers.
        window, chunk: keys that a sliding window or a chunk shows to a query; None without.
        kernel: the kernel that these layers would run on, None if no kernel supports them.
        rejections: per kernel, the reason why it cannot run these layers; None if it can.
    """

    count: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int | None
    chunk: int | None
    softcap: float | None
    sinks: bool
    kernel: str | None
    rejections: dict[str, str | None]

    @property
    def max_visible_keys(self) -> int | None:
        """Keys that a query can see at most; None for a causal layer without a window or chunk."""
        return min((n for n in (self.window, self.chunk) if n is not None), default=None)

    def describe(self) -> str:
        dims = f"{self.head_dim}" if self.head_dim == self.v_head_dim else f"{self.head_dim} / {self.v_head_dim}"
        traits = [f"{self.num_heads} query / {self.num_kv_heads} key heads of {dims}"]
        if self.window:
            traits.append(f"window {self.window:,}")
        if self.chunk:
            traits.append(f"chunks of {self.chunk:,}")
        if self.softcap:
            traits.append(f"softcap {self.softcap:g}")
        if self.sinks:
            traits.append("sinks")
        return ", ".join(traits)


@dataclass(frozen=True)
class EngineStatus:
    """A training engine.

    Attributes:
        state_bytes: bytes of weights, gradients and optimizer states on one rank.
        unavailable_reason: why the engine cannot run on this machine; None if it can.
    """

    name: str
    state_bytes: int
    unavailable_reason: str | None


@dataclass(frozen=True)
class AttentionTiming:
    """Causal attention of one layer over `tokens` tokens on one device: FLOPs of the forward, seconds of each pass."""

    tokens: int
    flops: float
    forward: float
    backward: float


@dataclass(frozen=True)
class LinkTimings:
    """P2P transfers between ring neighbours, all ranks sending at the same time.

    Attributes:
        times: (bytes of a message, seconds), the largest message last; empty with one process or after an error.
        error: why there is no measurement; None if there is one, or nothing to measure.
    """

    num_processes: int
    backend: str
    times: tuple[tuple[int, float], ...] = ()
    error: str | None = None

    @property
    def bandwidth(self) -> float:
        """Bytes/s of the largest message, in one direction while a rank receives as much."""
        size, seconds = self.times[-1]
        return size / seconds

    @property
    def latency(self) -> float:
        """Seconds of the fastest message of any size."""
        return min(seconds for _, seconds in self.times)


@dataclass(frozen=True)
class AlgorithmEstimate:
    """One algorithm for all attention layers of a step: seconds of both passes, and how many of them are exposed."""

    name: str
    forward: float
    backward: float
    exposed_forward: float
    exposed_backward: float

    @property
    def seconds(self) -> float:
        return self.forward + self.backward

    @property
    def exposed(self) -> float:
        """Share of both passes in which the last rank to finish communicates instead of computing."""
        return (self.exposed_forward + self.exposed_backward) / self.seconds


@dataclass(frozen=True)
class OverlapEstimate:
    """Whether compute hides communication.

    Attributes:
        tokens: tokens of a rank.
        min_tokens_forward, min_tokens_backward: tokens of a rank from which a ring step takes longer than its
            message; None if every layer has a window or chunk.
        algorithms: one estimate per algorithm, the ring first.
        links_measured: whether the links were measured, or taken from a preset of the cost model.
        links_source: the same in words, for the report.
    """

    tokens: int
    min_tokens_forward: int | None
    min_tokens_backward: int | None
    algorithms: tuple[AlgorithmEstimate, ...]
    links_measured: bool
    links_source: str

    @property
    def ring(self) -> AlgorithmEstimate:
        return self.algorithms[0]

    @property
    def fastest(self) -> AlgorithmEstimate:
        return min(self.algorithms, key=lambda algorithm: algorithm.seconds)


@dataclass(frozen=True)
class MachineReport:
    """Everything that `diagnose` learned about the machine and the query.

    Attributes:
        refusal: the error with which training would refuse the model; None if it would not.
        probed: whether attention layers were recorded in a forward on meta tensors, or read from the configuration.
        environment: the environment variables of `machine.VARIABLES` that are set.
    """

    query: Query
    packages: tuple[InstalledPackage, ...]
    devices: Devices
    model_type: str
    refusal: str | None
    probed: bool
    attention_groups: tuple[AttentionGroup, ...]
    links: LinkTimings
    timings: tuple[AttentionTiming, ...] = ()
    overlap: OverlapEstimate | None = None
    engines: tuple[EngineStatus, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
