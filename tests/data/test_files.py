"""A file is read as text or refused with the file, the row, the cause and the way out."""

import bz2
import errno
import gzip
import json
import logging
import lzma
import os
import sys
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ring_hf.data import load_documents
from ring_hf.data.files import COMPRESSIONS, ENDINGS, ending_of

ROWS = [{"text": "eins \u00fc", "n": 1}, {"text": "zwei", "n": "two"}, {"n": None, "text": "drei\n"}]
TEXTS = [row["text"] for row in ROWS]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()


def read(source, **options):
    documents = load_documents(str(source), **options)
    assert documents.column_names == ["text"]
    return list(documents["text"])


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": bytes}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", [".txt", ".json", ".jsonl"])
def test_compressed_files_are_read_like_others(tmp_path, monkeypatch, kind, compression):
    stand_in = SimpleNamespace(open=open)  # of a package that may not be installed: it reads uncompressed files
    monkeypatch.setitem(sys.modules, "zstandard", stand_in)
    content = b"eins\r\nzwei" if kind == ".txt" else LINES
    path = write(tmp_path, f"Corpus.v1.2{kind}{compression}".upper(), PACK[compression](content))
    expected = ["eins\nzwei"] if kind == ".txt" else TEXTS
    assert read(path) == read(tmp_path) == read(f"{tmp_path}/*") == expected
    assert ending_of(path) == kind + compression


def test_every_ending_is_one_of_those():
    assert len(ENDINGS) == 3 * len(COMPRESSIONS) + 1 == 16
    for name in ("notes.md", "jsonl", "a.gz", "a.parquet.gz", "a.tar.gz", "a.jsonl.zip", ".txt", "a."):
        assert ending_of(name) is None, name


def test_zstandard_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = write(tmp_path, "a.jsonl.zst", LINES)
    with pytest.raises(ValueError, match=r"a.jsonl.zst is compressed by Zstandard.*Install it, or unpack the file"):
        read(path)


@pytest.mark.parametrize("content", [json.dumps(ROWS), json.dumps(ROWS, indent=1), LINES, b"\n" + LINES + b"\n\n"])
def test_json_is_an_array_or_an_object_in_each_line(tmp_path, content):
    assert read(write(tmp_path, "a.json", content)) == TEXTS
    assert read(write(tmp_path, "b.json", json.dumps(ROWS[0], indent=1))) == TEXTS[:1]


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, name):
    content = TEXTS[0] if name == "a.txt" else json.dumps(ROWS[0])
    assert read(write(tmp_path, name, content.encode("utf-8-sig"))) == TEXTS[:1]
    assert read(write(tmp_path, f"16{name}", content.encode("utf-16")), encoding="utf-16") == TEXTS[:1]


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl", "a.jsonl.gz"])
def test_another_encoding_is_read_if_named_and_else_refused(tmp_path, name):
    rows = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in ("ascii", "caf\u00e9"))
    content = (rows if "json" in name else "ascii\ncaf\u00e9").encode("latin-1")
    path = write(tmp_path, name, gzip.compress(content) if name.endswith(".gz") else content)
    expected = ["ascii", "caf\u00e9"] if "json" in name else ["ascii\ncaf\u00e9"]
    assert read(path, encoding="latin-1") == expected
    with pytest.raises(ValueError) as refusal:
        read(path)
    message = f"{path}, line 2: byte 0xe9 is no utf-8 (invalid continuation byte"
    if "json" not in name:  # the end of the file cuts it off
        message = f"{path}, at its end: byte 0xe9 is no utf-8 (unexpected end of data"
    assert message in str(refusal.value)
    assert "such as encoding='latin-1', or convert them: iconv -f latin-1 -t utf-8" in str(refusal.value)


def test_the_line_of_a_wrong_byte_is_named_wherever_it_is(tmp_path):
    path = write(tmp_path, "a.txt", b"fine\n" * 9000 + b"\xff\n" + b"fine\n" * 9000)
    with pytest.raises(ValueError, match=r"a.txt, line 9001: byte 0xff is no utf-8"):
        read(path)
    path = write(tmp_path, "b.txt", "\u00fc".encode("utf-16"))
    with pytest.raises(ValueError, match=r"b.txt, line 1: byte 0xff is no utf-8.*such as encoding='utf-16'"):
        read(path)
    with pytest.raises(ValueError, match=r"encoding='lattin' is unknown to Python. Name one such as utf-8"):
        read(path, encoding="lattin")


def parquet(path, column, kind=None):
    pq.write_table(pa.table({"text": pa.array(column, kind)}), path)
    return path


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())])
def test_parquet_holds_strings_of_any_kind(tmp_path, kind):
    assert read(parquet(tmp_path / "a.parquet", ["one", None, "two", ""], kind)) == ["one", "two"]


def test_rows_without_text_are_left_out_and_counted(tmp_path, caplog):
    rows = [{"text": "a"}, {"text": ""}, {"text": None}, {"other": 3}, {"text": " "}]
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    write(tmp_path, "b.txt", "")
    expected = f"4 of 6 rows of {tmp_path} are left out: 4 without text; the first is {path}, line 2."
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING, "ring_hf"):
            assert read(tmp_path) == ["a", " "]
        assert caplog.messages == [expected]


REFUSED = {
    "broken line": (
        "a.jsonl",
        '{"text": "a"}\n{"text": "b}\n',
        r"a.jsonl, line 2: no JSON \(Unterminated .*: '\{\"text",
    ),
    "line that is no object": ("a.jsonl", '"a"\n', r"a.jsonl, line 1: 'a' is a str and no object with the key 'text'"),
    "row that is no object": ("a.json", '[{"text": "a"}, [1]]', r"a.json, row 2: '\[1\]' is a list and no object"),
    "broken array": ("a.json", '[\n{"text": "a"},\n]', r"a.json, line 3: no JSON \(.*Repair the file"),
    "list": ("a.jsonl", '{"text": "a"}\n{"text": ["b"]}', r"a.jsonl, line 2: 'text' holds a list and no text: '\["),
    "number": ("a.json", '[{"text": 3}]', "a.json, row 1: 'text' holds a int and no text: '3'"),
    "half a pair": (
        "a.jsonl",
        '{"text": "a\\ud83d"}',
        r"line 1: character 2 of the text, '\\ud83d', is half of a sur",
    ),
    "other column": ("a.jsonl", '{"body": "a", "n": 1}', r"^text_column='text' is not a column of .*\['body', 'n'\]"),
    "empty file": ("a.txt", "", r"There is no text in .*a.txt. Empty \(0 bytes\): .*a.txt. Name other files"),
    "empty rows": ("a.jsonl", "\n\n", "There is no text in .*a.jsonl. Name other files, or set text_column='text'"),
    "empty texts": (
        "a.jsonl",
        '{"text": ""}\n{"text": null}',
        "All 2 rows are empty or null, such as .*a.jsonl, line",
    ),
    "cut archive": ("a.txt.gz", gzip.compress(b"abc" * 99)[:-9], "a.txt.gz cannot be decompressed: .*Fetch or write"),
    "no archive": ("a.txt.bz2", "plain text", "a.txt.bz2 cannot be decompressed: Invalid data stream"),
    "no parquet": ("a.parquet", "plain text", "a.parquet cannot be read as parquet: Parquet magic bytes not found"),
    "unknown ending": (
        "a.csv",
        "text\na\n",
        r"names .*a.csv, whose ending says nothing.*folder or glob of .txt, .json",
    ),
    "archive": ("a.zip", "", r"An archive \(.zip, .tar\) must be unpacked"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_with_file_row_and_cause(tmp_path, name):
    file, content, message = REFUSED[name]
    path = write(tmp_path, file, content)
    for source in (path, f"{tmp_path}/*"):
        with pytest.raises(ValueError, match=message):
            read(source)


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.int64(), pa.binary()])
def test_parquet_of_something_else_is_refused(tmp_path, kind):
    path = parquet(tmp_path / "a.parquet", [None], kind)
    with pytest.raises(ValueError, match=r"text_column='text' of .*a.parquet holds .* and no text. Set text_column"):
        read(path)
    with pytest.raises(ValueError, match=r"text_column='body' is not a column of .*a.parquet', which has \['text'\]"):
        read(path, text_column="body")


def test_one_file_of_many_is_named(tmp_path):
    for number in range(3):
        write(tmp_path, f"{number}.jsonl", '{"text": "a"}' if number != 1 else '{"content": "b"}')
    with pytest.raises(ValueError, match=r"is not a column of .*1.jsonl', which has \['content'\]"):
        read(tmp_path)


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def forbidden(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setitem(COMPRESSIONS, "", forbidden)  # root may read everything
    with pytest.raises(ValueError, match=r"a.txt cannot be opened: Permission denied"):
        read(write(tmp_path, "a.txt", "a"))


def test_a_file_that_is_gone_is_named(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "b.txt")
    with pytest.raises(ValueError, match=r"a.txt' names no file that exists"):
        read(tmp_path / "a.txt")


def test_a_folder_without_text_says_what_it_holds(tmp_path):
    with pytest.raises(
        ValueError, match=r"holds nothing that can be read as text: no file at all. Give a file, folder"
    ):
        read(tmp_path)
    for name in ("a.pdf", "b.pdf", "deep/c.tar.gz", "README"):
        write(tmp_path, name, "x")
    with pytest.raises(ValueError, match=r"read as text: 2 with .pdf, 1 with no ending, 1 with .tar.gz"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["absent.txt", "*.jsonl", "absent.jsonl.gz"])
def test_a_path_without_file_is_refused(tmp_path, name):
    with pytest.raises(
        ValueError, match=r"names no file that exists \(from .*\). Give a file, folder or glob of .txt"
    ):
        read(tmp_path / name)


def test_a_name_that_is_neither_path_nor_dataset_says_both(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError) as refusal:
        read("books/mine")
    assert str(refusal.value).startswith("data source 'books/mine' is no file or folder here (in ")
    assert "correct the path; if a dataset, its name, configuration" in str(refusal.value)


def hub(monkeypatch, columns):
    monkeypatch.setattr(
        "ring_hf.data.sources.load_dataset", lambda *args, **kwargs: datasets.Dataset.from_dict(columns)
    )


def test_rows_of_the_hub_without_text_are_left_out_and_counted(monkeypatch, caplog):
    hub(monkeypatch, {"body": ["a", None, "", "b"] * 600, "n": list(range(2400))})
    with caplog.at_level(logging.WARNING, "ring_hf"):
        assert read("some/name", text_column="body") == ["a", "b"] * 600
    assert caplog.messages == ["1200 of 2400 rows of some/name hold no text and are left out."]
    for empty_column in ([None, None], ["", None]):
        hub(monkeypatch, {"text": empty_column})
        with pytest.raises(ValueError, match="There is no text in 'some/name': all 2 rows are empty or null"):
            read("some/name")


@pytest.mark.parametrize("column", [[["a"]], [3], [{"role": "user"}]])
def test_other_columns_of_the_hub_are_refused(monkeypatch, column):
    hub(monkeypatch, {"text": column})
    with pytest.raises(
        ValueError, match=r"text_column='text' of 'some/name' holds .* and no text.*set format to one that"
    ):
        read("some/name")
    with pytest.raises(ValueError, match=r"text_column='body' is not a column of 'some/name', which has \['text'\]"):
        read("some/name", text_column="body")


def test_a_file_that_changes_is_read_again(tmp_path):
    path = write(tmp_path, "a.txt", "before")
    assert read(path) == ["before"]
    write(tmp_path, "a.txt", "after!")
    os.utime(path, ns=(1, 1))
    assert read(path) == ["after!"]
