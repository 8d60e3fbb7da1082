"""The degrees of context parallelism: how many ranks form the ring, a Ulysses group, an inner ring.

`RingOptions` holds what the user asked for. `resolve_degrees` fills in what depends on the model: its attention
implementation names the layout, its head counts limit Ulysses. It is a pure function of plain values, so every rank
gets the same result; the collator, the guard and the callback all call it.

Degrees: cp = ring x ulysses ranks share a sequence; the ring is outer x inner (double ring).
"""

from dataclasses import dataclass, replace
from typing import Any

from ring_hf.geometry import RingOptions, auto_ulysses, check_head_chunks, divisors

from .attn_names import BACKENDS, ULYSSES, attention_name, layout_of
from .context import ProcessContext


@dataclass(frozen=True)
class ResolvedDegrees:
    """The degrees of a model on `size` ranks per sequence.

    Attributes:
        backend: the attention implementation of the model.
        layout: of its ring.
        size: ranks that share a sequence.
        options: with nothing left open but `transport="auto"`, which is chosen per mask.
    """

    backend: str
    layout: str
    size: int
    options: RingOptions

    @property
    def ulysses_size(self) -> int:
        assert isinstance(self.options.ulysses_size, int), "resolved"
        return self.options.ulysses_size

    @property
    def ring_size(self) -> int:
        return self.size // self.ulysses_size

    def __str__(self) -> str:
        options = self.options
        return (
            f"{self.backend} (layout {self.layout}), {self.size} ranks per sequence = ring {self.ring_size} x ulysses "
            f"{self.ulysses_size}, inner ring {options.inner_ring_size}, transport {options.transport}"
            + (f", heads in {options.head_chunks} chunks" if options.head_chunks > 1 else "")
        )


def resolve_degrees(model_config: Any, context: ProcessContext) -> ResolvedDegrees:
    """Return the degrees of a model on the `context.size` ranks that share a sequence.

    Raises:
        ValueError: if the model's backend is not ours, or it and the sizes do not fit together.
    """
    layout, backend = layout_of(model_config), attention_name(model_config) or ""
    options, size = context.options, context.size
    ulysses_size = _ulysses_size(backend, model_config, context)
    options = replace(options, ulysses_size=ulysses_size)
    if options.transport == "double_ring" and options.inner_ring_size == 1 and size > 1:
        inner = _ring_ranks_of_a_node(size, ulysses_size, context.ranks_per_node)
        options = replace(options, inner_ring_size=inner)
    options.check_rings(size, ulysses_size)
    for num_heads, num_kv_heads in _head_counts(model_config) or ((options.head_chunks * ulysses_size,) * 2,):
        check_head_chunks(options.head_chunks, num_heads, num_kv_heads, ulysses_size)
    return ResolvedDegrees(backend, layout, size, options)


def find_degrees_error(model_config: Any, context: ProcessContext) -> str | None:
    """Return the message of the error that `resolve_degrees` raises, or None."""
    try:
        resolve_degrees(model_config, context)
    except ValueError as error:
        return str(error)
    return None


def _ulysses_size(backend: str, model_config: Any, context: ProcessContext) -> int:
    size, requested = context.size, context.options.ulysses_size
    if backend != ULYSSES and requested in (None, 1):
        return 1
    heads = _head_counts(model_config)
    if backend == ULYSSES:
        if requested not in (None, size):
            raise ValueError(
                f"attn_implementation={ULYSSES!r} exchanges heads among all context_parallel_size={size} ranks, but "
                f"ulysses_size={requested!r}. Leave ulysses_size out, or use a ring of such groups: "
                f"attn_implementation={next(iter(BACKENDS))!r} (or another ring_* name)."
            )
        ulysses_size = size
    elif isinstance(requested, int):
        ulysses_size = requested
    elif heads is None:
        raise ValueError(
            f"ulysses_size={requested!r} needs the numbers of heads, which {type(model_config).__name__} does not "
            "give under their usual names. Set ulysses_size to a number."
        )
    else:
        possible = [
            n for n in divisors(size) if all(auto_ulysses(*pair, n, context.ranks_per_node) == n for pair in heads)
        ]
        ulysses_size = max(possible)
    fewest = ulysses_size if heads is None else min(num_heads for num_heads, _ in heads)
    if fewest < ulysses_size:
        raise ValueError(
            f"ulysses_size={ulysses_size} deals {fewest} query heads to {ulysses_size} ranks, but every rank needs "
            f"at least one. Set ulysses_size to a divisor of context_parallel_size={size} that is at most "
            f"{fewest} with a ring_* backend, or to 'auto'."
        )
    return ulysses_size


def _head_counts(model_config: Any) -> set[tuple[int, int]] | None:
    """Return `(query heads, key/value heads)` of all layers; None if the config has other names for them."""
    config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    counts = set()
    for layer in config.per_layer_config if getattr(config, "is_heterogeneous", False) else (config,):
        num_heads = getattr(layer, "num_attention_heads", None)
        num_kv_heads = getattr(layer, "num_key_value_heads", None) or num_heads
        if not isinstance(num_heads, int) or not isinstance(num_kv_heads, int):
            return None
        counts.add((num_heads, num_kv_heads))
    return counts


def _ring_ranks_of_a_node(size: int, ulysses_size: int, ranks_per_node: int) -> int:
    """Return the default inner ring of a double ring: the ring ranks that share a node."""
    ring, inner = size // ulysses_size, ranks_per_node // ulysses_size
    if ranks_per_node % ulysses_size or inner in (1, ring) or ring % inner:
        raise ValueError(
            'transport="double_ring" without inner_ring_size takes the ranks of a node as inner ring, but '
            f"LOCAL_WORLD_SIZE is {ranks_per_node} with ulysses_size={ulysses_size}, and the ring has {ring} ranks. "
            f'Set inner_ring_size to a divisor of {ring}, or transport="auto".'
        )
    return inner
