"""The names of our attention implementations, and the layout of each.

`ring_<layout>` shards the sequence over a ring in that layout; `ulysses` exchanges heads among all ranks that share
it, which then hold contiguous shards. A name must not contain `flash`, `sdpa`, `flex_attention` or a slash:
Transformers resolves such names differently (checks of those backends run, or a hub kernel is looked up).
"""

from typing import Any

from ring_hf.geometry import LAYOUTS

ULYSSES = "ulysses"
BACKENDS = {**{f"ring_{layout}": layout for layout in LAYOUTS}, ULYSSES: "contiguous"}


def attention_name(config: Any) -> str | None:
    """Return the attention implementation of a model config (of the text part if there are several)."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text_config, "_attn_implementation", None)


def layout_of(config: Any) -> str:
    """Return the layout of the attention implementation that the model uses.

    Raises:
        ValueError: if it is not one of ours.
    """
    name = attention_name(config)
    if name not in BACKENDS:
        raise ValueError(
            f"attn_implementation={name!r} attends inside one shard only, so it cannot train on sharded sequences. "
            f"Load the model with attn_implementation set to one of {', '.join(BACKENDS)}, or call "
            f'model.set_attn_implementation("ring_zigzag").'
        )
    return BACKENDS[name]
