"""The names of the attention implementations and the layout that each of them selects.

`ring_<layout>` distributes the sequence over a ring in that layout. `ulysses` exchanges heads among all ranks that
share a sequence, each of which holds a contiguous shard. A name must not contain `flash`, `sdpa`, `flex_attention` or
a slash: Transformers would run the checks of those backends, or look for a kernel on the hub.
"""

from typing import Any

from ring_hf.geometry import LAYOUTS

ULYSSES = "ulysses"
BACKENDS = {**{f"ring_{layout}": layout for layout in LAYOUTS}, ULYSSES: "contiguous"}


def attention_name(config: Any) -> str | None:
    """Return the attention implementation of a model config (of its text config, if it has several parts)."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text_config, "_attn_implementation", None)


def layout_of(config: Any) -> str:
    """Return the layout of the attention implementation of a model config.

    Raises:
        ValueError: if the attention implementation is not one of `BACKENDS`.
    """
    name = attention_name(config)
    if name not in BACKENDS:
        raise ValueError(
            f"attn_implementation={name!r} attends within one shard only, so it cannot train on sharded sequences. "
            f"Load the model with attn_implementation set to one of {', '.join(BACKENDS)}, or call "
            f'model.set_attn_implementation("ring_zigzag").'
        )
    return BACKENDS[name]
