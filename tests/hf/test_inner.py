"""The default inner collator: examples without tokens, and values that are not numbers."""

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


@pytest.mark.parametrize("indices", [(0,), (1,), (3,), (0, 1, 2), (2, 2, 3)])
def test_an_example_without_tokens_adds_nothing_to_a_packed_row(indices):
    features = list(FULL)
    for index in reversed(indices):
        features.insert(index, EMPTY)
    batch, expected = packed(features), packed(FULL)
    assert set(batch) == set(expected) == {"input_ids", "labels", "position_ids"}
    for key, value in expected.items():
        assert torch.equal(batch[key], value), key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_example_does_not_change_shards_of_a_packed_row(layout):
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


def test_padded_row_without_tokens_is_refused_if_shared():
    collator = ContextParallelCollator(llama("ring_zigzag"))
    with rank_of(2, 0):
        batch = collator([FULL[0], EMPTY])
    assert isinstance(batch[METADATA_KEY], InvalidBatch)
    assert "Row 1 of the batch contains no tokens. Drop empty examples" in batch[METADATA_KEY].message


@pytest.mark.parametrize("packing", [False, True])
def test_a_batch_without_any_token_is_refused(packing):
    with pytest.raises(ValueError, match=r"None of the 2 examples of the batch contains a token. Drop empty examples"):
        PadOrPackCollator(packing)([EMPTY, EMPTY])


@pytest.mark.parametrize("value", [None, "text", [1, None], [[1], [2, 3]], [{"a": 1}]])
def test_error_names_the_column_without_numbers(value):
    with pytest.raises(
        ValueError, match=r"Example 1 of the batch: labels must be a list of numbers, one per token, but is "
    ):
        PadOrPackCollator()([FULL[0], {"input_ids": [1, 2], "labels": value}])
