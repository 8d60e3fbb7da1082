"""Configs, models and arguments that must be refused, and the error messages, which name the fault and the way out.

Each table maps the name of a test case to a `Refusal`. `refused_batches.py` holds those of batches.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.hf import models
from tests.hf.models import llama, llama_with_config


@dataclass(frozen=True)
class Refusal:
    """An input that must be refused.

    Attributes:
        message: a regular expression that the error message must match.
        kwargs: keyword arguments of the function or class under test; the keys of a batch.
        examples: for a collator.
        build: returns the model, where the model is the input.
    """

    message: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    build: Callable[[], torch.nn.Module] | None = None


# Arguments of `ContextParallelConfig`.
CONFIGS: dict[str, Refusal] = {
    "cp_size": Refusal(
        kwargs={"cp_size": 2},
        message="cp_size=2 would make the Trainer divide its token count.*context_parallel_size=2",
    ),
    "sp_size": Refusal(kwargs={"sp_size": 2}, message="sp_size=2 would"),
    "tp_size": Refusal(kwargs={"tp_size": 2}, message="tp_size=2 would"),
    "handler": Refusal(kwargs={"cp_handler": object()}, message="cp_handler configures Accelerate's own parallelism"),
    "ulysses of zero ranks": Refusal(
        kwargs={"ulysses_size": 0}, message="ulysses_size=0 must be a whole number of at least 1"
    ),
    "ulysses of unknown word": Refusal(
        kwargs={"ulysses_size": "all"}, message="ulysses_size='all' must be a whole number of at least 1, or"
    ),
    "ulysses that does not divide the ranks": Refusal(
        kwargs={"context_parallel_size": 4, "ulysses_size": 3},
        message="ulysses_size=3 does not divide context_parallel_size=4.* Set it to 1, 2 or 4, or to 'auto'",
    ),
    "transport": Refusal(
        kwargs={"transport": "pigeon"},
        message="transport='pigeon' is not known. Choose one of auto, ring, double_ring",
    ),
    "inner ring of zero ranks": Refusal(
        kwargs={"inner_ring_size": 0}, message="inner_ring_size=0 must be a whole number of at least 1"
    ),
    "inner ring of another transport": Refusal(
        kwargs={"context_parallel_size": 4, "inner_ring_size": 2, "transport": "direct"},
        message="inner_ring_size=2 belongs to the double ring, but transport='direct'. Set transport=\"double_ring\"",
    ),
    "inner ring that does not divide the ring": Refusal(
        kwargs={"context_parallel_size": 8, "inner_ring_size": 3},
        message="inner_ring_size=3 cannot cut a ring of 8 ranks .context_parallel_size=8 / ulysses_size=1..*to 2 or 4",
    ),
    "inner ring of a hybrid": Refusal(
        kwargs={"context_parallel_size": 8, "ulysses_size": 2, "inner_ring_size": 4, "transport": "double_ring"},
        message="inner_ring_size=4 cannot cut a ring of 4 ranks .context_parallel_size=8 / ulysses_size=2."
        ".*Set it to 2",
    ),
    "inner ring of a ring of three": Refusal(
        kwargs={"context_parallel_size": 3, "inner_ring_size": 3},
        message="inner_ring_size=3 cannot cut a ring of 3 ranks .*takes a ring of 4, 6, 8",
    ),
    "double ring of two": Refusal(
        kwargs={"context_parallel_size": 2, "transport": "double_ring"},
        message="transport='double_ring' cannot cut a ring of 2 ranks",
    ),
    "no head chunks": Refusal(kwargs={"head_chunks": 0}, message="head_chunks=0 must be a whole number of at least 1"),
    "head chunks in one process": Refusal(
        kwargs={"ulysses_size": 1, "head_chunks": 4},
        message="head_chunks=4 cuts the exchange of heads, but with context_parallel_size=1 and ulysses_size=1 "
        "no heads are",
    ),
    "head chunks without ulysses": Refusal(
        kwargs={"context_parallel_size": 4, "ulysses_size": 1, "head_chunks": 2},
        message="head_chunks=2 cuts the exchange of heads, but with context_parallel_size=4 and ulysses_size=1 "
        ".*Set both to",
    ),
    "kernel": Refusal(kwargs={"kernel": "warp"}, message="kernel='warp' is not known. Choose one of auto"),
    "dp_shard_size": Refusal(
        kwargs={"dp_shard_size": 0}, message="dp_shard_size=0 must be a whole number of at least 1"
    ),
    "size zero": Refusal(
        kwargs={"context_parallel_size": 0}, message="context_parallel_size=0 must be a whole number of at least 1"
    ),
}

# Models.
MODELS: dict[str, Refusal] = {
    "sdpa": Refusal(build=lambda: llama("sdpa"), message="attn_implementation='sdpa' attends within one shard only"),
    "encoder-decoder": Refusal(build=models.t5, message="is an encoder-decoder"),
    "linear attention": Refusal(
        build=lambda: llama_with_config(layer_types=["full_attention", "linear_attention"]), message="linear_attention"
    ),
    "convolution": Refusal(
        build=lambda: llama_with_config(layer_types=["conv", "full_attention"]), message="layers of type conv"
    ),
    "recurrent blocks": Refusal(
        build=lambda: llama_with_config(layers_block_type=["mamba", "attention"]), message="layers of type mamba"
    ),
    "selected keys": Refusal(
        build=lambda: llama_with_config(layer_types=["indexed_attention"] * 2),
        message="by an index over the whole sequence",
    ),
    "summaries": Refusal(
        build=lambda: llama_with_config(layer_types=["compressed_sparse_attention"] * 2),
        message="attend to summaries of the whole sequence",
    ),
    "convolution in a layer": Refusal(
        build=lambda: models.llama_with_module("mixer", torch.nn.Conv1d(4, 4, 3)),
        message="has convolutions .layers.1.mlp.mixer., which look at neighbouring tokens",
    ),
    "internal positions": Refusal(build=models.roberta, message="computes position ids itself"),
    "refused type": Refusal(
        build=lambda: llama_with_config(model_type="nemotron"),
        message="does not pass keyword arguments to its attention",
    ),
    "jitter": Refusal(
        build=lambda: models.mixtral(router_jitter_noise=0.1),
        message="Random noise on the router is active .*jitter_noise=0.1",
    ),
    "dropout function": Refusal(build=models.opt, message="dropout=0.1"),
    "another loss": Refusal(build=models.llama_classifier, message="does not use the causal language modelling loss"),
    "no kwargs": Refusal(
        build=models.llama_without_kwargs, message=r"NoKwargsForCausalLM.forward takes no \*\*kwargs"
    ),
    "attention dropout": Refusal(
        build=lambda: llama_with_config(attention_dropout=0.1), message="attention_dropout=0.1 would draw"
    ),
    "dropout modules": Refusal(build=models.gpt2, message="dropout modules are active"),
    "dynamic RoPE": Refusal(
        build=lambda: llama_with_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        message="rope_type='dynamic' chooses its frequencies by the largest position",
    ),
    "router loss": Refusal(
        build=models.mixtral_without_coefficient, message="output_router_logits=True adds an auxiliary loss"
    ),
    "attention weights": Refusal(
        build=lambda: llama_with_config(_output_attentions=True),
        message="output_attentions=True needs the attention matrix",
    ),
}

# Fields of `TrainingArguments`.
ARGUMENTS: dict[str, Refusal] = {
    "label smoothing": Refusal(kwargs={"label_smoothing_factor": 0.1}, message="label_smoothing_factor=0.1"),
    "token average": Refusal(
        kwargs={"average_tokens_across_devices": False},
        message="average_tokens_across_devices=False gives every shard the same",
    ),
    "rebalancing": Refusal(
        kwargs={"train_sampling_strategy": "batch_rebalance"}, message='train_sampling_strategy="batch_rebalance"'
    ),
    "neftune": Refusal(kwargs={"neftune_noise_alpha": 5.0}, message="neftune_noise_alpha=5.0 adds noise"),
    "dispatching": Refusal(
        kwargs={"accelerator_config": {"dispatch_batches": True}}, message='"dispatch_batches": False'
    ),
    "uneven batches": Refusal(kwargs={"accelerator_config": {"even_batches": False}}, message="even_batches=False"),
    "gathering objects": Refusal(kwargs={"eval_use_gather_object": True}, message="eval_use_gather_object=True"),
    "inputs of batch metrics": Refusal(
        kwargs={"batch_eval_metrics": True, "include_for_metrics": ["inputs"]},
        message="would pass shards to compute_metrics",
    ),
    "torch.compile": Refusal(
        kwargs={"torch_compile": True}, message="torch_compile=True is not supported with context parallelism yet"
    ),
}
