"""Held-out text never is in training: documents are held out whole where there are enough, else the end of each."""

import logging

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from ring_hf.data import split_documents
from ring_hf.data.splits import cut_index

BOOK = "".join(f"Line {i} of a book that is long enough.\n" for i in range(500))


def split(texts, fraction):
    train, heldout = split_documents(Dataset.from_dict({"text": texts}), fraction)
    return list(train["text"]), list(heldout["text"])


def test_split_is_by_document_and_independent_of_the_others():
    texts = [f"document {i}" for i in range(200)]
    train, heldout = split([*texts, *texts[:50]], 0.2)
    assert not set(train) & set(heldout)
    assert len(train) + len(heldout) == 250
    assert 20 <= len(set(heldout)) <= 60
    assert set(split(texts[::-1], 0.2)[1]) == set(heldout)


@pytest.mark.parametrize("fraction", [1.0, -1.0, float("nan")])
def test_split_refuses_fractions_outside_zero_to_one(fraction):
    with pytest.raises(ValueError, match=f"heldout_fraction={fraction} must be at least 0 and below 1.*0 none"):
        split(["a", "b"], fraction)


def test_zero_holds_nothing_out():
    documents = Dataset.from_dict({"text": ["a", "b"]})
    train, heldout = split_documents(documents, 0)
    assert train is documents and heldout is None


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.9])
def test_of_one_document_the_end_is_held_out_from_a_line_on(fraction, caplog):
    with caplog.at_level(logging.WARNING, "ring_hf"):
        train, heldout = split([BOOK], fraction)
    assert train[0] + heldout[0] == BOOK and len(train) == len(heldout) == 1
    assert train[0].endswith("\n") and heldout[0].startswith("Line ")
    assert 0 <= len(heldout[0]) - fraction * len(BOOK) <= 40
    assert f"of 1 documents holds out either none of them or all, so the last {100 * fraction:g} %" in caplog.text


def test_of_a_few_documents_the_end_of_each_is_held_out():
    texts = [BOOK, BOOK[::-1], BOOK]
    train, heldout = split(texts, 0.01)
    assert [a + b for a, b in zip(train, heldout, strict=True)] == texts
    assert train[0] == train[2] and not any(part in text for part in heldout for text in train)


@given(st.text(max_size=3000), st.floats(0.001, 0.999))
def test_a_cut_is_in_the_text_and_at_most_a_little_early(text, fraction):
    cut, exact = cut_index(text, fraction), len(text) - round(len(text) * fraction)
    assert max(0, exact - 1000) <= cut <= exact
    assert cut == exact or text[cut - 1] in "\n "


def test_words_are_kept_whole_where_there_are_no_lines():
    assert cut_index("one two three four", 0.3) == len("one two ")
    assert cut_index("x" * 100, 0.25) == 75
    assert cut_index("line\n" + "x" * 5000, 0.5) == 5005 - round(2502.5)  # the line ends too far before


@pytest.mark.parametrize(("texts", "fraction"), [(["a"], 0.2), (["a"], 0.8), (["ab", "c"], 0.01)])
def test_split_refuses_to_leave_a_side_empty(texts, fraction):
    with pytest.raises(
        ValueError, match=r"characters leaves one side empty. Name a held-out source.*heldout_fraction=0"
    ):
        split(texts, fraction)
