"""Tiny models and batches for the tests of the Hugging Face side."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from ring_hf.geometry import RingOptions
from ring_hf.hf import context

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}


def llama(attention: str = "ring_zigzag", **more: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **more}, attn_implementation=attention))


def mistral(attention: str = "ring_zigzag", window: int = 8) -> MistralForCausalLM:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window, attn_implementation=attention))


def rows(*lengths: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Random examples with labels, the first label of each ignored."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in lengths:
        tokens = torch.randint(1, SIZES["vocab_size"], (length,), generator=generator).tolist()
        examples.append({"input_ids": tokens, "labels": [-100, *tokens[1:]]})
    return examples


def context_of(size: int, rank: int, **more: Any) -> context.ProcessContext:
    """`rank` of `size` processes that share sequences; names of `RingOptions` go into its options."""
    options = RingOptions(**{field.name: more.pop(field.name) for field in fields(RingOptions) if field.name in more})
    return context.ProcessContext(
        size,
        rank,
        num_replicas=1,
        replica=0,
        group="none",
        replica_group=None,
        options=options,
        **{"ranks_per_node": size, **more},
    )


@contextmanager
def rank_of(size: int, rank: int, **more: Any) -> Iterator[None]:
    """This process as one of several that share sequences, without starting any."""
    context.activate(context_of(size, rank, **more))
    try:
        yield
    finally:
        context.activate(None)
