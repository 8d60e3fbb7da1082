"""Batches, examples and arguments of calls that must be refused, and the error messages: see `Refusal`."""

import torch

from ring_hf.geometry import RingOptions, ShardedSequence
from ring_hf.hf.batch_metadata import METADATA_KEY, ContextParallelMetadata, InvalidBatch
from tests.hf.faults import LeftPadding, TwoRows
from tests.hf.models import rows
from tests.hf.refusal_tables import Refusal

ONES = torch.ones(2, 16, dtype=torch.long)


def mask_with_hole():
    mask = ONES.clone()
    mask[1, 5] = 0
    return mask


def batch(**changes):
    return {"input_ids": ONES, "labels": ONES, **changes}


# Batches that an inner collator returns.
BATCHES: dict[str, Refusal] = {
    "targets of padding": Refusal(
        kwargs=batch(attention_mask=torch.tensor([[1] * 14 + [0] * 2] * 2)),
        message=r"2 targets would be predicted from padding \(attention_mask 0\).*labels.attention_mask == 0. = -100",
    ),
    "holes in the mask": Refusal(
        kwargs=batch(attention_mask=mask_with_hole()), message="attention_mask has zeros between ones"
    ),
    "4D mask": Refusal(
        kwargs=batch(attention_mask=torch.ones(2, 1, 16, 16)),
        message="attention_mask has 4 dims .shape .2, 1, 16, 16",
    ),
    "3D mask": Refusal(kwargs=batch(attention_mask=torch.ones(2, 16, 16)), message="attention_mask has 3 dims"),
    "document ids in the mask": Refusal(
        kwargs=batch(attention_mask=ONES * 2), message="attention_mask contains the values .2.. Only 0"
    ),
    "empty row": Refusal(
        kwargs=batch(attention_mask=ONES * torch.tensor([[1], [0]])), message="Row 1 of the batch contains no tokens"
    ),
    "mask of another length": Refusal(
        kwargs=batch(attention_mask=ONES[:, :8]), message="attention_mask has shape .2, 8."
    ),
    "multimodal positions": Refusal(kwargs=batch(position_ids=ONES.expand(3, 2, 16)), message="multimodal RoPE"),
    "embeddings": Refusal(
        kwargs=batch(inputs_embeds=torch.ones(2, 16, 8)), message="inputs_embeds: only token ids can be sharded"
    ),
    "images": Refusal(
        kwargs=batch(pixel_values=torch.ones(2, 3)), message="pixel_values: only token ids can be sharded"
    ),
    "unknown tensor": Refusal(
        kwargs=batch(token_type_ids=ONES),
        message="token_type_ids, which ContextParallelCollator does not know how to shard",
    ),
    "no tokens": Refusal(kwargs={"labels": ONES}, message="returned no input_ids"),
    "one label per row": Refusal(
        kwargs=batch(labels=ONES[:, 0]), message="labels has shape .2,., but input_ids has shape .2, 16."
    ),
    "boundaries of several rows": Refusal(
        kwargs=batch(cu_seq_lens_q=torch.tensor([0, 16])), message="but the batch has 2 rows"
    ),
    "boundaries that do not fit": Refusal(
        kwargs={"input_ids": ONES[:1], "cu_seq_lens_q": torch.tensor([0, 9, 30])},
        message="does not describe a row of 16 tokens",
    ),
    "different boundaries of keys": Refusal(
        kwargs={
            "input_ids": ONES[:1],
            "cu_seq_lens_q": torch.tensor([0, 16]),
            "cu_seq_lens_k": torch.tensor([0, 8, 16]),
        },
        message="cu_seq_lens_q and cu_seq_lens_k differ, but must be equal",
    ),
}

EXAMPLES_WITH_PREFIX = [{**row, "prefix_length": 5} for row in rows(16, 12)]
# Arguments of `ContextParallelCollator`, and the examples to collate.
COLLATORS: dict[str, Refusal] = {
    "left padding": Refusal(
        kwargs={"inner": LeftPadding()},
        examples=rows(16, 12),
        message="left padding.*tokenizer.padding_side = 'right'",
    ),
    "unknown column": Refusal(
        examples=[{**row, "text": "a"} for row in rows(16)], message="default collator does not know text"
    ),
    "no input_ids": Refusal(examples=[{"labels": [1] * 16}], message="An example has no input_ids"),
    "parts of different length": Refusal(
        examples=[{"input_ids": [1] * 16, "labels": [1] * 9}], message="differ in length"
    ),
    "padding inside a pack": Refusal(
        kwargs={"packing": True},
        examples=[{"input_ids": [1] * 16, "attention_mask": [1] * 9 + [0] * 7}],
        message="contains padding .zeros in attention_mask., but packing=True",
    ),
    "ignored prefix column": Refusal(
        examples=EXAMPLES_WITH_PREFIX, message="column prefix_length, which has an effect only with .*prefix_lm=True"
    ),
    "no prefix": Refusal(
        kwargs={"prefix_lm": True},
        examples=[EXAMPLES_WITH_PREFIX[0], rows(12)[0]],
        message="Example 1 of the batch has no prefix_length, but prefix_lm=True.*remove_unused_columns=False",
    ),
    "prefix that is no number": Refusal(
        kwargs={"prefix_lm": True},
        examples=[{**rows(16)[0], "prefix_length": 2.5}],
        message="prefix_length=2.5 of example 0 must be a whole number",
    ),
    "negative prefix": Refusal(
        kwargs={"prefix_lm": True},
        examples=[{**rows(16)[0], "prefix_length": -1}],
        message="prefix_length=-1 of example 0",
    ),
    "prefix longer than its row": Refusal(
        kwargs={"prefix_lm": True},
        examples=[EXAMPLES_WITH_PREFIX[0], {**rows(12)[0], "prefix_length": 13}],
        message="prefix_length=13 of example 1 is more than its 12 tokens",
    ),
    "prefix longer than its document": Refusal(
        kwargs={"prefix_lm": True, "packing": True},
        examples=[EXAMPLES_WITH_PREFIX[0], {**rows(12)[0], "prefix_length": 13}],
        message="prefix_length=13 of example 1 is more than its 12 tokens",
    ),
    "prefix of a row of documents": Refusal(
        kwargs={"prefix_lm": True},
        examples=[{**rows(16)[0], "prefix_length": 5, "position_ids": [*range(6), *range(10)]}],
        message="2 documents of the batch do not start where its 1 examples do",
    ),
    "prefixes of documents that are not the examples": Refusal(
        kwargs={"prefix_lm": True, "packing": True},
        examples=[{**rows(8)[0], "prefix_length": 5, "position_ids": [*range(4), *range(4)]}] * 2,
        message="4 documents of the batch do not start where its 2 examples do",
    ),
    "prefixes of rows that are not the examples": Refusal(
        kwargs={"prefix_lm": True, "inner": TwoRows()},
        examples=[*EXAMPLES_WITH_PREFIX, *EXAMPLES_WITH_PREFIX],
        message="2 documents of the batch do not start where its 4 examples do",
    ),
    "different keys": Refusal(
        examples=[rows(16)[0], {"input_ids": [1] * 16, "shift_labels": [1] * 16}], message="different keys"
    ),
}

SHARD_METADATA = ContextParallelMetadata(
    ShardedSequence("zigzag", 16, 2), "none", 0, RingOptions(ulysses_size=1), 16, None, ""
)
SHARDED = {METADATA_KEY: SHARD_METADATA}
WHOLE_METADATA = ContextParallelMetadata(
    ShardedSequence("zigzag", 8, 1, prefixes=((3,),)), "", 0, RingOptions(), 8, None, ""
)
# Arguments of `call` in `test_refusals.py`, which calls the attention function.
CALLS: dict[str, Refusal] = {
    "two-sided window": Refusal(
        kwargs={"is_causal": False, "sliding_window": 4}, message="sliding_window=4 without a causal mask"
    ),
    "sinks per query": Refusal(
        kwargs={"s_aux": torch.ones(4, 8)}, message="s_aux .attention sinks. has shape .4, 8. for 4 query heads"
    ),
    "another kind of sinks": Refusal(
        kwargs={"sinks": torch.ones(1, 4, 8, 1)}, message="passes 'sinks', which changes the result"
    ),
    "attention chunks without layer types": Refusal(
        kwargs={"module_config": {"attention_chunk_size": 4, "layer_types": None}},
        message="attention_chunk_size=4, but LlamaAttention does not say whether it is one of the layers",
    ),
    "attention weights": Refusal(
        kwargs={"output_attentions": True}, message="output_attentions=True needs the attention matrix"
    ),
    "position bias": Refusal(
        kwargs={"position_bias": torch.ones(1)}, message="passes 'position_bias', which changes the result"
    ),
    "sparse indices": Refusal(kwargs={"indices": torch.ones(1)}, message="passes 'indices', which changes the result"),
    "paged cache": Refusal(kwargs={"cache": object()}, message="passes 'cache', which changes the result"),
    "heads that do not divide": Refusal(
        kwargs={"key": (1, 3, 8, 8)}, message="4 query heads are not a multiple of 3 key/value heads"
    ),
    "head dims of queries and keys": Refusal(kwargs={"key": (1, 2, 8, 16)}, message="do not fit together"),
    "local 4D mask": Refusal(
        kwargs={"attention_mask": torch.ones(1, 1, 8, 8)}, message="take a 2D padding mask of 8 tokens"
    ),
    "local mask with holes": Refusal(
        kwargs={"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1, 1, 1]])},
        message="attention mask has zeros between ones",
    ),
    "local dropout with softcap": Refusal(
        kwargs={"dropout": 0.1, "softcap": 50.0}, message="dropout 0.1 with .*softcap or sinks"
    ),
    "local dropout in a pack": Refusal(
        kwargs={"dropout": 0.1, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])},
        message="attention dropout 0.1 with packed documents",
    ),
    "refused batch": Refusal(kwargs={METADATA_KEY: InvalidBatch("no good")}, message="no good"),
    "other layout": Refusal(
        kwargs=dict(backend="ring_striped", **SHARDED), message="attends with 'ring_striped', but.*layout 'zigzag'"
    ),
    "mask with a shard": Refusal(
        kwargs=dict(attention_mask=torch.ones(1, 8), **SHARDED), message="reached a sharded sequence"
    ),
    "padding with a shard": Refusal(
        kwargs=dict(attention_mask=torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]]), **SHARDED),
        message="reached a sharded sequence",
    ),
    "documents with a shard": Refusal(
        kwargs=dict(attention_mask=torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2]]), **SHARDED),
        message="reached a sharded sequence",
    ),
    "padding with whole prefixes": Refusal(
        kwargs={"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]]), METADATA_KEY: WHOLE_METADATA},
        message="reached a sharded sequence",
    ),
    "dropout on a shard": Refusal(
        kwargs=dict(dropout=0.1, training=True, **SHARDED), message="attention dropout 0.1 cannot equal one"
    ),
    "cache with a shard": Refusal(
        kwargs=dict(key=(1, 2, 12, 8), **SHARDED), message="8 queries meet 12 keys: a KV cache"
    ),
    "length of the shard": Refusal(
        kwargs=dict(query=(1, 4, 6, 8), key=(1, 2, 6, 8), **SHARDED),
        message="got 6 tokens, but its zigzag shard of 16 tokens has 8",
    ),
    "dtype": Refusal(kwargs=dict(dtype=torch.float16, **SHARDED), message="no kernel for torch.float16 on cpu"),
}


SHARD = {"input_ids": ONES[:, :8], METADATA_KEY: SHARD_METADATA}
# Arguments of a forward pass, which replace or extend those of `SHARD`.
FORWARD_ARGUMENTS: dict[str, Refusal] = {
    "mask": Refusal(kwargs={"attention_mask": ONES}, message="attention_mask reached a sharded sequence"),
    "cache": Refusal(kwargs={"past_key_values": object()}, message="past_key_values was passed with a sharded batch"),
    "cache by its new name": Refusal(kwargs={"cache": object()}, message="cache was passed with a sharded batch"),
    "embeddings": Refusal(kwargs={"inputs_embeds": ONES}, message="inputs_embeds was passed with a sharded batch"),
    "attention weights": Refusal(kwargs={"output_attentions": True}, message="output_attentions=True"),
    "loss weights without a loss in blocks": Refusal(
        kwargs={"loss_weights": ONES}, message="loss_weights, which Transformers' loss ignores"
    ),
    "labels removed": Refusal(kwargs={"shift_labels": ONES}, message="shift_labels, but labels were removed"),
    "cut tokens": Refusal(
        kwargs={"input_ids": ONES[:, :7]}, message="got 7 tokens, but its zigzag shard of 16 tokens has 8"
    ),
    "device": Refusal(kwargs={"input_ids": torch.ones(2, 8, device="meta")}, message="Device meta is not supported"),
}
