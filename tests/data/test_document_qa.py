"""Adjacent chunks of a document are joined to a length, and their question-answer pairs follow as a conversation."""

import json
import logging

import pytest
from datasets import Dataset

from ring_hf.data import FORMATS, FormatSettings, load_rows, tokenize_source
from ring_hf.data.document_qa import cut_into_chunks
from tests.data.test_conversations import tokenizer


def chunk(document, text, *pairs):
    return {"document": document, "chunk": text, "pairs": [{"question": q, "answer": a} for q, a in pairs]}


def row_of(*contents):
    """The text of a conversation whose contents are alternately the user's and the assistant's."""
    turns = [
        f"user: {content}\n" if i % 2 == 0 else f"assistant: {content}<|endoftext|>"
        for i, content in enumerate(contents)
    ]
    return "".join(turns)


CHUNKS = [
    chunk("a", "x" * 100, ("q1", "a1")),
    chunk("a", "y" * 100, ("q2", "a2"), ("q3", "a3")),
    chunk("a", "z" * 150),
    chunk("a", "w" * 50, ("q4", "a4")),
    chunk("b", "v" * 20, ("q5", "a5")),
]


def tokens_of(tmp_path, rows, errors="raise", **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    loaded = load_rows(str(path), FORMATS["document_qa"].row_columns({}), errors=errors)
    settings = FormatSettings("rows", errors, options=options)
    return tokenize_source(loaded, tokenizer(), "document_qa", settings)


def texts_of(tokens):
    return [tokenizer().decode(ids) for ids in tokens["input_ids"]]


def test_chunks_fill_the_length_and_their_pairs_follow(tmp_path):
    tokens = tokens_of(tmp_path, CHUNKS, max_length=330)
    assert texts_of(tokens) == [
        row_of("x" * 100 + "y" * 100 + "\n\nq1", "a1", "q2", "a2", "q3", "a3"),
        row_of("z" * 150 + "w" * 50 + "\n\nq4", "a4"),
        row_of("v" * 20 + "\n\nq5", "a5"),
    ]
    answers = [tokenizer().decode([token for token in labels if token != -100]) for labels in tokens["labels"]]
    assert answers == ["a1<|endoftext|>a2<|endoftext|>a3<|endoftext|>", "a4<|endoftext|>", "a5<|endoftext|>"]
    assert max(map(len, tokens["input_ids"])) <= 330 and tokens.column_names == ["input_ids", "labels"]
    (whole, _) = texts_of(tokens_of(tmp_path, CHUNKS, max_length=1000))
    assert whole == row_of(
        "x" * 100 + "y" * 100 + "z" * 150 + "w" * 50 + "\n\nq1", *["a1", "q2", "a2", "q3", "a3", "q4", "a4"]
    )


def test_a_row_that_the_template_makes_too_long_gives_its_last_chunk_back(tmp_path):
    many = [chunk("a", "x" * 10, *[("q", "a")] * 10), chunk("a", "y" * 10, ("q", "a"))]
    length = len(tokens_of(tmp_path, many, max_length=10_000)[0]["input_ids"])
    assert [len(ids) for ids in tokens_of(tmp_path, many, max_length=length)["input_ids"]] == [length]
    shorter = tokens_of(tmp_path, many, max_length=length - 1)
    assert len(shorter) == 2 and max(map(len, shorter["input_ids"])) < length


def test_pairs_beyond_the_most_are_taken_evenly(tmp_path):
    pairs = [(f"q{i}", f"a{i}") for i in range(6)]
    (text,) = texts_of(tokens_of(tmp_path, [chunk("a", "x", *pairs)], max_length=1000, max_pairs=3))
    assert text == row_of("x\n\nq0", "a0", "q2", "a2", "q4", "a4")


BAD = {
    "too long": (chunk("b", "x" * 400, ("q", "a")), r"have 4\d\d tokens, more than max_length=300. Cut smaller"),
    "without pairs": (chunk("b", "x"), "1 chunks of document 'b' have no pair"),
    "wrong type": (
        {"document": "b", "chunk": "x", "pairs": [{"question": "q"}]},
        "'pairs' holds '{\"question\": \"q\"}'",
    ),
    "out of order": (chunk("c", "x", ("q", "a")), "document 'c' goes on after another"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_chunk_names_its_row_or_is_counted(tmp_path, caplog, kind):
    row, message = BAD[kind]
    good = [chunk("c", "x", ("q", "a")), chunk("a", "x", ("q", "a"))]
    with pytest.raises(ValueError, match=rf"rows.jsonl, line 3: .*{message}"):
        tokens_of(tmp_path, [*good, row], max_length=300)
    with caplog.at_level(logging.WARNING, "ring_hf"):
        assert len(tokens_of(tmp_path, [*good, row], "skip", max_length=300)) == 2
    assert f"of rows are left out: 1 {kind}; the first is" in caplog.text
    with pytest.raises(ValueError, match="max_length=None must say how many tokens the chunks"):
        tokens_of(tmp_path, good)


def test_documents_are_cut_into_rows_that_are_to_be_filled(tmp_path):
    documents = Dataset.from_dict({"text": ["abcdefgh", "ij"], "document": ["first", "second"]})
    rows = cut_into_chunks(documents, tokenizer(), 3)
    assert rows["document"] == ["first"] * 3 + ["second"] and rows["chunk"] == ["abc", "def", "gh", "ij"]
    assert cut_into_chunks(documents.remove_columns("document"), tokenizer(), 9)["document"] == ["0", "1"]
    filled = [{**row, "pairs": [{"question": "Q", "answer": "A"}]} for row in rows]
    assert texts_of(tokens_of(tmp_path, filled, max_length=100))[0].startswith("user: abcdefgh\n\nQ\nassistant: A")
    with pytest.raises(ValueError, match="chunk_tokens=0 must be at least 1"):
        cut_into_chunks(documents, tokenizer(), 0)
