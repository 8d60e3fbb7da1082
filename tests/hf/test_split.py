"""`resolve_degrees`: the parallel degrees that follow from a model and a config, equal on all ranks."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from transformers import LlamaConfig

from ring_hf.geometry import LAYOUTS
from ring_hf.hf.attn_names import BACKENDS
from ring_hf.hf.degrees import find_degrees_error, resolve_degrees
from tests.hf.models import SIZES, context_of


class Degrees(NamedTuple):
    """The degrees that must be resolved."""

    layout: str
    ring: int
    ulysses: int
    inner_ring: int = 1
    transport: str = "auto"


@dataclass(frozen=True)
class Case:
    """A model, the settings of a context of 4 ranks, and the result.

    Attributes:
        attention: its attention implementation.
        heads: its numbers of query and key/value heads.
        settings: fields of the context.
        expected: the resolved degrees.
        message: a regular expression of the error message.
    """

    attention: str
    heads: tuple[int, int] = (4, 2)
    settings: dict[str, Any] = field(default_factory=dict)
    expected: Degrees | None = None
    message: str = ""


RESOLVED = {
    "plain": Case("ring_zigzag", expected=Degrees("zigzag", ring=4, ulysses=1)),
    "hybrid": Case("ring_striped", settings={"ulysses_size": 2}, expected=Degrees("striped", ring=2, ulysses=2)),
    "all ranks by number": Case(
        "ring_balanced", settings={"ulysses_size": 4}, expected=Degrees("balanced", ring=1, ulysses=4)
    ),
    "all ranks by name": Case("ulysses", expected=Degrees("contiguous", ring=1, ulysses=4)),
    "all ranks by both": Case(
        "ulysses", settings={"ulysses_size": 4}, expected=Degrees("contiguous", ring=1, ulysses=4)
    ),
    "auto": Case(
        "ring_zigzag", heads=(4, 4), settings={"ulysses_size": "auto"}, expected=Degrees("zigzag", ring=1, ulysses=4)
    ),
    "auto, heads": Case(
        "ring_zigzag", heads=(6, 2), settings={"ulysses_size": "auto"}, expected=Degrees("zigzag", ring=2, ulysses=2)
    ),
    "auto, odd heads": Case(
        "ring_zigzag", heads=(3, 3), settings={"ulysses_size": "auto"}, expected=Degrees("zigzag", ring=4, ulysses=1)
    ),
    "auto, node": Case(
        "ring_zigzag",
        heads=(4, 4),
        settings={"ulysses_size": "auto", "ranks_per_node": 2},
        expected=Degrees("zigzag", ring=2, ulysses=2),
    ),
    "double ring": Case(
        "ring_zigzag",
        settings={"transport": "double_ring", "inner_ring_size": 2},
        expected=Degrees("zigzag", ring=4, ulysses=1, inner_ring=2, transport="double_ring"),
    ),
    "inner ring with auto": Case(
        "ring_zigzag", settings={"inner_ring_size": 2}, expected=Degrees("zigzag", ring=4, ulysses=1, inner_ring=2)
    ),
    "inner ring of the node": Case(
        "ring_zigzag",
        settings={"transport": "double_ring", "ranks_per_node": 2},
        expected=Degrees("zigzag", ring=4, ulysses=1, inner_ring=2, transport="double_ring"),
    ),
    "head chunks": Case(
        "ulysses", heads=(8, 4), settings={"head_chunks": 2}, expected=Degrees("contiguous", ring=1, ulysses=4)
    ),
    "direct": Case(
        "ring_contiguous",
        settings={"transport": "direct"},
        expected=Degrees("contiguous", ring=4, ulysses=1, transport="direct"),
    ),
}

REFUSED = {
    "another backend": Case("sdpa", message="attn_implementation='sdpa' attends within one shard only"),
    "ulysses with some of the ranks": Case(
        "ulysses",
        settings={"ulysses_size": 2},
        message="exchanges heads among all context_parallel_size=4 ranks, but ulysses_size=2. Leave ulysses_size out",
    ),
    "ulysses of unknown size": Case("ulysses", settings={"ulysses_size": "auto"}, message="but ulysses_size='auto'"),
    "fewer heads than ranks": Case("ulysses", heads=(2, 2), message="ulysses_size=4 deals 2 query heads to 4 ranks"),
    "fewer heads than ranks of a hybrid": Case(
        "ring_zigzag", heads=(1, 1), settings={"ulysses_size": 2}, message="deals 1 query heads to 2"
    ),
    "inner ring that auto leaves no ring for": Case(
        "ring_zigzag",
        heads=(4, 4),
        settings={"ulysses_size": "auto", "inner_ring_size": 2},
        message="inner_ring_size=2 cannot cut a ring of 1 ranks .* ulysses_size=4.",
    ),
    "more head chunks than heads of a rank": Case(
        "ulysses",
        heads=(8, 4),
        settings={"head_chunks": 3},
        message="head_chunks=3 is more than the 2 query heads that the busiest of ulysses_size=4 ranks attends with "
        ".8 heads",
    ),
    "head chunks without ulysses": Case(
        "ring_zigzag",
        heads=(3, 3),
        settings={"ulysses_size": "auto", "head_chunks": 2},
        message="head_chunks=2 cuts the exchange of heads, but with ulysses_size=1 no heads are exchanged",
    ),
    "double ring in one node": Case(
        "ring_zigzag",
        settings={"transport": "double_ring"},
        message="LOCAL_WORLD_SIZE is 4 with ulysses_size=1, and the ring has 4 ranks. "
        "Set inner_ring_size to a divisor of 4",
    ),
}


def config(attention, heads):
    sizes = {**SIZES, "num_attention_heads": heads[0], "num_key_value_heads": heads[1], "hidden_size": 48}
    return LlamaConfig(**sizes, attn_implementation=attention)


@pytest.mark.parametrize("case", RESOLVED.values(), ids=RESOLVED.keys())
def test_degrees_are_resolved_with_the_model(case):
    model_config = config(case.attention, case.heads)
    results = {resolve_degrees(model_config, context_of(4, rank, **case.settings)) for rank in range(4)}
    assert len(results) == 1
    degrees, expected = results.pop(), case.expected
    assert expected == Degrees(
        layout=degrees.layout,
        ring=degrees.ring_size,
        ulysses=degrees.ulysses_size,
        inner_ring=degrees.options.inner_ring_size,
        transport=degrees.options.transport,
    )
    assert degrees.options.head_chunks == case.settings.get("head_chunks", 1)
    assert (f"heads in {degrees.options.head_chunks} chunks" in str(degrees)) == (degrees.options.head_chunks > 1)
    assert (
        f"ring {expected.ring} x ulysses {expected.ulysses}, inner ring {expected.inner_ring}, "
        f"transport {expected.transport}" in str(degrees)
    )


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_degrees_that_do_not_fit_the_model_are_refused(case):
    model_config, context = config(case.attention, case.heads), context_of(4, 0, **case.settings)
    with pytest.raises(ValueError, match=case.message):
        resolve_degrees(model_config, context)
    assert find_degrees_error(model_config, context) is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_rank_has_degrees_of_one(backend):
    for transport in ("auto", "double_ring", "direct"):
        degrees = resolve_degrees(config(backend, (4, 2)), context_of(1, 0, transport=transport))
        assert (degrees.ring_size, degrees.ulysses_size, degrees.options.inner_ring_size) == (1, 1, 1)
    assert degrees.layout in LAYOUTS


def test_auto_needs_to_know_the_heads():
    heads_per_layer = SimpleNamespace(_attn_implementation="ring_zigzag", num_attention_heads=[4, 8])
    assert "does not give under their usual names" in find_degrees_error(
        heads_per_layer, context_of(4, 0, ulysses_size="auto")
    )
    degrees = resolve_degrees(
        heads_per_layer, context_of(4, 0, ulysses_size=2, head_chunks=9)
    )  # every layer checks its own heads
    assert (degrees.ulysses_size, degrees.options.head_chunks) == (2, 9)


def test_every_layer_of_a_model_with_unequal_layers_must_fit():
    unequal = config("ring_zigzag", (4, 4))
    unequal.per_layer_config = {0: {"num_attention_heads": 2, "num_key_value_heads": 2}}  # as in Gemma 4
    assert resolve_degrees(unequal, context_of(4, 0)).ulysses_size == 1
    assert resolve_degrees(unequal, context_of(4, 0, ulysses_size="auto")).ulysses_size == 2
    with pytest.raises(ValueError, match="ulysses_size=4 deals 2 query heads to 4 ranks"):
        resolve_degrees(unequal, context_of(4, 0, ulysses_size=4))
    with pytest.raises(ValueError, match="head_chunks=2 is more than the 1 query heads"):
        resolve_degrees(unequal, context_of(4, 0, ulysses_size=2, head_chunks=2))
