"""Tiny models and batches for the tests of the Hugging Face side."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

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


def llama(attention: str = "ring_zigzag", **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}, attn_implementation=attention))


def llama_with_config(**changes: Any) -> LlamaForCausalLM:
    """A Llama whose config changes after the model is built, because the class rejects these values."""
    model = llama()
    for name, value in changes.items():
        setattr(model.config, name, value)
    return model


def llama_with_module(name: str, module: torch.nn.Module) -> LlamaForCausalLM:
    """A Llama with one more module in its second layer."""
    model = llama()
    setattr(model.model.layers[1].mlp, name, module)
    return model


class NoKwargsForCausalLM(LlamaForCausalLM):
    def forward(self, input_ids: Any = None, labels: Any = None) -> Any:
        return super().forward(input_ids=input_ids, labels=labels)


def llama_without_kwargs() -> LlamaForCausalLM:
    return NoKwargsForCausalLM(llama().config)


def llama_classifier() -> LlamaForSequenceClassification:
    return LlamaForSequenceClassification(llama().config)


def mistral(attention: str = "ring_zigzag", window: int = 8) -> MistralForCausalLM:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window, attn_implementation=attention))


def mixtral(**changes: Any) -> MixtralForCausalLM:
    config = MixtralConfig(**SIZES, num_local_experts=2, attn_implementation="ring_zigzag", **changes)
    return MixtralForCausalLM(config)


def mixtral_without_coefficient() -> MixtralForCausalLM:
    """A Mixtral whose auxiliary loss has no known factor."""
    model = mixtral(output_router_logits=True)
    del model.router_aux_loss_coef
    return model


def gpt2() -> GPT2LMHeadModel:
    """A GPT-2 with dropout, except on the attention weights."""
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, attn_implementation="ring_zigzag")
    config.attention_dropout = 0.0
    return GPT2LMHeadModel(config)


def opt() -> OPTForCausalLM:
    """An OPT, whose layers call the dropout function instead of a module."""
    config = OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4)
    config._attn_implementation = "ring_zigzag"
    return OPTForCausalLM(config)


def roberta() -> RobertaForCausalLM:
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = RobertaConfig(**SIZES, **no_dropout, is_decoder=True, attn_implementation="ring_zigzag")
    return RobertaForCausalLM(config)


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4))


def rows(*lengths: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Random examples with labels; the first label of each is ignored."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in lengths:
        tokens = torch.randint(1, SIZES["vocab_size"], (length,), generator=generator).tolist()
        examples.append({"input_ids": tokens, "labels": [-100, *tokens[1:]]})
    return examples


def context_of(size: int, rank: int, **changes: Any) -> context.ProcessContext:
    """The context of `rank` among `size` processes that share sequences.

    Args:
        size: number of processes.
        rank: one of them.
        changes: fields of `ProcessContext` or of its `RingOptions`.
    """
    names = {field.name for field in fields(RingOptions)} & set(changes)
    options = RingOptions(**{name: changes.pop(name) for name in names})
    return context.ProcessContext(
        size,
        rank,
        num_replicas=1,
        replica=0,
        group="none",
        replica_group=None,
        options=options,
        **{"ranks_per_node": size, **changes},
    )


@contextmanager
def rank_of(size: int, rank: int, **changes: Any) -> Iterator[None]:
    """Make this process look like one of several that share sequences, without starting any."""
    context.activate(context_of(size, rank, **changes))
    try:
        yield
    finally:
        context.activate(None)
