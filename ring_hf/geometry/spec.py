"""The settings of attention over a shared sequence, as two frozen objects that everything else holds.

`AttentionSpec` is the maths of a layer: the mask and the transformation of the scores. `RingOptions` is the algorithm:
how the ranks that share a sequence compute it. Neither depends on a batch, a model or a process group, and their rules
are checked here only.
"""

from dataclasses import dataclass

from .sequence import Mask

TRANSPORTS = ("ring", "double_ring", "allgather", "direct")


@dataclass(frozen=True)
class AttentionSpec:
    """The maths of an attention layer.

    Attributes:
        causal, window, chunk: the mask, see `Mask`.
        scale: factor on the scores; None means `head_dim ** -0.5`.
        softcap: bends the scores to `softcap * tanh(scores / softcap)`; None leaves them as they are.

    Raises:
        ValueError: if the softcap is not positive, or `Mask` refuses the window or the chunk.
    """

    causal: bool = True
    window: int | None = None
    chunk: int | None = None
    scale: float | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap={self.softcap} must be positive. Use None for no soft-capping.")
        self.mask  # noqa: B018 (raises if the mask is invalid)

    @property
    def mask(self) -> Mask:
        return Mask(self.causal, self.window, self.chunk)

    def scale_for(self, head_dim: int) -> float:
        return head_dim**-0.5 if self.scale is None else self.scale


@dataclass(frozen=True)
class RingOptions:
    """The algorithm by which the ranks that share a sequence compute attention.

    Attributes:
        transport: route of keys and values, one of `TRANSPORTS`, or "auto" for the one with the lowest estimated cost.
        inner_ring_size: ranks of an inner ring of a double ring; 1 for none, or for an automatic choice.
        ulysses_size: neighbouring ranks that exchange heads for tokens. "auto": as many as the model allows; None:
            1, or all ranks if the model's attention is "ulysses".
        head_chunks: with Ulysses, the number of chunks in which a rank's heads are exchanged and computed.
        kernel: the attention kernel: "auto", or a name from `ring_hf.kernels.KERNELS` or `FAMILIES`.
        overlap: exchange the next keys and values while the current ones are computed.

    Raises:
        ValueError: if options contradict each other for every model and number of ranks.
    """

    transport: str = "auto"
    inner_ring_size: int = 1
    ulysses_size: int | str | None = None
    head_chunks: int = 1
    kernel: str = "auto"
    overlap: bool = True

    def __post_init__(self) -> None:
        check_transport(self.transport, self.inner_ring_size)
        if isinstance(self.ulysses_size, str) and self.ulysses_size != "auto":
            raise ValueError(f'ulysses_size={self.ulysses_size!r} must be a whole number of at least 1, or "auto".')

    def check_size(self, size: int) -> None:
        """Check the options against the ranks per sequence.

        Raises:
            ValueError: if they fit no model on `size` ranks per sequence.
        """
        ulysses_size = self.ulysses_size
        if isinstance(ulysses_size, int) and size % ulysses_size:
            raise ValueError(
                f"ulysses_size={ulysses_size} does not divide context_parallel_size={size}: every member of the ring "
                f"is a group of ulysses_size ranks. Set it to {either_of(divisors(size))}, or to 'auto'."
            )
        self.check_rings(size, ulysses_size if isinstance(ulysses_size, int) else 1)
        if self.head_chunks > 1 and (size == 1 or ulysses_size == 1):
            raise ValueError(
                f"head_chunks={self.head_chunks} cuts the exchange of heads, but with context_parallel_size={size} "
                f"and ulysses_size={ulysses_size} no heads are exchanged. Set both to at least 2 (or "
                "ulysses_size='auto'), or leave head_chunks out."
            )

    def check_rings(self, size: int, ulysses_size: int) -> None:
        """Check the inner rings against a ring of `size / ulysses_size` ring ranks.

        Raises:
            ValueError: if the ring cannot be cut into inner rings of `inner_ring_size`.
        """
        inner, ring = self.inner_ring_size, size // ulysses_size
        if inner > 1 or (size > 1 and self.transport == "double_ring"):
            setting = f"inner_ring_size={inner}" if inner > 1 else f"transport={self.transport!r}"
            sizes = f"context_parallel_size={size} / ulysses_size={ulysses_size}"
            check_inner_ring(inner if inner > 1 else None, ring, setting, f" ({sizes})")


def check_inner_ring(inner_ring_size: int | None, ring_size: int, setting: str, origin: str = "") -> None:
    """Check that a ring is made of several equal rings of several ranks.

    Args:
        inner_ring_size: ranks of an inner ring; None if any number will do.
        setting: what asks for it, as the user writes it.
        origin: where `ring_size` comes from, for the message.

    Raises:
        ValueError: if the ring cannot be cut like that.
    """
    possible = [divisor for divisor in divisors(ring_size) if 1 < divisor < ring_size]
    if inner_ring_size in possible or (inner_ring_size is None and possible):
        return
    way_out = f"Set it to {either_of(possible)}" if possible else "That takes a ring of 4, 6, 8, ... ranks"
    raise ValueError(
        f"{setting} cannot cut a ring of {ring_size} ranks{origin} into several equal rings of several ranks. "
        f'{way_out}, or use transport="ring" without inner rings.'
    )


def check_transport(transport: str, inner_ring_size: int = 1) -> None:
    """Check a transport.

    Raises:
        ValueError: if the transport is unknown, or would ignore `inner_ring_size`.
    """
    if transport not in ("auto", *TRANSPORTS):
        raise ValueError(f"transport={transport!r} is not known. Choose one of auto, {', '.join(TRANSPORTS)}.")
    if inner_ring_size > 1 and transport not in ("auto", "double_ring"):
        raise ValueError(
            f"inner_ring_size={inner_ring_size} belongs to the double ring, but transport={transport!r}. Set "
            'transport="double_ring" (or "auto"), or leave inner_ring_size out.'
        )


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def either_of(numbers: list[int]) -> str:
    """Return numbers as text: "1, 2 or 4"."""
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last
