"""A stream holds the documents of its sources, in the shares of the mixture, the same in every process."""

import itertools
import json
import logging
import re
from collections import Counter

import datasets
import numpy as np
import pytest
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from ring_hf.data import PACKINGS, build_byte_tokenizer
from ring_hf.data.byte_level import END_OF_TEXT
from ring_hf.data.run_options import DataArguments
from ring_hf.data.sequences import load_sequences, load_source, mix_sources
from ring_hf.data.streaming import StreamedSequences

TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=build_byte_tokenizer(), eos_token=END_OF_TEXT)
# Documents of one letter each, so that a token says where it comes from.
TEXTS = {"a": [3, 40, 9, 25, 14, 7], "b": [5, 5, 30, 6]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    for letter, lengths in TEXTS.items():
        rows = [{"text": letter * n, "input_ids": [ord(letter)] * n} for n in lengths]
        (folder / f"{letter}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def stream(folder, data=None, **options):
    data = data or [{"source": str(folder / f"{letter}.jsonl")} for letter in "ab"]
    defaults = {"max_length": 16, "streaming": True, "heldout_fraction": 0, "stream_buffer": 4}
    return StreamedSequences(DataArguments(data=data, **(defaults | options)), TOKENIZER)


def take(sequences, count):
    return list(itertools.islice(iter(sequences), count))


@pytest.mark.parametrize("packing", PACKINGS)
def test_without_weights_every_document_is_read_before_any_again(folder, packing):
    num_tokens = sum(sum(lengths) + len(lengths) for lengths in TEXTS.values())
    rows = take(stream(folder, packing=packing, stream_buffer=1000), 100)
    for row in rows:
        assert row["position_ids"][0] == 0 and len(row["input_ids"]) <= 16
        assert np.array_equal(row["labels"] == -100, row["position_ids"] == 0)
    rows = take(stream(folder, packing=packing, stream_buffer=num_tokens // 16), 300)
    counts = Counter(token for row in rows for token in row["input_ids"].tolist())
    assert counts[ord("a")] / counts[ord("b")] == pytest.approx(98 / 46, rel=0.05)
    if packing == "stream":
        assert all(len(row["input_ids"]) == 16 for row in rows)


def test_weights_are_shares_of_tokens(folder):
    data = [{"source": str(folder / f"{letter}.jsonl"), "weight": w} for letter, w in (("a", 1), ("b", 4))]
    rows = take(stream(folder, data, stream_buffer=8), 200)
    counts = Counter(token for row in rows for token in row["input_ids"].tolist() if token != 256)
    assert counts[ord("b")] / counts.total() == pytest.approx(0.8, abs=0.03)


def test_the_stream_is_the_same_each_time_and_depends_on_the_seed(folder):
    rows, again, other = (take(stream(folder, mixture_seed=seed), 40) for seed in (0, 0, 1))
    same, different = (
        [np.array_equal(x["input_ids"], y["input_ids"]) for x, y in zip(rows, others, strict=True)]
        for others in (again, other)
    )
    assert all(same) and not all(different)


@pytest.mark.parametrize(
    "options",
    [
        {"overlong": "drop"},
        {"overlong": "truncate"},
        {"overlong": "cut", "max_length": 8},
        {"min_length": 8},
        {"length_weights": {10: 2, 20: 3}},
    ],
)
def test_one_pass_reads_the_spans_of_the_plan(folder, options):
    """The first pass over a source, as the plan of a map-style mixture has it."""
    data = [{"source": str(folder / "a.jsonl"), **options}]
    args = DataArguments(data=data, max_length=16, packing="separate", heldout_fraction=0)
    (spec,) = args.mixture().sources
    mixture = mix_sources([load_source(spec)], args.mixture(), TOKENIZER, 16)
    planned = [len(span) for (span,) in mixture.pack_spans(args)]
    buffer = take(stream(folder, data, packing="separate", stream_buffer=1000), 20 * len(planned))
    counts = Counter(len(row["input_ids"]) for row in buffer)
    assert counts.keys() == Counter(planned).keys()
    for size, count in Counter(planned).items():
        assert counts[size] == pytest.approx(20 * count, abs=0.12 * len(buffer))


def test_bad_rows_end_the_stream_or_are_counted(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "aa"}\n{"text": 3}\n{"text": }\n{"text": ""}\n{"text": "bb"}\n')
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: 'text' holds a int and no text")):
        take(stream(None, str(path)), 3)
    with caplog.at_level(logging.WARNING, "ring_hf"):
        take(stream(None, str(path), errors="skip"), 9)
    assert "data source 'rows' leaves out rows no JSON: " in caplog.text
    assert caplog.text.count("3 rows are left out: 1 wrong type, 1 no JSON, 1 without text.") == 1
    path.write_text('{"input_ids": [1, 2]}\n{"input_ids": [999]}\n')
    data = [{"source": str(path), "format": "tokens"}]
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: 'input_ids' holds 999")):
        take(stream(None, data), 3)
    caplog.clear()
    assert take(stream(None, data, errors="skip"), 1)[0]["input_ids"].tolist()[:2] == [1, 2]
    assert "leaves out rows outside the vocabulary: " in caplog.text


def test_labels_and_weights_are_streamed(tmp_path):
    rows = [{"input_ids": [1, 2], "labels": [-100, 2], "loss_weights": [0, 0.5]}, {"input_ids": [3, 4]}]
    for name, lines in (("a", rows), ("b", rows[::-1])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = [{"source": str(tmp_path / "a.jsonl"), "format": "tokens"}]
    values = {}
    for row in take(stream(None, data, mask_boundaries=False), 9):
        columns = (row[name].tolist() for name in ("input_ids", "labels", "loss_weights"))
        values |= {token: (label, weight) for token, label, weight in zip(*columns, strict=True)}
    assert values == {1: (-100, 0), 2: (2, 0.5), 3: (3, 1), 4: (4, 1)}
    data[0]["source"] = str(tmp_path / "b.jsonl")
    with pytest.raises(ValueError, match=r"a row has loss_weights, but the first row of every source has none"):
        take(stream(None, data), 9)


def test_datasets_of_the_hub_are_streamed(monkeypatch):
    rows = datasets.Dataset.from_dict({"body": ["aaa", None, "bb"], "n": [1, 2, 3]}).to_iterable_dataset()
    monkeypatch.setattr("ring_hf.data.sources.load_dataset", lambda *args, streaming, **kwargs: rows)
    sequences = take(stream(None, "some/name", text_column="body", packing="separate"), 2)
    assert sorted(bytes(row["input_ids"][:-1].tolist()) for row in sequences) in ([b"aaa", b"bb"], [b"aaa", b"aaa"])
    with pytest.raises(ValueError, match=r"text_column='text' is not a column of 'some/name', which has \['body', 'n"):
        take(stream(None, "some/name"), 1)
    with pytest.raises(ValueError, match=r"text_column='n' of 'some/name' holds '1' in row 1 and no text"):
        take(stream(None, "some/name", text_column="n"), 1)


def test_what_a_stream_cannot_know_is_refused(folder):
    with pytest.raises(ValueError, match=r"streaming=True with mixture_tokens=9.*goes on until max_steps"):
        stream(folder, mixture_tokens=9)
    with pytest.raises(ValueError, match=r"mixture_stop='all_exhausted': a stream goes on"):
        stream(folder, mixture_stop="all_exhausted")
    with pytest.raises(ValueError, match=r"packing='tight' is unknown"):
        stream(folder, packing="tight")
    with pytest.raises(ValueError, match=r"nothing is left of 6 documents. Change min_length"):
        take(stream(folder, str(folder / "a.jsonl"), min_length=99), 1)
    with pytest.raises(ValueError, match=r"dataloader_num_workers=2 with streaming=True: every worker would read"):
        next(iter(DataLoader(stream(folder), batch_size=None, num_workers=2)))


def test_held_out_sequences_of_a_stream_are_a_source_of_their_own(folder):
    args = {"data": str(folder / "a.jsonl"), "streaming": True, "max_length": 16, "stream_buffer": 4}
    train, heldout = load_sequences(DataArguments(**args, heldout_data=str(folder / "b.jsonl")), TOKENIZER)
    assert isinstance(train, StreamedSequences) and sum(map(len, heldout["input_ids"])) == 50
    heldout_data = [{"source": str(folder / "b.jsonl"), "overlong": "drop", "min_length": 7, "weight": 3}]
    heldout = load_sequences(DataArguments(**args, heldout_data=heldout_data), TOKENIZER)[1]
    assert sorted(map(len, heldout["input_ids"])) == [7]  # of 6, 6, 31 and 7 tokens
    heldout_data[0]["min_length"] = 8
    with pytest.raises(ValueError, match=r"data source 'b \(held out\)': nothing is left of 4 documents"):
        load_sequences(DataArguments(**args, heldout_data=heldout_data), TOKENIZER)
    assert load_sequences(DataArguments(**args, heldout_fraction=0), TOKENIZER)[1] is None
    assert len(take(train, 3)) == 3
