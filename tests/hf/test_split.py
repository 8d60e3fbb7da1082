"""What a model and a config come to: one pure function that every rank, the collator and the guard ask."""

from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

from ring_hf.geometry import LAYOUTS
from ring_hf.hf.attn_names import BACKENDS
from ring_hf.hf.degrees import find_degrees_error, resolve_degrees
from tests.hf.models import SIZES, context_of

# name: (attention, heads, settings of the context, (layout, ring, ulysses, inner ring, transport))
RESOLVED = {
    "plain": ("ring_zigzag", (4, 2), {}, ("zigzag", 4, 1, 1, "auto")),
    "hybrid": ("ring_striped", (4, 2), {"ulysses_size": 2}, ("striped", 2, 2, 1, "auto")),
    "all ranks by number": ("ring_balanced", (4, 2), {"ulysses_size": 4}, ("balanced", 1, 4, 1, "auto")),
    "all ranks by name": ("ulysses", (4, 2), {}, ("contiguous", 1, 4, 1, "auto")),
    "all ranks by both": ("ulysses", (4, 2), {"ulysses_size": 4}, ("contiguous", 1, 4, 1, "auto")),
    "auto": ("ring_zigzag", (4, 4), {"ulysses_size": "auto"}, ("zigzag", 1, 4, 1, "auto")),
    "auto, heads": ("ring_zigzag", (6, 2), {"ulysses_size": "auto"}, ("zigzag", 2, 2, 1, "auto")),
    "auto, odd heads": ("ring_zigzag", (3, 3), {"ulysses_size": "auto"}, ("zigzag", 4, 1, 1, "auto")),
    "auto, node": (
        "ring_zigzag",
        (4, 4),
        {"ulysses_size": "auto", "ranks_per_node": 2},
        ("zigzag", 2, 2, 1, "auto"),
    ),
    "double ring": (
        "ring_zigzag",
        (4, 2),
        {"transport": "double_ring", "inner_ring_size": 2},
        ("zigzag", 4, 1, 2, "double_ring"),
    ),
    "inner ring if auto likes it": ("ring_zigzag", (4, 2), {"inner_ring_size": 2}, ("zigzag", 4, 1, 2, "auto")),
    "inner ring of the node": (
        "ring_zigzag",
        (4, 2),
        {"transport": "double_ring", "ranks_per_node": 2},
        ("zigzag", 4, 1, 2, "double_ring"),
    ),
    "chunks of heads": ("ulysses", (8, 4), {"head_chunks": 2}, ("contiguous", 1, 4, 1, "auto")),
    "direct": ("ring_contiguous", (4, 2), {"transport": "direct"}, ("contiguous", 4, 1, 1, "direct")),
}

REFUSED = {
    "no backend of ours": ("sdpa", (4, 2), {}, "attn_implementation='sdpa' attends inside one shard only"),
    "ulysses of some ranks": (
        "ulysses",
        (4, 2),
        {"ulysses_size": 2},
        "exchanges heads among all context_parallel_size=4 ranks, but ulysses_size=2. Leave ulysses_size out",
    ),
    "ulysses of unknown size": ("ulysses", (4, 2), {"ulysses_size": "auto"}, "but ulysses_size='auto'"),
    "fewer heads than ranks": ("ulysses", (2, 2), {}, "ulysses_size=4 deals 2 query heads to 4 ranks"),
    "fewer heads than ranks of a hybrid": ("ring_zigzag", (1, 1), {"ulysses_size": 2}, "deals 1 query heads to 2"),
    "inner ring that auto left no room for": (
        "ring_zigzag",
        (4, 4),
        {"ulysses_size": "auto", "inner_ring_size": 2},
        "inner_ring_size=2 needs a ring that is made of smaller rings, but .* ulysses_size=4 leaves a ring of 1",
    ),
    "more chunks than heads of a rank": (
        "ulysses",
        (8, 4),
        {"head_chunks": 3},
        "head_chunks=3 is more than the 2 query heads that the busiest of ulysses_size=4 ranks attends with .8 heads",
    ),
    "chunks of heads that auto leaves alone": (
        "ring_zigzag",
        (3, 3),
        {"ulysses_size": "auto", "head_chunks": 2},
        "head_chunks=2 cuts the exchange of heads, but with ulysses_size=1 no heads are exchanged",
    ),
    "double ring in one node": (
        "ring_zigzag",
        (4, 2),
        {"transport": "double_ring"},
        "LOCAL_WORLD_SIZE is 4 with ulysses_size=1, and the ring has 4 ranks. Set inner_ring_size to a divisor of 4",
    ),
}


def config(attention, heads):
    sizes = {**SIZES, "num_attention_heads": heads[0], "num_key_value_heads": heads[1], "hidden_size": 48}
    return LlamaConfig(**sizes, attn_implementation=attention)


@pytest.mark.parametrize("name", RESOLVED)
def test_sizes_are_resolved_with_the_model(name):
    attention, heads, settings, want = RESOLVED[name]
    splits = {resolve_degrees(config(attention, heads), context_of(4, rank, **settings)) for rank in range(4)}
    assert len(splits) == 1
    split = splits.pop()
    options = split.options
    assert (split.layout, split.ring_size, split.ulysses_size, options.inner_ring_size, options.transport) == want
    assert options.head_chunks == settings.get("head_chunks", 1)
    assert (f"heads in {options.head_chunks} chunks" in str(split)) == (options.head_chunks > 1)
    assert f"ring {want[1]} x ulysses {want[2]}, inner ring {want[3]}, transport {want[4]}" in str(split)


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_the_model_is_refused(name):
    attention, heads, settings, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        resolve_degrees(config(attention, heads), context_of(4, 0, **settings))
    assert find_degrees_error(config(attention, heads), context_of(4, 0, **settings)) is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_rank_needs_no_split(backend):
    for transport in ("auto", "double_ring", "direct"):
        split = resolve_degrees(config(backend, (4, 2)), context_of(1, 0, transport=transport))
        assert (split.ring_size, split.ulysses_size, split.options.inner_ring_size) == (1, 1, 1)
    assert split.layout in LAYOUTS


def test_auto_needs_to_know_the_heads():
    listed = SimpleNamespace(_attn_implementation="ring_zigzag", num_attention_heads=[4, 8])
    assert "does not give under their usual names" in find_degrees_error(listed, context_of(4, 0, ulysses_size="auto"))
    split = resolve_degrees(listed, context_of(4, 0, ulysses_size=2, head_chunks=9))  # for each layer to judge
    assert (split.ulysses_size, split.options.head_chunks) == (2, 9)


def test_every_layer_of_a_model_with_unequal_layers_must_fit():
    unequal = config("ring_zigzag", (4, 4))
    unequal.per_layer_config = {0: {"num_attention_heads": 2, "num_key_value_heads": 2}}  # as in Gemma 4
    assert resolve_degrees(unequal, context_of(4, 0)).ulysses_size == 1
    assert resolve_degrees(unequal, context_of(4, 0, ulysses_size="auto")).ulysses_size == 2
    with pytest.raises(ValueError, match="ulysses_size=4 deals 2 query heads to 4 ranks"):
        resolve_degrees(unequal, context_of(4, 0, ulysses_size=4))
    with pytest.raises(ValueError, match="head_chunks=2 is more than the 1 query heads"):
        resolve_degrees(unequal, context_of(4, 0, ulysses_size=2, head_chunks=2))
