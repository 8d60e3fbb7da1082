"""Packing puts every token into exactly one sequence, whatever the lengths."""

import itertools

import numpy as np
import pytest
from datasets import Dataset, Features
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_hf.data import PACKINGS, pack_best_fit, pack_documents, pack_separate, pack_stream
from ring_hf.data.tokens import COLUMNS

LENGTHS = st.lists(st.integers(0, 40), max_size=30)


@pytest.mark.parametrize("packing", PACKINGS)
@settings(max_examples=300)
@given(num_tokens=LENGTHS, length=st.integers(1, 24))
def test_every_token_is_in_exactly_one_sequence(packing, num_tokens, length):
    sequences = PACKINGS[packing](num_tokens, length)
    tokens = [(span.document, token) for row in sequences for span in row for token in range(span.start, span.stop)]
    assert sorted(tokens) == [(document, token) for document, n in enumerate(num_tokens) for token in range(n)]
    assert all(0 < sum(map(len, row)) <= length and all(len(span) for span in row) for row in sequences)


@settings(max_examples=300)
@given(num_tokens=LENGTHS, length=st.integers(1, 24))
def test_stream_keeps_the_order_and_fills_all_sequences_but_the_last(num_tokens, length):
    sequences = pack_stream(num_tokens, length)
    spans = list(itertools.chain(*sequences))
    assert spans == sorted(spans, key=lambda span: (span.document, span.start))
    assert all(sum(map(len, row)) == length for row in sequences[:-1])


@settings(max_examples=300)
@given(num_tokens=LENGTHS, length=st.integers(1, 24))
def test_best_fit_cuts_only_documents_that_are_too_long_and_wastes_little(num_tokens, length):
    sequences = pack_best_fit(num_tokens, length)
    uncut = {span.document for row in sequences for span in row if len(span) == num_tokens[span.document]}
    assert uncut == {document for document, n in enumerate(num_tokens) if 0 < n <= length}
    # Two sequences that are at most half full would have been one.
    assert sum(2 * sum(map(len, row)) <= length for row in sequences) <= 1


@settings(max_examples=300)
@given(num_tokens=LENGTHS, length=st.integers(1, 24))
def test_separate_puts_one_span_into_each_sequence(num_tokens, length):
    sequences = pack_separate(num_tokens, length)
    assert all(len(row) == 1 for row in sequences)
    assert len(sequences) == sum(-(-n // length) for n in num_tokens)


def documents(*lengths):
    start = np.cumsum([0, *lengths])
    return Dataset.from_dict({"input_ids": [list(range(a, b)) for a, b in itertools.pairwise(start.tolist())]})


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("mask_boundaries", [True, False])
def test_packed_rows_carry_positions_that_restart_and_labels(packing, mask_boundaries):
    tokens = documents(5, 23, 1, 8, 0, 9)
    packed = pack_documents(tokens, length=10, packing=packing, mask_boundaries=mask_boundaries)
    rows = list(packed.with_format(None))
    assert sorted(token for row in rows for token in row["input_ids"]) == list(range(46))
    for row in rows:
        assert len(row["input_ids"]) == len(row["position_ids"]) == len(row["labels"]) <= 10
        assert row["position_ids"][0] == 0
        for i, (token, position, label) in enumerate(zip(*row.values(), strict=True)):
            is_continued = position > 0
            if is_continued:
                assert (row["input_ids"][i - 1], row["position_ids"][i - 1]) == (token - 1, position - 1)
            assert label == (token if is_continued or not mask_boundaries else -100)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("mask_boundaries", [True, False])
@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(1, 25), st.booleans(), st.booleans()), min_size=1, max_size=8))
def test_labels_and_loss_weights_travel_with_their_tokens(packing, mask_boundaries, rows):
    """Token 7 * i of the corpus has the label -100 or 7 * i + 1 and the weight i / 8, unless its document has none."""
    columns = {"input_ids": [], "labels": [], "loss_weights": []}
    start = 0
    for length, has_labels, has_weights in rows:
        tokens = range(start, start + length)
        columns["input_ids"].append([7 * i for i in tokens])
        columns["labels"].append([-100 if i % 3 == 0 else 7 * i + 1 for i in tokens] if has_labels else None)
        columns["loss_weights"].append([i / 8 for i in tokens] if has_weights else None)
        start += length
    expected = {}
    for ids, labels, weights in zip(*columns.values(), strict=True):
        expected |= dict(zip(ids, zip(labels or ids, weights or [1.0] * len(ids), strict=True), strict=True))
    dataset = Dataset.from_dict(columns, features=Features(COLUMNS))
    packed = pack_documents(dataset, 10, packing, mask_boundaries).with_format(None)
    num_seen = 0
    for row in packed:
        for token, position, label, weight in zip(
            *(row[name] for name in ("input_ids", "position_ids", "labels", "loss_weights")), strict=True
        ):
            want_label, want_weight = expected[token]
            assert (label, weight) == (-100 if mask_boundaries and position == 0 else want_label, want_weight)
            num_seen += 1
    assert num_seen == start


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_without_a_mask_positions_run_through_the_sequence(packing):
    tokens = documents(5, 23, 1, 8, 9)
    masked, open_rows = (
        list(pack_documents(tokens, 10, packing, attend_across_documents=across).with_format(None))
        for across in (False, True)
    )
    assert any(0 in row["position_ids"][1:] for row in masked)
    for row, other in zip(open_rows, masked, strict=True):
        assert row["position_ids"] == list(range(len(row["input_ids"])))
        assert (row["input_ids"], row["labels"]) == (other["input_ids"], other["labels"])


def test_packing_is_computed_once_and_cached():
    tokens = documents(5, 23, 8)
    first, again, other = (pack_documents(tokens, length=length) for length in (10, 10, 12))
    assert first.cache_files == again.cache_files != other.cache_files
    assert first.with_format(None)[:] == again.with_format(None)[:]


def test_spans_are_packed_instead_of_documents_and_cached():
    tokens = documents(5, 23, 8)
    spans = np.array([[1, 3, 9], [2, 0, 8], [1, 3, 9], [0, 1, 2]])
    first, again, other = (
        pack_documents(tokens, 10, "stream", spans=rows) for rows in (spans, spans.copy(), spans[1:])
    )
    assert first.cache_files == again.cache_files != other.cache_files
    rows = first.with_format(None)["input_ids"][:]
    assert rows == [[*range(8, 14), *range(28, 32)], [*range(32, 36), *range(8, 14)], [1]]


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        (
            (3,),
            {"length": 8, "packing": "tight"},
            "packing='tight' is unknown. Choose one of stream, best_fit, separate",
        ),
        ((3,), {"length": 1}, "length=1 leaves no token to predict"),
        ((0, 0), {"length": 8}, "the 2 documents hold no tokens"),
        ((), {"length": 8}, "the 0 documents hold no tokens"),
    ],
)
def test_packing_refuses(lengths, options, message):
    with pytest.raises(ValueError, match=message):
        pack_documents(documents(*lengths), **options)
