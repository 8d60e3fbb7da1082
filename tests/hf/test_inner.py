"""The default inner collator: examples without tokens, and values that are none."""

import pytest
import torch

from ring_hf.geometry import LAYOUTS
from ring_hf.hf import ContextParallelCollator
from ring_hf.hf.batch_metadata import METADATA_KEY, InvalidBatch
from ring_hf.hf.collate.default_collator import PadOrPackCollator
from tests.hf.models import llama, rank_of, rows

EMPTY = {"input_ids": [], "labels": []}
FULL = rows(9, 8, 7)


def packed(features):
    return PadOrPackCollator(packing=True)(features)


@pytest.mark.parametrize("places", [(0,), (1,), (3,), (0, 1, 2), (2, 2, 3)])
def test_an_example_without_tokens_adds_nothing_to_a_packed_row(places):
    features = list(FULL)
    for place in reversed(places):
        features.insert(place, EMPTY)
    batch, expected = packed(features), packed(FULL)
    assert set(batch) == set(expected) == {"input_ids", "labels", "position_ids"}
    for key, value in expected.items():
        assert torch.equal(batch[key], value), key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_of_a_packed_row_with_an_empty_example_are_those_without(layout):
    model = llama(f"ring_{layout}")
    collator = ContextParallelCollator(model, packing=True)
    for rank in range(2):
        with rank_of(2, rank):
            batch, expected = collator([FULL[0], EMPTY, *FULL[1:]]), collator(FULL)
        assert not isinstance(batch[METADATA_KEY], InvalidBatch)
        assert batch[METADATA_KEY].sequence == expected[METADATA_KEY].sequence
        assert batch[METADATA_KEY].fingerprint == expected[METADATA_KEY].fingerprint
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert torch.equal(batch["shift_labels"], expected["shift_labels"])


def test_a_padded_row_without_tokens_is_refused_where_the_row_is_shared():
    collator = ContextParallelCollator(llama("ring_zigzag"))
    with rank_of(2, 0):
        batch = collator([FULL[0], EMPTY])
    assert isinstance(batch[METADATA_KEY], InvalidBatch)
    assert "Row 1 of the batch has no token at all. Drop empty examples" in batch[METADATA_KEY].message


@pytest.mark.parametrize("packing", [False, True])
def test_a_batch_without_any_token_is_refused(packing):
    with pytest.raises(ValueError, match=r"None of the 2 examples of the batch has a token. Drop empty examples"):
        PadOrPackCollator(packing)([EMPTY, EMPTY])


@pytest.mark.parametrize("value", [None, "text", [1, None], [[1], [2, 3]], [{"a": 1}]])
def test_values_that_are_no_numbers_are_named(value):
    with pytest.raises(ValueError, match=r"Example 1 of the batch: labels is no list of numbers, one per token, but "):
        PadOrPackCollator()([FULL[0], {"input_ids": [1, 2], "labels": value}])
