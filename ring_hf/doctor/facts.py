"""What an examination found: plain values, so that advice is a function of them and JSON holds all of them."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Query:
    """What the user wants to do: a model at a length, shared by so many ranks."""

    model: str
    sequence: int
    ranks: int
    layout: str
    dtype: str


@dataclass(frozen=True)
class Package:
    """A package, what is asked of its version, and the version that the tests ran with (None: by contract only)."""

    name: str
    found: str | None
    needs: str
    tested: str | None
    required: bool
    fits: bool = True
    notes: str = ""


@dataclass(frozen=True)
class Devices:
    """The accelerators of this machine, or its CPU.

    Attributes:
        kind: "cuda" or "cpu".
        peers: whether every device reaches every other one directly; None with one device, or without any.
        unused: an NVIDIA driver is here, but this PyTorch cannot use it.
    """

    kind: str
    names: tuple[str, ...]
    memory: int
    cores: int
    capability: tuple[int, int] | None = None
    peers: bool | None = None
    unused: bool = False


@dataclass(frozen=True)
class AttentionGroup:
    """Layers of one kind, the kernel they would get, and why not each of the others (None: it fits, too)."""

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
    kernels: dict[str, str | None]

    @property
    def visible(self) -> int | None:
        """Keys that a query sees at most; None: all before it."""
        return min((n for n in (self.window, self.chunk) if n is not None), default=None)

    def describe(self) -> str:
        dims = f"{self.head_dim}" if self.head_dim == self.v_head_dim else f"{self.head_dim} / {self.v_head_dim}"
        parts = [f"{self.num_heads} query / {self.num_kv_heads} key heads of {dims}"]
        parts += [f"window {self.window:,}"] if self.window else []
        parts += [f"chunks of {self.chunk:,}"] if self.chunk else []
        parts += [f"softcap {self.softcap:g}"] if self.softcap else []
        parts += ["sinks"] if self.sinks else []
        return ", ".join(parts)


@dataclass(frozen=True)
class EngineFact:
    """An engine: bytes of weights, gradients and optimizer states on a rank, and why it cannot run here, if so."""

    name: str
    held: int
    missing: str | None


@dataclass(frozen=True)
class Speed:
    """Causal attention of one layer over so many tokens on one device: FLOPs and seconds of each pass."""

    tokens: int
    flops: float
    forward: float
    backward: float


@dataclass(frozen=True)
class Links:
    """Neighbours of a ring that exchange at once: bytes and seconds, or why there is no measurement."""

    processes: int
    backend: str
    times: tuple[tuple[int, float], ...] = ()
    error: str | None = None

    @property
    def bandwidth(self) -> float:
        """Bytes per second that a rank sends while it receives as many: from the largest message."""
        size, seconds = self.times[-1]
        return size / seconds

    @property
    def latency(self) -> float:
        """Seconds of the fastest message, whatever little it held."""
        return min(seconds for _, seconds in self.times)


@dataclass(frozen=True)
class AlgorithmEstimate:
    """One algorithm for all attention layers of a step: seconds of both passes, and what of them is exposed."""

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
class Overlap:
    """Whether compute hides the exchange.

    Attributes:
        tokens: of a rank.
        least_forward, least_backward: tokens of a rank from which a step of the ring takes longer than its message;
            None where all layers look at a window or chunk only.
        measured: whether links were measured, or taken from a preset of the cost model.
    """

    tokens: int
    least_forward: int | None
    least_backward: int | None
    ways: tuple[AlgorithmEstimate, ...]
    measured: bool
    links: str

    @property
    def ring(self) -> AlgorithmEstimate:
        return self.ways[0]

    @property
    def best(self) -> AlgorithmEstimate:
        return min(self.ways, key=lambda way: way.seconds)


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found out; `refused` is what training would say about the model."""

    question: Query
    packages: tuple[Package, ...]
    devices: Devices
    model_type: str
    refused: str | None
    probed: bool
    layers: tuple[AttentionGroup, ...]
    links: Links
    speeds: tuple[Speed, ...] = ()
    overlap: Overlap | None = None
    engines: tuple[EngineFact, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
