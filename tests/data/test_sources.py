"""Documents are listed and read in the same order every time, and become tokens."""

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ring_hf.data import build_byte_tokenizer, load_documents, tokenize_documents
from ring_hf.data.byte_level import END_OF_TEXT, PADDING

TEXTS = ["one\ntwo\n", "three", "four\n\nfive"]


@pytest.fixture
def folder(tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
    table = Dataset.from_dict({"text": ["six", "seven"], "body": ["SIX", "SEVEN"]})
    table.to_json(tmp_path / "more.jsonl")
    (tmp_path / "deep").mkdir()
    table.to_parquet(tmp_path / "deep" / "most.parquet")
    (tmp_path / "notes.md").write_text("not read")
    return tmp_path


def read(source, **options):
    documents = load_documents(str(source), **options)
    assert documents.column_names == ["text"]
    return list(documents["text"])


def test_files_folders_and_globs_are_read_in_order(folder):
    assert read(folder / "1.txt") == TEXTS[1:2]
    assert read(folder / "*.txt") == TEXTS
    assert read(folder / "more.jsonl", text_column="body") == ["SIX", "SEVEN"]
    assert read(folder / "deep") == ["six", "seven"]
    assert read(folder) == [*TEXTS, "six", "seven", "six", "seven"]
    assert read(folder, text_column="body") == [*TEXTS, "SIX", "SEVEN", "SIX", "SEVEN"]


def test_builtin_documents_are_many_long_and_the_same_each_time():
    texts = read("builtin")
    assert len(texts) > 300
    assert sum(len(text) > 16_000 for text in texts) > 80
    assert sum(map(len, texts)) > 5_000_000
    assert texts == read("builtin")


def fast_tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=build_byte_tokenizer(), eos_token=END_OF_TEXT, pad_token=PADDING)


@given(st.text())
def test_byte_tokenizer_ids_are_the_bytes(text):
    tokenizer = build_byte_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    plain = text.replace(END_OF_TEXT, "").replace(PADDING, "")
    if plain == text:
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text


def test_byte_tokenizer_survives_saving(tmp_path):
    tokenizer = fast_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == 258
    assert (loaded.eos_token_id, loaded.pad_token_id) == (256, 257)
    text = "na\u00efve\t\u6f22\u5b57 \U0001f389  two  spaces\n"
    assert loaded(text)["input_ids"] == list(text.encode())
    assert loaded.decode(loaded(text + END_OF_TEXT)["input_ids"]) == text + END_OF_TEXT


def test_tokenising_closes_every_document_once_and_is_cached():
    documents = Dataset.from_dict({"text": ["ab", "", f"c{END_OF_TEXT}"]})
    tokens = tokenize_documents(documents, fast_tokenizer())
    assert list(tokens["input_ids"]) == [[97, 98, 256], [256], [99, 256]]
    tokens = [tokenize_documents(load_documents("builtin").select(range(3)), fast_tokenizer()) for _ in range(2)]
    assert tokens[0].cache_files == tokens[1].cache_files != []
