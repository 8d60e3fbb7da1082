"""The collator: labels are shifted before rows are cut, metadata holds documents and padding, inner collators work."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    LlamaConfig,
    PreTrainedTokenizerFast,
    default_data_collator,
)

from ring_hf.geometry import LAYOUTS, padded_length
from ring_hf.hf import ContextParallelCollator
from ring_hf.hf.attention.backend import key_sums
from ring_hf.hf.batch_metadata import METADATA_KEY
from ring_hf.hf.documents import documents_from_position_ids, shift_left, shift_right
from ring_hf.memory import apply
from ring_hf.parallel import join
from tests.hf.models import SIZES, llama, rank_of, rows

TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel({f"w{n}": n for n in range(64)}, unk_token="w0")), pad_token="w0"
)


def config(layout="zigzag"):
    return LlamaConfig(**SIZES, attn_implementation=f"ring_{layout}")


def shards(layout, num_ranks, features, ulysses=None, **settings):
    """Return the batches of all ranks."""
    batches = []
    for rank in range(num_ranks):
        with rank_of(num_ranks, rank, ulysses_size=ulysses):
            batches.append(ContextParallelCollator(config(layout), **settings)(features))
    return batches


def join_shards(batches, key):
    """Return the whole rows of a key of the batch."""
    sequence = batches[0][METADATA_KEY].sequence
    return join([batch[key] for batch in batches], [sequence.segments(rank) for rank in range(len(batches))], 1)


@pytest.mark.parametrize(("num_ranks", "ulysses"), [(2, 1), (3, 1), (4, 1), (2, 2), (4, 2), (6, 3)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_labels_are_shifted_over_the_whole_row_and_nothing_is_lost(layout, num_ranks, ulysses):
    features = rows(17, 23, 20)
    batches = shards(layout, num_ranks, features, ulysses)
    length = padded_length(layout, 23, num_ranks, ulysses)
    tokens, labels = join_shards(batches, "input_ids"), join_shards(batches, "labels")
    shifted = join_shards(batches, "shift_labels")
    assert tokens.shape == labels.shape == shifted.shape == (3, length)
    for row, feature in enumerate(features):
        num_tokens = len(feature["input_ids"])
        assert tokens[row, :num_tokens].tolist() == feature["input_ids"]
        assert labels[row, :num_tokens].tolist() == feature["labels"]
        assert shifted[row, : num_tokens - 1].tolist() == feature["labels"][1:]
        assert (labels[row, num_tokens:] == -100).all() and (shifted[row, num_tokens - 1 :] == -100).all()
    sequence = batches[0][METADATA_KEY].sequence
    assert sequence.num_tokens == (17, 23, 20) and sequence.documents is None and sequence.length == length
    assert (sequence.num_ranks, sequence.ulysses) == (num_ranks, ulysses)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_are_global_and_small_in_the_padding(layout):
    batches = shards(layout, 4, rows(21, 21))
    positions = join_shards(batches, "position_ids")
    assert positions[:, :21].tolist() == [list(range(21))] * 2
    assert positions[:, 21:].tolist() == [list(range(3))] * 2
    assert batches[0][METADATA_KEY].sequence.num_tokens == (21, 21) and batches[0][METADATA_KEY].unpadded_length == 21


def test_ranks_of_a_group_have_equal_metadata_and_other_data_differs():
    batches = shards("zigzag", 2, rows(16, 16))
    assert batches[0][METADATA_KEY].fingerprint == batches[1][METADATA_KEY].fingerprint
    assert batches[0][METADATA_KEY].sequence == batches[1][METADATA_KEY].sequence
    assert (
        shards("zigzag", 2, rows(16, 16, seed=1))[0][METADATA_KEY].fingerprint != batches[0][METADATA_KEY].fingerprint
    )


def test_tensors_that_the_metadata_replaces_are_dropped():
    batch = shards("zigzag", 2, rows(13, 16))[0]
    assert set(batch) == {"input_ids", "position_ids", "labels", "shift_labels", METADATA_KEY}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packing_flattens_examples_into_documents(layout):
    batches = shards(layout, 2, rows(5, 9, 8), packing=True)
    metadata = batches[0][METADATA_KEY]
    length = padded_length(layout, 22, 2)
    tail = (length,) if length > 22 else ()
    assert metadata.sequence.documents == ((0, 5, 14, 22, *tail),)
    assert metadata.examples == (0, 5, 14, 22)
    labels = join_shards(batches, "labels")
    assert [index for index in range(22) if labels[0, index] == -100] == [0, 5, 14]
    assert join_shards(batches, "position_ids")[0, :22].tolist() == [*range(5), *range(9), *range(8)]


@pytest.mark.parametrize(("num_ranks", "ulysses"), [(2, 1), (4, 1), (4, 2)])
def test_balanced_shards_follow_the_documents_and_lose_nothing(num_ranks, ulysses):
    features = rows(40, 3, 70, 9, 128, 6)
    batches = shards("balanced", num_ranks, features, ulysses, packing=True)
    tokens = [token for feature in features for token in feature["input_ids"]]
    assert join_shards(batches, "input_ids")[0, :256].tolist() == tokens
    assert join_shards(batches, "position_ids")[0, :43].tolist() == [*range(40), *range(3)]
    assert all(
        batch["input_ids"].shape[1] == batch[METADATA_KEY].shard_length == 256 // num_ranks for batch in batches
    )
    sequence = batches[0][METADATA_KEY].sequence
    one_document = shards("balanced", num_ranks, rows(256), ulysses)[0][METADATA_KEY].sequence
    assert any(sequence.segments(rank) != one_document.segments(rank) for rank in range(num_ranks))


def test_metadata_carries_transport_and_inner_ring():
    with rank_of(4, 1, transport="double_ring", inner_ring_size=2):
        batch = ContextParallelCollator(config("zigzag"))(rows(16))
    metadata = batch[METADATA_KEY]
    assert (metadata.options.transport, metadata.options.inner_ring_size, metadata.rank) == ("double_ring", 2, 1)


def test_metadata_carries_head_chunks():
    with rank_of(4, 1, ulysses_size=2, head_chunks=2):
        batch = ContextParallelCollator(config("zigzag"))(rows(16))
    assert batch[METADATA_KEY].options.head_chunks == 2 and batch[METADATA_KEY].sequence.ulysses == 2


def test_flattening_collators_equal_the_default_packing():
    features = rows(5, 9, 8)
    default_batches = shards("zigzag", 2, features, packing=True)
    for inner in (
        DataCollatorWithFlattening(),
        DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True),
        DataCollatorWithFlattening(return_position_ids=False, return_flash_attn_kwargs=True),
    ):
        batches = shards("zigzag", 2, features, inner=inner)
        assert batches[0][METADATA_KEY].sequence == default_batches[0][METADATA_KEY].sequence
        for key in ("input_ids", "labels", "shift_labels"):
            assert torch.equal(join_shards(batches, key), join_shards(default_batches, key)), key


@pytest.mark.parametrize(
    "inner",
    [
        DataCollatorForLanguageModeling(TOKENIZER, mlm=False),
        DataCollatorForLanguageModeling(TOKENIZER, mlm=False, pad_to_multiple_of=8),
        DataCollatorForSeq2Seq(TOKENIZER),
    ],
    ids=["language-modeling", "language-modeling-multiple", "seq2seq"],
)
def test_padding_collators_of_transformers(inner):
    features = rows(13, 20)
    if isinstance(inner, DataCollatorForLanguageModeling):
        features = [{"input_ids": row["input_ids"]} for row in features]
    plain = inner([dict(row) for row in features])
    batches = shards("zigzag", 2, features, inner=inner)
    length = plain["input_ids"].shape[1]
    assert (
        batches[0][METADATA_KEY].sequence.num_tokens == (13, 20) and batches[0][METADATA_KEY].unpadded_length == length
    )
    assert torch.equal(join_shards(batches, "input_ids")[:, :length], plain["input_ids"])
    assert torch.equal(join_shards(batches, "labels")[:, :length], plain["labels"])
    assert torch.equal(join_shards(batches, "shift_labels")[:, : length - 1], plain["labels"][:, 1:])


def test_default_data_collator_of_equal_rows():
    features = [{**row, "attention_mask": [1] * 16} for row in rows(16, 16)]
    batches = shards("striped", 2, features, inner=default_data_collator)
    assert batches[0][METADATA_KEY].sequence.num_tokens is None
    assert join_shards(batches, "labels").tolist() == [row["labels"] for row in features]


def test_given_shift_labels_are_kept_and_labels_derived():
    features = rows(16)
    shifted = [7] * 15 + [-100]
    batches = shards("zigzag", 2, [{"input_ids": features[0]["input_ids"], "shift_labels": shifted}])
    assert join_shards(batches, "shift_labels").tolist() == [shifted]
    assert join_shards(batches, "labels").tolist() == [[-100] + [7] * 15]


@pytest.mark.parametrize("shifted", [False, True], ids=["labels", "shift_labels"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_loss_weights_stay_with_their_targets(packing, shifted):
    """Each weight is computed from its label, and still matches it after shifting, padding and cutting."""
    features = rows(17, 23)
    for feature in features:
        labels = feature["labels"]
        if shifted:
            feature["shift_labels"] = labels = [*feature.pop("labels")[1:], -100]
        feature["loss_weights"] = [label / 128 for label in labels]
    batches = shards("zigzag", 3, features, packing=packing)
    targets, weights = join_shards(batches, "shift_labels"), join_shards(batches, "loss_weights")
    is_target = targets != -100
    assert is_target.sum() == 38 and weights.shape == targets.shape
    assert torch.equal(weights[is_target], targets[is_target] / 128)


def test_one_process_refuses_loss_weights_that_its_model_ignores():
    model, features = llama(), rows(17)
    features[0]["loss_weights"] = [1.0] * 17
    with pytest.raises(ValueError, match="loss_weights, which Transformers' loss ignores"):
        ContextParallelCollator(model)(features)
    apply(model, attention="none", ffn_block=None, loss_block=8)
    assert ContextParallelCollator(model)(features)["loss_weights"].tolist() == [[1.0] * 17]


def test_prepacked_rows_keep_their_documents_with_and_without_mask():
    packed = [{**row, "position_ids": [*range(6), *range(10)]} for row in rows(16, 16)]
    masked = [{**row, "attention_mask": [1] * 16} for row in packed]
    for features in (packed, masked):
        metadata = shards("zigzag", 2, features)[0][METADATA_KEY]
        assert metadata.sequence.documents == ((0, 6, 16), (0, 6, 16)) and metadata.examples is None


def test_skipping_positions_start_a_document_only_without_mask():
    skipping = torch.tensor([[0, 1, 2, 10, 11]])
    assert documents_from_position_ids(skipping) == ((0, 3, 5),)
    assert documents_from_position_ids(skipping, skips_start_documents=False) is None
    assert documents_from_position_ids(torch.tensor([[0, 1, 2, 0, 0]]), num_tokens=(3,)) is None


def test_shifting_back_and_forth_loses_only_the_first_label():
    labels = torch.arange(10)[None]
    assert torch.equal(shift_right(shift_left(labels))[:, 1:], labels[:, 1:])


def test_a_batch_without_labels_stays_without():
    inner = DataCollatorForSeq2Seq(TOKENIZER)
    batch = shards("zigzag", 2, [{"input_ids": row["input_ids"]} for row in rows(16, 16)], inner=inner)[0]
    assert set(batch) == {"input_ids", "position_ids", METADATA_KEY}


def test_one_process_gets_the_unchanged_inner_batch():
    features = rows(5, 9)
    collator = ContextParallelCollator(config())
    plain = collator.inner(features)
    for batch in (collator(features), _with_size_one(collator, features)):
        assert batch.keys() == plain.keys() and all(torch.equal(batch[key], plain[key]) for key in plain)


def _with_size_one(collator, features):
    with rank_of(1, 0):
        return collator(features)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers_get_the_process_context(method):
    features = rows(16, 16, 16, 16)
    with rank_of(2, 1):
        collator = ContextParallelCollator(config())
        expected_batches = list(DataLoader(features, batch_size=2, collate_fn=collator))
        loader = DataLoader(features, batch_size=2, collate_fn=collator, num_workers=1, multiprocessing_context=method)
        worker_batches = list(loader)
    assert len(expected_batches) == len(worker_batches) == 2
    for expected, batch in zip(expected_batches, worker_batches, strict=True):
        assert batch[METADATA_KEY] == expected[METADATA_KEY] and batch[METADATA_KEY].rank == 1
        assert all(torch.equal(batch[key], expected[key]) for key in expected if key != METADATA_KEY)


def test_one_process_sees_the_documents_of_padded_rows():
    """Transformers looks for packed documents only in batches without a mask."""
    rows = [[3, 5], [4]]  # lengths of the documents of each row
    features = [
        {"input_ids": list(range(1, sum(row) + 1)), "position_ids": [i for n in row for i in range(n)]} for row in rows
    ]
    for attention in ("sdpa", "ring_zigzag"):
        model = llama(attention).eval()
        batch = ContextParallelCollator(model)(features)
        assert "attention_mask" not in batch
        assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 0, 1, 2, 3]]
        logits = model(**batch, use_cache=False).logits
        for row, (lengths, feature) in enumerate(zip(rows, features, strict=True)):
            start = 0
            for length in lengths:
                alone = model(input_ids=torch.tensor([feature["input_ids"][start : start + length]])).logits[0]
                assert torch.allclose(logits[row, start : start + length], alone, atol=1e-5)
                start += length
    assert "attention_mask" in ContextParallelCollator(model)([{"input_ids": [1, 2]}, {"input_ids": [3]}])
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="Packed rows with padding and output_router_logits=True in one process"):
        ContextParallelCollator(model)(features)


def test_training_in_one_process_keeps_nothing_of_a_pass():
    model = llama("ring_zigzag").train()
    examples = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4], "prefix_length": 2}] * 2
    batch = ContextParallelCollator(model, prefix_lm=True)(examples)  # with metadata, which other batches lack here
    for _ in range(2):
        model(**batch, use_cache=False)
    assert METADATA_KEY in batch and key_sums.sums == []
