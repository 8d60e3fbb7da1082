"""Documents are found, read the same way every time, and split without leaking."""

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ring_hf.data import build_byte_tokenizer, load_documents, split_documents, tokenize_documents
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


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("absent.txt", {}, r"absent.txt' names no file that exists. Give a file, folder or glob of .txt, .json"),
        ("*.csv", {}, "names no file that exists"),
        ("notes.md", {}, r"names .*notes.md. Give a file"),
        ("more.jsonl", {"text_column": "content"}, r"text_column='content' is not a column of .*\['text', 'body'\]"),
    ],
)
def test_sources_that_cannot_be_read_are_refused(folder, name, options, message):
    with pytest.raises(ValueError, match=message):
        read(folder / name, **options)


def test_split_is_by_document_and_independent_of_the_others():
    texts = [f"document {i}" for i in range(200)]
    train, heldout = split_documents(Dataset.from_dict({"text": [*texts, *texts[:50]]}), 0.2)
    assert not set(train["text"]) & set(heldout["text"])
    assert len(train) + len(heldout) == 250
    assert 20 <= len(set(heldout["text"])) <= 60
    fewer = split_documents(Dataset.from_dict({"text": texts[::-1]}), 0.2)[1]
    assert set(fewer["text"]) == set(heldout["text"])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0])
def test_split_refuses_fractions_outside_zero_to_one(fraction):
    with pytest.raises(ValueError, match=f"heldout_fraction={fraction} must lie between 0 and 1"):
        split_documents(Dataset.from_dict({"text": ["a", "b"]}), fraction)


def test_split_refuses_to_leave_a_side_empty():
    with pytest.raises(ValueError, match="of 1 documents leaves one side empty"):
        split_documents(Dataset.from_dict({"text": ["a"]}), 0.5)


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
