"""`ring-hf data`: the report is what a count by hand and the packed sequences give, and mistakes are explained."""

import dataclasses
import json
import re
import shlex

import numpy as np
import pytest
import yaml
from arguments import MemoryArguments, ModelArguments, ParallelArguments
from PIL import Image
from sft_arguments import AdapterArguments, ConversationArguments
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig

from ring_hf.cli import main
from ring_hf.data import PACKINGS, build_byte_tokenizer, load_sequences
from ring_hf.data.byte_level import END_OF_TEXT
from ring_hf.data.conversation_keys import ConversationKeys
from ring_hf.data.data_command import _EXAMPLES, RunArguments, _is_misspelt
from ring_hf.data.data_report import busiest_over_mean, count_targets, length_histogram, make_report
from ring_hf.data.run_options import DataArguments
from ring_hf.data.sequences import load_splits, mix_sources
from ring_hf.data.source_spec import OVERLONG, STOPS
from ring_hf.geometry import Mask, ShardedSequence, padded_length
from ring_hf.testing import dense_mask
from tests.repository.documents import BLOCKS, PAGES, commands
from tests.support.harness import ROOT

TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=build_byte_tokenizer(), eos_token=END_OF_TEXT)


def write(path, lengths):
    path.write_text("\n".join(json.dumps({"text": "x" * (n - 1)}) for n in lengths))  # the end of the text is a token
    return str(path)


@pytest.fixture
def run(tmp_path):
    """Documents of 3, 5, 10 and 20 tokens, cut at 8; and of 4, 6 and 16, without those below 5, dropped above 8."""
    (tmp_path / "run.yaml").write_text(
        f"""
tokenizer: bytes
data:
- {{source: {write(tmp_path / "a.jsonl", [3, 5, 10, 20])}}}
- {{source: {write(tmp_path / "b.jsonl", [4, 6, 16])}, min_length: 5, overlong: drop}}
heldout_fraction: 0
max_length: 8
packing: separate
context_parallel_size: 2
per_device_train_batch_size: 1
gradient_accumulation_steps: 2
max_steps: 7
learning_rate: 1e-4
"""
    )
    return str(tmp_path / "run.yaml")


def test_the_report_is_a_count_by_hand(run, tmp_path, capsys):
    assert main(["data", run, "--json", str(tmp_path / "new" / "report.json"), "--num_processes", "4"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    first, second = report["sources"]
    assert (first["name"], first["documents"], first["tokens"], first["longest"]) == ("a", 4, 38, 20)
    assert first["histogram"] == [
        {"least": 2, "documents": 1, "tokens": 3},
        {"least": 4, "documents": 1, "tokens": 5},
        {"least": 8, "documents": 1, "tokens": 10},
        {"least": 16, "documents": 1, "tokens": 20},
    ]
    assert first["outcomes"] == {
        "cut": {"whole": 2, "shortened": 2, "dropped": 0, "kept_tokens": 38, "tokens": 38},
        "drop": {"whole": 2, "shortened": 0, "dropped": 2, "kept_tokens": 8, "tokens": 38},
        "truncate": {"whole": 2, "shortened": 2, "dropped": 0, "kept_tokens": 24, "tokens": 38},
    }
    assert (second["short_documents"], second["short_tokens"], second["epoch_tokens"]) == (1, 4, 6)
    assert second["outcomes"]["drop"] == {"whole": 1, "shortened": 0, "dropped": 1, "kept_tokens": 6, "tokens": 22}
    assert (second["trained_tokens"], second["epochs"], second["asked_share"]) == (6, 1.0, None)
    assert second["share"] == pytest.approx(6 / 44)
    # 3, 5, 8 + 2, 8 + 8 + 4 and 6 tokens, one span in each sequence.
    assert (report["sequences"], report["spans"], report["tokens"], report["targets"]) == (8, 8, 44, 36)
    assert report["padding"] == pytest.approx(20 / 64)
    assert (report["sequences_per_step"], report["steps"], report["max_steps"]) == (4, 2, 7)
    assert "| a      | text   |         4 |     38 |      20 |          38 |         38 |   1.00 | 86.4 % |" in printed
    assert "8 sequences of at most 8 tokens (separate, documents masked): 44 tokens in 8 spans, 31.2 % p" in printed
    assert "36 targets (81.8 % of the tokens)." in printed
    assert "Sequences in a step: 4. Steps that read the mixture once: 2.\nmax_steps=7 reads the mixture 3.5" in printed
    assert [row["layout"] for row in report["balance"]] == ["contiguous", "zigzag", "striped", "balanced"]


def mixed_arguments(tmp_path, **options):
    texts = write(tmp_path / "a.jsonl", [3, 5, 10, 20, 7, 9])
    rows = [
        {"input_ids": list(range(n)), "labels": [-100 if i % 3 else i for i in range(n)]} for n in (4, 15, 9, 30, 2)
    ]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = [{"source": texts}, {"source": str(tmp_path / "b.jsonl"), "format": "tokens", "max_length": 9}]
    return DataArguments(data=data, heldout_fraction=0, max_length=16, **options)


@pytest.mark.parametrize("packing", ["stream", "best_fit", "separate"])
@pytest.mark.parametrize("mask_boundaries", [True, False])
def test_the_report_counts_what_training_reads(tmp_path, packing, mask_boundaries):
    args = mixed_arguments(tmp_path, packing=packing, mask_boundaries=mask_boundaries)
    mixture = mix_sources(load_splits(args)[0], args.mixture(), TOKENIZER, args.max_length)
    report = make_report(mixture, args, sequences_per_step=3)
    packed = load_sequences(args, TOKENIZER)[0]
    assert report.sequences == len(packed) and report.steps == -(-len(packed) // 3)
    assert report.tokens == sum(map(len, packed["input_ids"]))
    assert report.targets == sum(int((labels[1:] != -100).sum()) for labels in packed["labels"])
    assert report.targets == count_targets(mixture, mixture.pack_spans(args), mask_boundaries)
    assert report.balance == () and report.passes is None
    assert report.padding == pytest.approx(1 - report.tokens / (16 * len(packed)))


def test_balance_is_that_of_the_mask():
    for layout in ("zigzag", "balanced"):
        for documents in ([64], [40, 7, 17], [30, 21]):
            work = [0, 0, 0, 0]
            ends = np.cumsum(documents).tolist()
            length = padded_length(layout, ends[-1], 4)
            bounds = ((0, *ends, *([length] if ends[-1] < length else [])),) if len(documents) > 1 else None
            sequence = ShardedSequence(layout, length, 4, bounds, (ends[-1],))
            visible = dense_mask(sequence, Mask(), 1)[0]
            for rank in range(4):
                tokens = [token for segment in sequence.ring_segments(rank) for token in segment.range]
                work[rank] = int(visible[tokens].sum())
            assert busiest_over_mean(documents, layout, 4) == pytest.approx(max(work) * 4 / sum(work))


def test_lengths_are_counted_by_powers_of_two():
    buckets = length_histogram(np.array([1, 2, 3, 4, 7, 8, 1000, 1024]))
    counts = {bucket.least: (bucket.documents, bucket.tokens) for bucket in buckets if bucket.documents}
    assert counts == {1: (1, 1), 2: (2, 5), 4: (2, 11), 8: (1, 8), 512: (1, 1000), 1024: (1, 1024)}


def test_a_picture_has_a_colour_for_each_source(run, tmp_path, capsys):
    path = tmp_path / "new" / "one_rank.png"
    assert main(["data", run, "--picture", str(path), "--context_parallel_size", "1"]) == 0
    assert f"picture: {path}" in capsys.readouterr().out
    image = np.asarray(Image.open(path).convert("RGB"))
    colours = {tuple(colour) for colour in np.unique(image.reshape(-1, 3) // 16, axis=0).tolist()}
    assert {(0, 7, 11), (14, 9, 0)} <= colours
    assert path.stat().st_size < 60_000


def test_a_stream_is_sampled(run, capsys):
    assert main(["data", run, "--streaming", "true", "--sample", "2"]) == 0
    printed = capsys.readouterr().out
    assert "| a      | text   |         2 |      8 |       5 |" in printed
    assert "Only the first documents of each source were read: numbers are of this sample." in printed
    assert (
        main(["data", run, "--sample", "3", "--data", "[{source: builtin, name: a}]", "--max_length", "1000000"]) == 0
    )
    assert "| a      | text   |         3 |" in capsys.readouterr().out


REFUSED = [
    ("", "the run names no model or tokenizer. Add --model or --tokenizer"),
    ("absent.yaml", "the first argument 'absent.yaml' is not a file"),
    ("--tokenizer bytes --max_length long", "'long' is not a number of tokens. Write 4096, 64K"),
    ("--tokenizer bytes --heldout_fraction 2", "heldout_fraction=2 must be at least 0 and below 1"),
    ("--tokenizer bytes --sample 0", "--sample 0 must be at least 1 document"),
    ("--tokenizer bytes --context_parallel_size 2 --num_processes 3", "=2 does not divide num_processes=3"),
    ("--tokenizer bytes --packing tight", "packing='tight' is unknown. Choose one of stream, best_fit, separate"),
    ("--tokenizer absent", "there is no folder 'absent' here"),
    ("--learning_rate 1", "unrecognized arguments: --learning_rate"),
    ("--max_len 4", "unrecognized arguments: --max_len"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=[words or "nothing" for words, _ in REFUSED])
def test_what_cannot_be_reported_is_refused_in_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    data = ["--data", write(tmp_path / "a.jsonl", [3, 5])]
    try:
        code = main(["data", *words.split(), *data])
    except SystemExit as stop:  # argparse refuses an option
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and "Traceback" not in error


def test_a_misspelt_key_of_a_file_is_refused(run, capsys):
    with open(run, "a") as file:
        file.write("max_lenght: 5\n")
    assert main(["data", run]) == 2
    assert re.search(r"unknown in .*run.yaml: 'max_lenght' \(did you mean max_length", capsys.readouterr().err)


def test_a_stage_is_reported_by_number_or_name(run, tmp_path, capsys):
    stages = "\ntokens_per_batch: 64\nstages:\n- {max_length: 16}\n- {name: kilo, max_length: 1K}\n"
    stages += "- {name: long, max_length: 32}\n"
    path = tmp_path / "stages.yaml"
    path.write_text((tmp_path / "run.yaml").read_text() + stages)
    for stage, length, sequences in (("1", 16, 4), ("3", 32, 2), ("long", 32, 2)):
        assert main(["data", str(path), "--stage", stage]) == 0
        printed = capsys.readouterr().out
        assert f"sequences of at most {length} tokens" in printed and f"Sequences in a step: {sequences}." in printed
    assert main(["data", str(path), "--stage", "kilo", "--tokens_per_batch", "2K"]) == 0
    assert "1,024 tokens (separate" in capsys.readouterr().out
    for words, message in (
        ([str(path)], "--stage None: the file has the stages 1, kilo, long. Choose one"),
        ([str(path), "--stage", "4"], "--stage 4: the file has the stages 1, kilo, long"),
        ([run, "--stage", "1"], "--stage 1: the file has no list of stages"),
        (
            [str(path), "--stage", "1", "--tokens_per_batch", "60"],
            "tokens_per_batch=60 is no multiple of max_length=16",
        ),
    ):
        assert main(["data", *words]) == 2
        assert message in capsys.readouterr().err


def test_keys_of_training_are_no_misspelt_ones():
    known = {
        field.name: field
        for cls in (RunArguments, DataArguments, ConversationKeys)
        for field in dataclasses.fields(cls)
    }
    classes = (ModelArguments, ParallelArguments, MemoryArguments, ConversationArguments, AdapterArguments, SFTConfig)
    others = {field.name for cls in classes for field in dataclasses.fields(cls)} - set(known)
    assert len(others) > 100
    assert [name for name in sorted(others) if _is_misspelt(name, known)] == []


def test_examples_of_the_help_run(tmp_path, monkeypatch, capsys, run):
    with pytest.raises(SystemExit):
        main(["data", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for key in ("--mixture_tokens", "--attend_across_documents", "as UltraLong trains", "keys of the run"):
        assert key in text
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^    ring-hf (data (?:[^\n]|\n {8})+)", _EXAMPLES, re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line.replace("\\\n", " "))
        assert main([*words, "--sample", "20", "--heldout_fraction", "0"]) == 0
    assert (tmp_path / "data.png").is_file()


@pytest.mark.parametrize(
    ("words", "packing"),
    [
        ("--recipe sft --packing false --format text", "separate"),
        ("--packing true --format text", "best_fit"),
        ("--packing true --packing_strategy wrapped --format text", "stream"),
        ("--recipe finetune", "separate"),
        ("--packing_strategy tight", None),
    ],
)
def test_the_keys_of_the_recipe_for_conversations_are_translated(run, tmp_path, capsys, words, packing):
    code = main(["data", run, "--json", str(tmp_path / "report.json"), *words.split()])
    if packing is None:
        assert code == 2 and "packing='separate', packing_strategy='tight': recipes/sft.py" in capsys.readouterr().err
        return
    assert code == 0 and json.loads((tmp_path / "report.json").read_text())["packing"] == packing


def test_the_built_in_run_files_can_be_reported(capsys):
    for name, words in (("finetune", ["--tokenizer", "bytes"]), ("quickstart/pretrain", [])):
        assert main(["data", str(ROOT / "configs" / f"{name}.yaml"), "--sample", "5", *words]) == 0
        assert "sequences of at most" in capsys.readouterr().out


PAGE = "docs/data.md"


def test_commands_of_the_page_print_and_draw(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    lines = commands(PAGE, "ring-hf", "data")
    assert len(lines) == 2
    for line in lines:
        words = line.replaced(picture=str(tmp_path / "data.png")) if "--picture" in line.words else list(line.words)
        assert main([*words[1:], "--sample", "20"]) == 0
        assert "Work over 4 ranks" in capsys.readouterr().out
    assert (tmp_path / "data.png").is_file()
    (picture,) = re.findall(r"!\[.*?\]\(\.\./(.*?)\)", PAGES[PAGE])
    assert picture in lines[1].words and (ROOT / picture).stat().st_size < 60_000


def test_the_mixture_of_the_page_is_one():
    (block,) = (block for block in BLOCKS if block.page == PAGE and block.language == "yaml")
    mixture = DataArguments(**yaml.safe_load(block.content)).mixture()
    assert [spec.name for spec in mixture.sources] == ["books", "agents", "dataset:part"]
    assert mixture.shares == pytest.approx([0.6, 0.1, 0.3])
    text = PAGES[PAGE]
    assert all(name in text for name in (*OVERLONG, *STOPS, *PACKINGS, "text", "tokens"))
    keys = {field.name for field in dataclasses.fields(DataArguments)}
    assert {"mixture_seed", "stream_buffer", "attend_across_documents", "mask_boundaries"} <= keys & set(
        re.findall(r"\w+", text)
    )
