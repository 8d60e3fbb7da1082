"""Rows of every format become tokens, labels and weights; a bad row ends the run or is counted by kind."""

import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from ring_hf.data import (
    FORMATS,
    Format,
    FormatSettings,
    RowError,
    build_byte_tokenizer,
    each_row,
    load_rows,
    tokenize_source,
)
from ring_hf.data.byte_level import END_OF_TEXT
from ring_hf.data.sources import load_documents

TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=build_byte_tokenizer(), eos_token=END_OF_TEXT)
ROWS = [
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "loss_weights": [0, 0.5, 2], "note": {"a": 1}},
    {"input_ids": [4, 257], "note": ["b"]},
]


def write(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def tokens_of(path, errors="raise", **options):
    rows = load_rows(str(path), FORMATS["tokens"].row_columns({}), errors=errors)
    settings = FormatSettings(str(path), errors, options=options)
    return tokenize_source(rows, TOKENIZER, "tokens", settings)


def test_pretokenised_rows_keep_labels_and_weights(tmp_path):
    tokens = tokens_of(write(tmp_path / "a.jsonl", ROWS))
    assert tokens[:] == {
        "input_ids": [[1, 2, 3], [4, 257]],
        "labels": [[-100, 2, 3], None],
        "loss_weights": [[0.0, 0.5, 2.0], None],
    }
    assert tokens_of(write(tmp_path / "b.jsonl", ROWS[1:])).column_names == ["input_ids"]


def test_pretokenised_rows_of_parquet_and_of_the_hub_are_the_same(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"input_ids": [[1, 2], [3]], "labels": [None, [3]], "other": ["x", "y"]}), path)
    expected = {"input_ids": [[1, 2], [3]], "labels": [None, [3]]}
    assert tokens_of(path)[:] == expected
    monkeypatch.setattr("ring_hf.data.sources.load_dataset", lambda *args, **kwargs: Dataset.from_parquet(str(path)))
    assert tokens_of("some/name")[:] == expected
    monkeypatch.setattr(
        "ring_hf.data.sources.load_dataset", lambda *args, **kwargs: Dataset.from_dict({"input_ids": [[1], [999]]})
    )
    with pytest.raises(ValueError, match=r"^some/name, row 2: 'input_ids' holds 999, but the vocabulary has 258 tok"):
        tokens_of("some/name")


BAD = {
    "no list": ({"input_ids": "abc"}, "'input_ids' holds 'abc' and no list of integers", "wrong type"),
    "fractions": ({"input_ids": [1, 2.5]}, r"'input_ids' holds '\[1, 2.5\]' and no list of integers", "wrong type"),
    "booleans": ({"input_ids": [True]}, "and no list of integers", "wrong type"),
    "nothing": ({"input_ids": []}, "'input_ids' is empty", "without tokens"),
    "too large": ({"input_ids": [1, 258]}, "holds 258, but the vocabulary has 258 tokens", "outside the vocabulary"),
    "negative": ({"input_ids": [-1]}, "holds -1, but the vocabulary has", "outside the vocabulary"),
    "label": ({"input_ids": [1], "labels": [-5]}, "'labels' holds -5, but", "outside the vocabulary"),
    "length": ({"input_ids": [1, 2], "labels": [1]}, "'labels' has 1 values for 2 input_ids", "other length"),
    "weight": ({"input_ids": [1], "loss_weights": [-0.5]}, "'loss_weights' holds -0.5 at 0", "bad loss weight"),
    "NaN": ('{"input_ids": [1], "loss_weights": [NaN]}', "'loss_weights' holds NaN", "bad loss weight"),
    "column": ({"tokens": [1]}, r"the row has no 'input_ids', only \['tokens'\]", "missing column"),
    "JSON": ('{"input_ids": [1, }', r"no JSON \(.*\): '\{\"input_ids", "no JSON"),
    "object": ("[1, 2]", r"'\[1, 2\]' is a list and no object with the key 'input_ids'", "wrong type"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_or_counted(tmp_path, caplog, name):
    row, message, kind = BAD[name]
    path = write(tmp_path / "a.jsonl", [ROWS[0], row, ROWS[1], row])
    with pytest.raises(ValueError, match=rf"a.jsonl, line 2: .*{message}"):
        tokens_of(path)
    with caplog.at_level(logging.WARNING, "ring_hf"):
        assert tokens_of(path, "skip")["input_ids"][:] == [[1, 2, 3], [4, 257]]
    (warning,) = caplog.messages
    assert warning.startswith(f"2 of 4 rows of {path} are left out: 2 {kind}; the first is {path}, line 2: ")


def test_kinds_are_counted_once_and_again_from_the_cache(tmp_path, caplog):
    lines = [*ROWS, *(BAD[name][0] for name in ("JSON", "JSON", "object", "too large"))]
    path = write(tmp_path / "a.jsonl", lines)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "ring_hf"):
            tokens_of(path, "skip")
        read, tokenised = caplog.messages
        assert read.startswith(f"3 of 6 rows of {path} are left out: 2 no JSON, 1 wrong type; the first is ")
        assert tokenised.startswith(f"1 of 3 rows of {path} are left out: 1 outside the vocabulary; the first is ")


def test_a_larger_embedding_is_an_option(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"input_ids": [8447]}])
    assert tokens_of(path, vocab_size=8448)["input_ids"][:] == [[8447]]
    with pytest.raises(ValueError, match=r"unknown in options of format 'tokens': 'vocabsize' \(did you mean vocab"):
        tokens_of(path, vocabsize=8448)


def test_lines_of_other_bytes_are_left_out_one_by_one(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n{"text": "b"}\n{"text": 3}\n')
    with caplog.at_level(logging.WARNING, "ring_hf"):
        assert load_documents(str(path), errors="skip")["text"][:] == ["a", "b"]
    assert "are left out: 1 wrong bytes, 1 wrong type; the first is" in caplog.text
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.parquet").write_bytes(b"nothing")
    assert load_documents(str(tmp_path), errors="skip")["text"][:] == ["a", "b"]
    assert "1 not utf-8, 1 unreadable file" in caplog.text
    with pytest.raises(ValueError, match=r"1 of 1 rows of .* are left out: 1 not utf-8.*Nothing is left"):
        load_documents(str(tmp_path / "b.txt"), errors="skip")
    with pytest.raises(ValueError, match=r"errors=.ignore. is unknown. Set it to raise"):
        load_documents(str(path), errors="ignore")


def test_a_format_is_one_row_and_one_function(tmp_path, monkeypatch):
    def tokenize_note(row, tokenizer, options):
        if not isinstance(row["note"], list):
            raise RowError("wrong type", "a note is a list.")
        return {"input_ids": row["note"], "labels": [options["label"]] * len(row["note"])}

    note = Format(columns=("note",), tokenize=each_row(tokenize_note), options={"label": 7})
    monkeypatch.setitem(FORMATS, "note", note)
    path = write(tmp_path / "a.jsonl", [{"memo": [1, 2], "deep": {"x": [None]}}])
    rows = load_rows(str(path), note.row_columns({"note": "memo"}))
    assert tokenize_source(rows, TOKENIZER, "note", FormatSettings())[:] == {"input_ids": [[1, 2]], "labels": [[7, 7]]}
    with pytest.raises(ValueError, match=r"columns renames \['memo'\], which the format does not read. It reads note"):
        note.row_columns({"memo": "note"})
    with pytest.raises(ValueError, match=r"format unknown: 'notes' \(did you mean note.*\). Choose one of text"):
        tokenize_source(rows, TOKENIZER, "notes", FormatSettings())


def test_what_a_source_lacks_is_named(tmp_path):
    columns = FORMATS["tokens"].row_columns({})
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"a.txt is plain text, but the format reads the columns input_ids"):
        load_rows(str(tmp_path / "a.txt"), columns)
    with pytest.raises(ValueError, match=r"data source 'builtin' is text without the columns"):
        load_rows("builtin", columns)
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(ValueError, match=r"There are no rows in .*b.jsonl. Empty \(0 bytes\): .*b.jsonl"):
        load_rows(str(tmp_path / "b.jsonl"), columns)
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"'input_ids' is not a column of .*c.parquet', which has \['text'\]"):
        load_rows(str(tmp_path / "c.parquet"), columns)
