"""How the ranks that share a sequence divide it among them: the layout of their ring, heads (Ulysses), inner rings.

`check_sizes` says what can be said when the config is written. `resolve` says the rest when the model is known: its
attention implementation names the layout, its head counts limit Ulysses. Both are pure functions of plain numbers, so
every rank comes to the same result; the collator, the guard and the callback all ask `resolve`.

Words: cp = ring x ulysses ranks share a sequence; the ring is outer x inner (double ring).
"""

from dataclasses import dataclass
from typing import Any

from ring_hf.geometry import TRANSPORTS, auto_ulysses, check_head_chunks

from .attn_names import BACKENDS, ULYSSES, attention_name, layout_of
from .context import ProcessContext


@dataclass(frozen=True)
class ResolvedDegrees:
    """What was asked for, with nothing left open (but `transport="auto"`, which is chosen per mask)."""

    backend: str
    layout: str
    size: int
    ulysses_size: int
    inner_ring_size: int
    transport: str
    head_chunks: int = 1

    @property
    def ring_size(self) -> int:
        return self.size // self.ulysses_size

    def __str__(self) -> str:
        return (
            f"{self.backend} (layout {self.layout}), {self.size} ranks per sequence = ring {self.ring_size} x ulysses "
            f"{self.ulysses_size}, inner ring {self.inner_ring_size}, transport {self.transport}"
            + (f", heads in {self.head_chunks} chunks" if self.head_chunks > 1 else "")
        )


def check_sizes(
    size: int, ulysses_size: int | str | None, inner_ring_size: int, transport: str, head_chunks: int = 1
) -> None:
    """Refuses settings that fit no model. `ulysses_size=None` is 1, or `size` under the name "ulysses"."""
    if isinstance(ulysses_size, str) and ulysses_size != "auto":
        raise ValueError(f'ulysses_size={ulysses_size!r} must be a whole number of at least 1, or "auto".')
    if transport not in ("auto", *TRANSPORTS):
        raise ValueError(f"transport={transport!r} is not known. Choose one of auto, {', '.join(TRANSPORTS)}.")
    if isinstance(ulysses_size, int) and size % ulysses_size:
        raise ValueError(
            f"ulysses_size={ulysses_size} does not divide context_parallel_size={size}: every rank of the ring is a "
            f"group of ulysses_size ranks. Set it to {_listed(_divisors(size))}, or to 'auto'."
        )
    if inner_ring_size > 1 and transport not in ("auto", "double_ring"):
        raise ValueError(
            f"inner_ring_size={inner_ring_size} belongs to the double ring, but transport={transport!r}. Set "
            'transport="double_ring" (or "auto"), or leave inner_ring_size out.'
        )
    _check_rings(size, ulysses_size if isinstance(ulysses_size, int) else 1, inner_ring_size, transport)
    if head_chunks > 1 and (size == 1 or ulysses_size == 1):
        raise ValueError(
            f"head_chunks={head_chunks} cuts the exchange of heads, but with context_parallel_size={size} and "
            f"ulysses_size={ulysses_size} no heads are exchanged. Set both to at least 2 (or ulysses_size='auto'), or "
            "leave head_chunks out."
        )


def resolve(model_config: Any, context: ProcessContext) -> ResolvedDegrees:
    """The split of a model's sequences over `context.size` ranks.

    Raises:
        ValueError: if the model's backend is not ours, or it and the sizes do not fit together.
    """
    layout, backend = layout_of(model_config), attention_name(model_config) or ""
    ulysses_size = _ulysses_size(backend, model_config, context)
    inner = context.inner_ring_size
    if context.transport == "double_ring" and inner == 1 and context.size > 1:
        inner = _ring_ranks_of_a_node(context.size, ulysses_size, context.ranks_per_node)
    _check_rings(context.size, ulysses_size, inner, context.transport)
    for num_heads, num_kv_heads in _head_counts(model_config) or ((context.head_chunks * ulysses_size,) * 2,):
        check_head_chunks(context.head_chunks, num_heads, num_kv_heads, ulysses_size)
    return ResolvedDegrees(backend, layout, context.size, ulysses_size, inner, context.transport, context.head_chunks)


def split_error(model_config: Any, context: ProcessContext) -> str | None:
    """The message of what `resolve` refuses."""
    try:
        resolve(model_config, context)
    except ValueError as error:
        return str(error)
    return None


def _ulysses_size(backend: str, model_config: Any, context: ProcessContext) -> int:
    size, wanted = context.size, context.ulysses_size
    if backend != ULYSSES and wanted in (None, 1):
        return 1
    heads = _head_counts(model_config)
    if backend == ULYSSES:
        if wanted not in (None, size):
            raise ValueError(
                f"attn_implementation={ULYSSES!r} exchanges heads among all context_parallel_size={size} ranks, but "
                f"ulysses_size={wanted!r}. Leave ulysses_size out, or use a ring of such groups: "
                f"attn_implementation={next(iter(BACKENDS))!r} (or another ring_* name)."
            )
        ulysses_size = size
    elif isinstance(wanted, int):
        ulysses_size = wanted
    elif heads is None:
        raise ValueError(
            f"ulysses_size={wanted!r} needs the numbers of heads, which {type(model_config).__name__} does not give "
            "under their usual names. Set ulysses_size to a number."
        )
    else:
        fitting = [
            n for n in _divisors(size) if all(auto_ulysses(*pair, n, context.ranks_per_node) == n for pair in heads)
        ]
        ulysses_size = max(fitting)
    fewest = ulysses_size if heads is None else min(num_heads for num_heads, _ in heads)
    if fewest < ulysses_size:
        raise ValueError(
            f"ulysses_size={ulysses_size} deals {fewest} query heads to {ulysses_size} ranks, but every rank needs "
            f"at least one. Set ulysses_size to a divisor of context_parallel_size={size} that is at most "
            f"{fewest} with a ring_* backend, or to 'auto'."
        )
    return ulysses_size


def _head_counts(model_config: Any) -> set[tuple[int, int]] | None:
    """`(query heads, key/value heads)` of all layers; None where the config calls them otherwise."""
    config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    found = set()
    for layer in config.per_layer_config if getattr(config, "is_heterogeneous", False) else (config,):
        num_heads = getattr(layer, "num_attention_heads", None)
        num_kv_heads = getattr(layer, "num_key_value_heads", None) or num_heads
        if not isinstance(num_heads, int) or not isinstance(num_kv_heads, int):
            return None
        found.add((num_heads, num_kv_heads))
    return found


def _check_rings(size: int, ulysses_size: int, inner: int, transport: str) -> None:
    if size == 1 and inner == 1:
        return  # whole sequences: nothing travels
    ring = size // ulysses_size
    fitting = [divisor for divisor in _divisors(ring) if 1 < divisor < ring]
    if (inner > 1 or transport == "double_ring") and not fitting:
        setting = f"inner_ring_size={inner}" if inner > 1 else f"transport={transport!r}"
        raise ValueError(
            f"{setting} needs a ring that is made of smaller rings, but context_parallel_size={size} / "
            f"ulysses_size={ulysses_size} leaves a ring of {ring}. Use a ring of 4, 6, 8, ... ranks, or "
            'transport="ring" without inner_ring_size.'
        )
    if inner > 1 and inner not in fitting:
        raise ValueError(
            f"inner_ring_size={inner} does not cut the ring of {ring} ranks (context_parallel_size={size} / "
            f"ulysses_size={ulysses_size}) into several equal rings. Set it to {_listed(fitting)}."
        )


def _ring_ranks_of_a_node(size: int, ulysses_size: int, ranks_per_node: int) -> int:
    """Inner ring of a double ring that was asked for without one: the ranks of the ring that share a node."""
    ring, inner = size // ulysses_size, ranks_per_node // ulysses_size
    if ranks_per_node % ulysses_size or inner in (1, ring) or ring % inner:
        raise ValueError(
            'transport="double_ring" without inner_ring_size takes the ranks of a node as inner ring, but '
            f"LOCAL_WORLD_SIZE is {ranks_per_node} with ulysses_size={ulysses_size}, and the ring has {ring} ranks. "
            f'Set inner_ring_size to a divisor of {ring}, or transport="auto".'
        )
    return inner


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _listed(numbers: list[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last
