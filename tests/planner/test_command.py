"""`ring-hf plan` as a command: report, JSON, pictures, its own examples, and what it refuses."""

import argparse
import json
import shlex

import numpy
import pytest
from PIL import Image

from ring_hf.cli import main
from ring_hf.planner import plan, plan_command
from ring_hf.planner.memory_estimate import memory_of
from ring_hf.planner.optimizers import OPTIMIZERS, PRECISIONS
from ring_hf.planner.plan_report import text_of
from ring_hf.planner.step_times import attention_seconds, times_of
from ring_hf.planner.training_job import OFFLOADS

JOB = ["plan", "--model", "Qwen3-8B", "--seq", "1M", "--lora", "16", "--offload", "layers", "--loss-block", "2048"]


def test_the_report_says_what_fits_how_long_and_what_helps(capsys):
    assert main(JOB) == 0
    said = capsys.readouterr().out
    assert "Qwen/Qwen3-8B: 8.19B parameters, 36 layers" in said
    assert "fits: " in said and "the longest that fits with these settings: " in said
    for part in ("optimizer states", "MLP backward: ", "attention ", "in a node", "8 x 1 (this job)", "levers, one"):
        assert part in said
    assert "--checkpoint save-attention --offload layers,attention" in said
    assert all(len(line) <= 130 or line.startswith(("|", "allgather", "ring")) for line in said.splitlines())


def job_of(line):
    parser = argparse.ArgumentParser()
    plan_command.add(parser.add_subparsers())
    return plan_command.job_of(parser.parse_args(shlex.split(line)))


LONG = "plan --model Llama-3.1-8B --seq 128K"


@pytest.mark.parametrize(
    "line",
    [
        LONG,
        f"{LONG} --zero 2 --offload layers,optimizer",
        f"{LONG} --zero 3 --precision bf16-master --optimizer adamw_torch",
        f"{LONG} --zero 3 --precision bf16 --optimizer adamw_torch_8bit",
        f"{LONG} --optimizer adamw_8bit",
        f"{LONG} --zero 1 --optimizer lion_8bit",
        f"{LONG} --checkpoint save-attention --offload attention",
        f"{LONG} --checkpoint save-attention --offload layers,attention --zero 2",
        f"{LONG} --checkpoint none --layout contiguous --zero 3 --offload optimizer,weights",
    ],
)
def test_levers_do_what_they_say_at_the_end_of_the_command(line):
    found = plan(job_of(line)).levers
    assert len(found) >= 5
    for lever in found:
        changed = job_of(f"{line} {lever.options}")
        assert (lever.memory, lever.seconds) == (memory_of(changed).total, times_of(changed).step), lever.options


def split_rows(text):
    """`(ring x ulysses, by, seconds, not hidden, options)` of the table of splits."""
    lines = text.split("| ring x ulysses")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


@pytest.mark.parametrize(
    ("more", "by"),
    [
        ("--devices 32", "allgather"),
        ("--devices 32 --transport ring", "ring"),
        ("--devices 32 --inner 4", "double_ring of 4"),
        ("--devices 32 --ulysses auto", "ring"),
        ("--devices 8 --model gemma-2-9b", "direct and ring"),
    ],
)
def test_splits_show_this_job_as_it_is_and_with_which_options_others_are_had(more, by):
    line = f"plan --model Llama-3.1-8B --seq 64K {more}"
    found = plan(job_of(line))
    rows = split_rows(text_of(found))
    (own,) = [row for row in rows if "(this job)" in row[0]]
    parts = {part.name: part.seconds for part in found.times.parts}
    assert own[1] == by and own[4] == ""
    assert own[2] == f"{parts['attention'] + parts['exchange not hidden']:.2f} s"
    assert {row[0].removesuffix(" (this job)") for row in rows} == {f"{s.ring} x {s.ulysses}" for s in found.splits}
    for ring, way, seconds, exposed, options in rows:
        cut = job_of(f"{line} {options}")
        compute, late, _ = attention_seconds(cut)
        assert (seconds, exposed) == (f"{compute + late:.2f} s", f"{late:.3g} s"), options
        assert ring.startswith(f"{cut.ring} x {cut.ulysses}") and (cut.inner == 1 or way.endswith(f"of {cut.inner}"))
    if by in ("allgather", "ring") and "auto" not in more:
        assert ["32 x 1", "double_ring of 8", "--transport double_ring --inner 8"] in [
            row[:2] + row[4:] for row in rows
        ]


def test_tokens_to_hide_the_exchange_are_those_of_a_row(capsys):
    shown = []
    for rows in ("1", "4"):
        assert main(["plan", "--model", "Qwen3-8B", "--seq", "64K", "--rows", rows]) == 0
        said = capsys.readouterr().out
        table = said.split("| tokens a rank needs")[1].split("\n\n")[0].splitlines()[2:]
        shown.append([[cell.strip() for cell in line.split("|")[1:-1]] for line in table if line.startswith("|")])
    one, four = shown
    assert one[-1] == ["this job", "8,192", "8,192"] and four[-1] == ["this job, of each row", "8,192", "8,192"]
    assert one[:-1] == four[:-1] and len(one) == 4


def test_json_holds_every_number(tmp_path, capsys):
    path = tmp_path / "deep" / "plan.json"
    assert main([*JOB, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert set(found) == {
        *(
            "command",
            "model",
            "engine",
            "job",
            "memory",
            "step",
            "ring_step",
            "thresholds",
            "longest",
            "splits",
            "levers",
        ),
        "cost_ratio_to_4096",
    }
    assert found["command"][1:] == [*JOB[1:], "--json", str(path)]
    assert found["model"]["parameters"] == 8_190_735_360 and found["job"]["tokens_per_rank"] == 131072
    memory = found["memory"]
    assert set(memory) == {"items", "moment", "allocated", "allowance", "total", "device", "host", "fits"}
    now = [i["num_bytes"] for i in memory["items"] if i["moment"] in ("", memory["moment"]) and not i["on_host"]]
    assert sum(now) == pytest.approx(memory["allocated"]) and memory["fits"] is True
    step = found["step"]
    assert step["seconds"] == pytest.approx(sum(part["seconds"] for part in step["parts"]))
    assert {"tokens_per_second_per_device", "mfu", "hfu", "model_flops", "executed_flops"} < set(step)
    assert {s["ulysses"] for s in found["splits"]} == {1, 2, 4, 8}
    assert "8.19B" in capsys.readouterr().out


def examples():
    text = plan_command._EXAMPLES.split("models of the built-in")[0].replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.startswith("    ring-hf")]


def test_the_examples_of_the_help_text_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    config |= {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = examples()
    assert len(found) == 11
    for words in found:
        words = [str(tmp_path) if word == "path/to/folder" else word for word in words]
        assert main(words[1:]) == 0, words
    assert capsys.readouterr().err == ""
    assert (tmp_path / "plan.png").is_file() and (tmp_path / "price.png").is_file()


@pytest.mark.parametrize("table", plan_command.TABLES)
def test_tables_are_printed(table, capsys):
    assert main(["plan", "--table", table]) == 0
    said = capsys.readouterr().out
    assert said.startswith("| ") and len(said.splitlines()) > 8


@pytest.mark.parametrize("words", [JOB, ["plan", "--table", "appendix-d"], ["plan", "--table", "published"]])
def test_pictures_are_drawn(words, tmp_path):
    path = tmp_path / "deep" / "picture.png"
    assert main([*words, "--png", str(path)]) == 0
    pixels = numpy.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape[1] > 900 and len(numpy.unique(pixels.astype(int) @ [65536, 256, 1])) > 30
    assert (pixels[:, -1] > 250).all()  # nothing is cut at the right edge
    assert path.stat().st_size < 120_000


REFUSED = [
    ("--seq 1M", "--model is missing. Name a folder, a config.json or a known model, or ask for a --table"),
    ("--model Qwen3-9B", "'Qwen3-9B' is neither a folder, nor a file, nor a name in the built-in table"),
    ("--model Qwen3-8B --cp 3", "--cp 3 does not divide --devices 8"),
    ("--model Qwen3-8B --cp -8", "--cp -8 does not divide --devices 8"),
    ("--model Qwen3-8B --ulysses 3", "--ulysses 3 does not divide --cp 8"),
    (
        "--model Qwen3-8B --head-chunks 2",
        "busiest rank exchanges no query heads of Qwen/Qwen3-8B. Choose at most 1, or a --ulysses of at least 2.",
    ),
    (
        "--model Qwen3-8B --ulysses 8 --head-chunks 5",
        "the busiest rank exchanges 4 query heads of Qwen/Qwen3-8B. Choose at most 4.",
    ),
    ("--model Qwen3-8B --ulysses two", "--ulysses 'two' is no number of ranks"),
    ("--model Qwen2.5-0.5B --devices 16 --ulysses 16", "--ulysses 16: Qwen/Qwen2.5-0.5B has 14 query heads"),
    ("--model Qwen3-8B --inner 3", "--inner 3 does not cut a ring of 8"),
    ("--model Qwen3-8B --inner 0", "--inner 0 does not cut a ring of 8 into several equal rings"),
    ("--model Qwen3-8B --inner -4", "--inner -4 does not cut a ring of 8 into several equal rings"),
    ("--model Qwen3-8B --inner 2 --transport ring", "--inner 2 means a double ring, but --transport is ring"),
    ("--model Qwen3-8B --transport double_ring", "--transport double_ring needs --inner"),
    ("--model Qwen3-8B --offload disk", "--offload 'disk' is not known. Choose from optimizer, weights"),
    (
        "--model Qwen3-8B --offload attention",
        "--offload attention moves saved attention outputs, but --checkpoint full",
    ),
    (
        "--model Qwen3-8B --checkpoint none --offload layers",
        "--offload layers moves the inputs of checkpointed layers",
    ),
    ("--model Qwen3-8B --zero 2 --offload weights", "--offload weights needs --zero 3, not 2"),
    (
        "--model Qwen3-8B --zero 3 --optimizer adamw_8bit",
        "--optimizer adamw_8bit does not work on FSDP2: bitsandbytes updates no DTensors (its issue 1633: illegal "
        "memory access). Choose one of adamw_torch, adamw_torch_fused, adamw_torch_8bit, adamw_torch_4bit, rmsprop",
    ),
    ("--model Qwen3-8B --zero 1 --optimizer adafactor", "adafactor does not work on DeepSpeed: it takes the rows"),
    (
        "--model Qwen3-8B --zero 2 --offload optimizer --optimizer lion_8bit",
        "lion_8bit does not work on DeepSpeed with offload: Accelerate replaces every optimizer",
    ),
    ("--model Qwen3-8B --fit --zero 3 --ffn-block 4096", "but --zero --ffn-block was given. Leave one of them out"),
    ("--model Llama-3.1-405B --device a100-40 --seq 64M --fit", "does not fit on 1,024 x A100 40 GB with any memory"),
    ("--model Qwen3-8B --kernel magic", "--kernel 'magic' has no published rate on H100 80 GB. Choose one of auto"),
    ("--model Qwen3-8B --devices 0", "There is nothing to plan with 0 devices"),
    ("--model Qwen3-8B --node-bandwidth -1", "A bandwidth of -1 bytes/s moves nothing. Give a positive one, or none"),
    ("--model Qwen3-8B --lora -16", "--lora -16 is no rank. Give a positive one, or 0 to train all parameters"),
    ("--table 100m --png x.png", "--png with --table 100m: there is no picture of it"),
    ("--table published --json x.json", "--json with --table published: tables are text"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=[words for words, _ in REFUSED])
def test_refuses(words, message, capsys):
    assert main(["plan", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ring-hf plan: ") and message in error


def test_the_help_text_names_every_choice(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    said = capsys.readouterr().out
    for name in (*OFFLOADS, *OPTIMIZERS, *PRECISIONS, *plan_command.TABLES, "Qwen3-30B-A3B", "h200"):
        assert name in said
