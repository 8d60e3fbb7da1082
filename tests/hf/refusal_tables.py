"""The tables of refusals: what is asked for, and words of the message that must name the fault and the way out."""

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from ring_hf.geometry import RingOptions, ShardedSequence
from ring_hf.hf.batch_metadata import METADATA_KEY, ContextParallelMetadata, InvalidBatch
from tests.hf.faults import LeftPadding, TwoRows
from tests.hf.models import SIZES, llama, rows

CONFIGS = {
    "cp_size": ({"cp_size": 2}, "cp_size=2 would make the Trainer divide its token count.*context_parallel_size=2"),
    "sp_size": ({"sp_size": 2}, "sp_size=2 would"),
    "tp_size": ({"tp_size": 2}, "tp_size=2 would"),
    "handler": ({"cp_handler": object()}, "cp_handler configures Accelerate's own parallelism"),
    "ulysses of zero ranks": ({"ulysses_size": 0}, "ulysses_size=0 must be a whole number of at least 1"),
    "ulysses in words": ({"ulysses_size": "all"}, "ulysses_size='all' must be a whole number of at least 1, or"),
    "ulysses that does not divide": (
        {"context_parallel_size": 4, "ulysses_size": 3},
        "ulysses_size=3 does not divide context_parallel_size=4.* Set it to 1, 2 or 4, or to 'auto'",
    ),
    "transport": ({"transport": "pigeon"}, "transport='pigeon' is not known. Choose one of auto, ring, double_ring"),
    "inner ring of zero ranks": ({"inner_ring_size": 0}, "inner_ring_size=0 must be a whole number of at least 1"),
    "inner ring of another transport": (
        {"context_parallel_size": 4, "inner_ring_size": 2, "transport": "direct"},
        "inner_ring_size=2 belongs to the double ring, but transport='direct'. Set transport=\"double_ring\"",
    ),
    "inner ring that does not divide": (
        {"context_parallel_size": 8, "inner_ring_size": 3},
        "inner_ring_size=3 does not cut the ring of 8 ranks .context_parallel_size=8 / ulysses_size=1.*to 2 or 4",
    ),
    "inner ring of a hybrid": (
        {"context_parallel_size": 8, "ulysses_size": 2, "inner_ring_size": 4, "transport": "double_ring"},
        "inner_ring_size=4 does not cut the ring of 4 ranks .context_parallel_size=8 / ulysses_size=2.*Set it to 2",
    ),
    "inner ring of a ring of three": (
        {"context_parallel_size": 3, "inner_ring_size": 3},
        "inner_ring_size=3 needs a ring that is made of smaller rings, but .*leaves a ring of 3",
    ),
    "double ring of two": (
        {"context_parallel_size": 2, "transport": "double_ring"},
        "transport='double_ring' needs a ring that is made of smaller rings, but .* leaves a ring of 2",
    ),
    "no chunk of heads": ({"head_chunks": 0}, "head_chunks=0 must be a whole number of at least 1"),
    "chunks of heads of one process": (
        {"ulysses_size": 1, "head_chunks": 4},
        "head_chunks=4 cuts the exchange of heads, but with context_parallel_size=1 and ulysses_size=1 no heads are",
    ),
    "chunks of heads without ulysses": (
        {"context_parallel_size": 4, "ulysses_size": 1, "head_chunks": 2},
        "head_chunks=2 cuts the exchange of heads, but with context_parallel_size=4 and ulysses_size=1 .*Set both to",
    ),
    "kernel": ({"kernel": "warp"}, "kernel='warp' is not known. Choose one of auto"),
    "dp_shard_size": ({"dp_shard_size": 0}, "dp_shard_size=0 must be a whole number of at least 1"),
    "size zero": ({"context_parallel_size": 0}, "context_parallel_size=0 must be a whole number of at least 1"),
}

ONES = torch.ones(2, 16, dtype=torch.long)


def holes():
    mask = ONES.clone()
    mask[1, 5] = 0
    return mask


def batch(**changes):
    plain = {"input_ids": ONES, "labels": ONES, **changes}
    return {key: value for key, value in plain.items() if value is not None}


BATCHES = {
    "targets of padding": (
        batch(attention_mask=torch.tensor([[1] * 14 + [0] * 2] * 2)),
        r"2 targets are to be predicted by padding \(attention_mask 0\).*labels\[attention_mask == 0\] = -100",
    ),
    "holes in the mask": (batch(attention_mask=holes()), "attention_mask has zeros between ones"),
    "4D mask": (batch(attention_mask=torch.ones(2, 1, 16, 16)), "attention_mask has 4 dims .shape .2, 1, 16, 16"),
    "3D mask": (batch(attention_mask=torch.ones(2, 16, 16)), "attention_mask has 3 dims"),
    "document ids in the mask": (batch(attention_mask=ONES * 2), "attention_mask holds the values .2.. Only 0"),
    "empty row": (batch(attention_mask=ONES * torch.tensor([[1], [0]])), "Row 1 of the batch has no token at all"),
    "mask of another length": (batch(attention_mask=ONES[:, :8]), "attention_mask has shape .2, 8."),
    "multimodal positions": (batch(position_ids=ONES.expand(3, 2, 16)), "multimodal RoPE"),
    "embeddings": (batch(inputs_embeds=torch.ones(2, 16, 8)), "inputs_embeds: only token ids can be sharded"),
    "images": (batch(pixel_values=torch.ones(2, 3)), "pixel_values: only token ids can be sharded"),
    "unknown tensor": (batch(token_type_ids=ONES), "token_type_ids, and it is not known how that is cut"),
    "no tokens": ({"labels": ONES}, "returned no input_ids"),
    "one label per row": (batch(labels=ONES[:, 0]), "labels has shape .2,. beside input_ids .2, 16."),
    "boundaries of several rows": (batch(cu_seq_lens_q=torch.tensor([0, 16])), "but the batch has 2 rows"),
    "boundaries that do not fit": (
        {"input_ids": ONES[:1], "cu_seq_lens_q": torch.tensor([0, 9, 30])},
        "does not describe a row of 16 tokens",
    ),
    "different boundaries of keys": (
        {"input_ids": ONES[:1], "cu_seq_lens_q": torch.tensor([0, 16]), "cu_seq_lens_k": torch.tensor([0, 8, 16])},
        "cu_seq_lens_q and cu_seq_lens_k differ",
    ),
}

PREFIXED = [{**row, "prefix_length": 5} for row in rows(16, 12)]
COLLATORS = {
    "left padding": ({"inner": LeftPadding()}, rows(16, 12), "left padding.*tokenizer.padding_side = 'right'"),
    "unknown column": ({}, [{**row, "text": "a"} for row in rows(16)], "default collator does not know text"),
    "no input_ids": ({}, [{"labels": [1] * 16}], "An example has no input_ids"),
    "parts of different length": ({}, [{"input_ids": [1] * 16, "labels": [1] * 9}], "differ in length"),
    "padding inside a pack": (
        {"packing": True},
        [{"input_ids": [1] * 16, "attention_mask": [1] * 9 + [0] * 7}],
        "carries padding",
    ),
    "column that would be overlooked": ({}, PREFIXED, "column prefix_length, which only counts with .*prefix_lm=True"),
    "no prefix": (
        {"prefix_lm": True},
        [PREFIXED[0], rows(12)[0]],
        "Example 1 of the batch has no prefix_length, but prefix_lm=True.*remove_unused_columns=False",
    ),
    "prefix that is no number": (
        {"prefix_lm": True},
        [{**rows(16)[0], "prefix_length": 2.5}],
        "prefix_length=2.5 of example 0 must be a whole number",
    ),
    "negative prefix": ({"prefix_lm": True}, [{**rows(16)[0], "prefix_length": -1}], "prefix_length=-1 of example 0"),
    "prefix longer than its row": (
        {"prefix_lm": True},
        [PREFIXED[0], {**rows(12)[0], "prefix_length": 13}],
        "prefix_length=13 of example 1 is more than its 12 tokens",
    ),
    "prefix longer than its document": (
        {"prefix_lm": True, "packing": True},
        [PREFIXED[0], {**rows(12)[0], "prefix_length": 13}],
        "prefix_length=13 of example 1 is more than its 12 tokens",
    ),
    "prefix of a row of documents": (
        {"prefix_lm": True},
        [{**rows(16)[0], "prefix_length": 5, "position_ids": [*range(6), *range(10)]}],
        "1 examples became 2 documents at other places",
    ),
    "prefixes of documents that are not the examples": (
        {"prefix_lm": True, "packing": True},
        [{**rows(8)[0], "prefix_length": 5, "position_ids": [*range(4), *range(4)]}] * 2,
        "2 examples became 4 documents at other places",
    ),
    "prefixes of rows that do not show their examples": (
        {"prefix_lm": True, "inner": TwoRows()},
        [*PREFIXED, *PREFIXED],
        "4 examples became 2 documents at other places",
    ),
    "different keys": ({}, [rows(16)[0], {"input_ids": [1] * 16, "shift_labels": [1] * 16}], "different keys"),
}

DESCRIPTION = ContextParallelMetadata(ShardedSequence("zigzag", 16, 2), "none", 0, RingOptions(), 16, None, "")

SHARDED = {METADATA_KEY: DESCRIPTION}
WHOLE = ContextParallelMetadata(ShardedSequence("zigzag", 8, 1, prefixes=((3,),)), "", 0, RingOptions(), 8, None, "")
CALLS = {
    "two-sided window": ({"is_causal": False, "sliding_window": 4}, "sliding_window=4 without a causal mask"),
    "sinks per query": ({"s_aux": torch.ones(4, 8)}, "s_aux .attention sinks. has shape .4, 8. for 4 query heads"),
    "another kind of sinks": ({"sinks": torch.ones(1, 4, 8, 1)}, "passes 'sinks', which changes the result"),
    "chunks that no layer claims": (
        {"module_config": {"attention_chunk_size": 4, "layer_types": None}},
        "attention_chunk_size=4, but LlamaAttention does not say whether it is one of the layers",
    ),
    "attention weights": ({"output_attentions": True}, "output_attentions=True needs the attention matrix"),
    "position bias": ({"position_bias": torch.ones(1)}, "passes 'position_bias', which changes the result"),
    "sparse indices": ({"indices": torch.ones(1)}, "passes 'indices', which changes the result"),
    "paged cache": ({"cache": object()}, "passes 'cache', which changes the result"),
    "heads that do not divide": ({"key": (1, 3, 8, 8)}, "4 query heads are not a multiple of 3 key/value heads"),
    "head dims of queries and keys": ({"key": (1, 2, 8, 16)}, "do not fit together"),
    "local 4D mask": ({"attention_mask": torch.ones(1, 1, 8, 8)}, "take a 2D padding mask of 8 tokens"),
    "local mask with holes": (
        {"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1, 1, 1]])},
        "attention mask has zeros between ones",
    ),
    "local dropout with softcap": ({"dropout": 0.1, "softcap": 50.0}, "dropout 0.1 with .*softcap or sinks"),
    "local dropout in a pack": (
        {"dropout": 0.1, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])},
        "attention dropout 0.1 with packed documents",
    ),
    "refused batch": ({METADATA_KEY: InvalidBatch("no good")}, "no good"),
    "other layout": (dict(backend="ring_striped", **SHARDED), "attends with 'ring_striped', but.*layout 'zigzag'"),
    "mask beside a shard": (dict(attention_mask=torch.ones(1, 8), **SHARDED), "reached a sharded sequence"),
    "padding beside a shard": (
        dict(attention_mask=torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]]), **SHARDED),
        "reached a sharded sequence",
    ),
    "documents beside a shard": (
        dict(attention_mask=torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2]]), **SHARDED),
        "reached a sharded sequence",
    ),
    "padding beside whole prefixes": (
        {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]]), METADATA_KEY: WHOLE},
        "reached a sharded sequence",
    ),
    "dropout on a shard": (dict(dropout=0.1, training=True, **SHARDED), "attention dropout 0.1 cannot equal one"),
    "cache beside a shard": (dict(key=(1, 2, 12, 8), **SHARDED), "8 queries meet 12 keys: a KV cache"),
    "length of the shard": (
        dict(query=(1, 4, 6, 8), key=(1, 2, 6, 8), **SHARDED),
        "got 6 tokens, but its zigzag shard of 16 tokens has 8",
    ),
    "dtype": (dict(dtype=torch.float16, **SHARDED), "no kernel for torch.float16 on cpu"),
}


BERT = {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def classifier():
    return LlamaForSequenceClassification(llama().config)


def encoder_decoder():
    return T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4))


def gpt2():
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, attn_implementation="ring_zigzag")
    config.attention_dropout = 0.0
    return GPT2LMHeadModel(config)


def mixtral(**changes):
    config = MixtralConfig(**SIZES, num_local_experts=2, attn_implementation="ring_zigzag", **changes)
    return MixtralForCausalLM(config)


def without_coefficient():
    model = mixtral(output_router_logits=True)
    del model.router_aux_loss_coef
    return model


def with_module(name, module):
    model = llama()
    setattr(model.model.layers[1].mlp, name, module)
    return model


def roberta():
    config = RobertaConfig(**BERT, is_decoder=True, attn_implementation="ring_zigzag")
    return RobertaForCausalLM(config)


def opt():
    config = OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4)
    config._attn_implementation = "ring_zigzag"
    return OPTForCausalLM(config)


def with_config(**changes):
    model = llama()
    for name, value in changes.items():
        setattr(model.config, name, value)
    return model


class NoKwargsForCausalLM(type(llama())):
    def forward(self, input_ids=None, labels=None):
        return super().forward(input_ids=input_ids, labels=labels)


MODELS = {
    "sdpa": (lambda: llama("sdpa"), "attn_implementation='sdpa' attends inside one shard only"),
    "encoder-decoder": (encoder_decoder, "is an encoder-decoder"),
    "linear attention": (lambda: with_config(layer_types=["full_attention", "linear_attention"]), "linear_attention"),
    "convolution": (lambda: with_config(layer_types=["conv", "full_attention"]), "layers of type conv"),
    "recurrent blocks": (lambda: with_config(layers_block_type=["mamba", "attention"]), "layers of type mamba"),
    "selected keys": (
        lambda: with_config(layer_types=["indexed_attention"] * 2),
        "by an index over the whole sequence",
    ),
    "summaries": (
        lambda: with_config(layer_types=["compressed_sparse_attention"] * 2),
        "attend to summaries of the whole sequence",
    ),
    "convolution in a layer": (
        lambda: with_module("mixer", torch.nn.Conv1d(4, 4, 3)),
        "has convolutions .layers.1.mlp.mixer., which look at neighbouring tokens",
    ),
    "own positions": (roberta, "counts positions by itself"),
    "refused type": (lambda: with_config(model_type="nemotron"), "does not hand keyword arguments to its attention"),
    "jitter": (lambda: mixtral(router_jitter_noise=0.1), "Random noise on the router is active .*jitter_noise=0.1"),
    "dropout by function": (opt, "dropout=0.1"),
    "another loss": (classifier, "does not use the causal language modelling loss"),
    "no kwargs": (lambda: NoKwargsForCausalLM(llama().config), r"NoKwargsForCausalLM.forward takes no \*\*kwargs"),
    "attention dropout": (lambda: with_config(attention_dropout=0.1), "attention_dropout=0.1 would draw"),
    "dropout modules": (gpt2, "dropout modules are active"),
    "dynamic RoPE": (
        lambda: with_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        "rope_type='dynamic' picks its frequencies by the largest position",
    ),
    "router loss": (without_coefficient, "output_router_logits=True adds an auxiliary loss"),
    "attention weights": (
        lambda: with_config(_output_attentions=True),
        "output_attentions=True needs the attention matrix",
    ),
}

ARGUMENTS = {
    "label smoothing": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
    "token average": ({"average_tokens_across_devices": False}, "average_tokens_across_devices=False weighs"),
    "rebalancing": ({"train_sampling_strategy": "batch_rebalance"}, 'train_sampling_strategy="batch_rebalance"'),
    "neftune": ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 adds noise"),
    "dispatching": ({"accelerator_config": {"dispatch_batches": True}}, '"dispatch_batches": False'),
    "uneven batches": ({"accelerator_config": {"even_batches": False}}, "even_batches=False"),
    "gathering objects": ({"eval_use_gather_object": True}, "eval_use_gather_object=True"),
    "inputs of batch metrics": (
        {"batch_eval_metrics": True, "include_for_metrics": ["inputs"]},
        "would hand shards to compute_metrics",
    ),
    "torch.compile": ({"torch_compile": True}, "torch_compile=True is not proven yet"),
}

SHARD = {"input_ids": ONES[:, :8], METADATA_KEY: DESCRIPTION}
PASSED = {
    "mask": ({"attention_mask": ONES}, "attention_mask was passed beside a sharded batch"),
    "cache": ({"past_key_values": object()}, "past_key_values was passed beside a sharded batch"),
    "embeddings": ({"inputs_embeds": ONES}, "inputs_embeds was passed beside a sharded batch"),
    "attention weights": ({"output_attentions": True}, "output_attentions=True"),
    "weights that nobody knows": ({"loss_weights": ONES}, "loss_weights, which Transformers' loss does not know"),
    "labels taken out": ({"shift_labels": ONES}, "shift_labels but its labels were taken out"),
    "cut tokens": ({"input_ids": ONES[:, :7]}, "got 7 tokens, but its zigzag shard of 16 tokens has 8"),
    "device": ({"input_ids": torch.ones(2, 8, device="meta")}, "Device meta is not supported"),
}

DISTRIBUTED = {
    "left_padding_on_rank_1": "rank 1: attention_mask has left padding",
    "short_rows_on_rank_1": "The ranks disagree about the batch",
    "other_rows_on_rank_1": "The ranks disagree about the batch (hash of its tokens, labels and documents)",
    "other_layout_on_rank_1": "rank 1: The model attends with 'ring_zigzag', but the batch was sharded for layout "
    "'striped'",
    "plain_collator_on_rank_1": "did not come from ContextParallelCollator",
    "generating_trainer": "predict_with_generate=True with compute_metrics generates from evaluation batches",
    "compiled_model": "The model is compiled (model.compile() or torch.compile, for LlamaForCausalLM)",
    "prompt_tuning": "puts virtual tokens in front of the sequence",
    "activated_lora": "'default' is an activated LoRA: it looks for its alora_invocation_tokens",
    "two_models_in_one": "holds 2 Transformers models (student, teacher)",
    "other_dtype_on_rank_1": "The ranks disagree about the model",
    "ignored_backend": "BloomForCausalLM does not pass its attention through Transformers' attention interface",
    "sdpa_layer": "has 2 layers, but called the attention function 1 times",
    "label_smoothing": "label_smoothing_factor=0.1",
    "label_smoothing_on_rank_1": "rank 1: label_smoothing_factor=0.1",
    "own_loss": "labels were taken out before the forward pass",
    "dispatched_stream": 'accelerator_config={"dispatch_batches": False}',
    "stream_is_fine_when_not_dispatched": "no error",
    "more_ranks_than_heads": "ulysses_size=2 deals 1 query heads to 2 ranks, but every rank needs at least one",
    "ulysses_of_another_size": "exchanges heads among all context_parallel_size=2 ranks, but ulysses_size=1",
    "other_levers_on_rank_1": "The ranks disagree about the levers on memory",
    "other_transport_on_rank_1": "The ranks disagree about the way sequences are split",
    "ulysses_collator_on_rank_1": "rank 1: The model attends with 'ring_contiguous', but the batch was sharded for "
    "layout 'contiguous', 2 ranks with ulysses_size=2",
    "wrong_world_size": "context_parallel_size=3 does not divide 2 processes. Set it to 1 or 2",
    "wrong_product": "context_parallel_size=2 * dp_replicate_size=2 = 4, but 2 processes were started",
    "shard_made_metric": "differs between ranks that share a sequence",
}
FOUR = {
    "double_ring_in_one_node": "takes the ranks of a node as inner ring, but LOCAL_WORLD_SIZE is",
    "evaluated_stream": "An evaluation dataset without a length cannot be split exactly over 2 replicas",
    "packed_predictions": "Predictions of packed rows cannot be put in order over 2 data-parallel replicas",
    "left_padding_on_rank_1": "rank 1: attention_mask has left padding",
}
