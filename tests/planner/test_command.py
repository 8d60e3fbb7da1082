"""`ring-hf plan` as a command: report, JSON, pictures, the examples of its help text, and its errors."""

import argparse
import json
import shlex

import numpy
import pytest
from PIL import Image

from ring_hf.cli import main
from ring_hf.planner import plan, plan_command
from ring_hf.planner.memory_estimate import estimate_memory
from ring_hf.planner.optimizers import OPTIMIZERS, PRECISIONS
from ring_hf.planner.plan_report import format_plan
from ring_hf.planner.step_times import estimate_attention, estimate_times
from ring_hf.planner.training_job import OFFLOADS

JOB = ["plan", "--model", "Qwen3-8B", "--seq", "1M", "--lora", "16", "--offload", "layers", "--loss-block", "2048"]


def test_the_report_has_memory_time_and_suggestions(capsys):
    assert main(JOB) == 0
    text = capsys.readouterr().out
    assert "Qwen/Qwen3-8B: 8.19B parameters, 36 layers" in text
    assert "fits: " in text and "longest sequence that fits with these settings: " in text
    for part in ("optimizer states", "MLP backward: ", "attention ", "in a node", "8 x 1 (this job)", "suggestions, "):
        assert part in text
    assert "--checkpoint save-attention --offload layers,attention" in text
    assert all(len(line) <= 130 or line.startswith(("|", "allgather", "ring")) for line in text.splitlines())


def make_job(line):
    parser = argparse.ArgumentParser()
    plan_command.add(parser.add_subparsers())
    return plan_command.make_job(parser.parse_args(shlex.split(line)))


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
def test_suggestions_are_the_plans_with_their_options(line):
    suggestions = plan(make_job(line)).suggestions
    assert len(suggestions) >= 5
    for suggestion in suggestions:
        changed = make_job(f"{line} {suggestion.options}")
        expected = estimate_memory(changed).total, estimate_times(changed).step
        assert (suggestion.memory, suggestion.seconds) == expected, suggestion.options


def split_rows(text):
    """Return the cells (ring x ulysses, transport, seconds, exposed, options) of the table of splits."""
    lines = text.split("| ring x ulysses")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


@pytest.mark.parametrize(
    ("options", "transport"),
    [
        ("--devices 32", "allgather"),
        ("--devices 32 --transport ring", "ring"),
        ("--devices 32 --inner 4", "double_ring of 4"),
        ("--devices 32 --ulysses auto", "ring"),
        ("--devices 8 --model gemma-2-9b", "direct and ring"),
    ],
)
def test_splits_show_this_job_and_the_options_of_others(options, transport):
    line = f"plan --model Llama-3.1-8B --seq 64K {options}"
    training_plan = plan(make_job(line))
    rows = split_rows(format_plan(training_plan))
    (this_job,) = [row for row in rows if "(this job)" in row[0]]
    seconds = {part.name: part.seconds for part in training_plan.times.parts}
    assert this_job[1] == transport and this_job[4] == ""
    assert this_job[2] == f"{seconds['attention'] + seconds['exposed attention communication']:.2f} s"
    degrees = {f"{split.ring} x {split.ulysses}" for split in training_plan.splits}
    assert {row[0].removesuffix(" (this job)") for row in rows} == degrees
    for degree, name, total, exposed, split_options in rows:
        job = make_job(f"{line} {split_options}")
        attention = estimate_attention(job)
        expected = f"{attention.compute + attention.exposed:.2f} s", f"{attention.exposed:.3g} s"
        assert (total, exposed) == expected, split_options
        assert degree.startswith(f"{job.ring} x {job.ulysses}")
        assert job.inner == 1 or name.endswith(f"of {job.inner}")
    if transport in ("allgather", "ring") and "auto" not in options:
        double_ring = ["32 x 1", "double_ring of 8", "--transport double_ring --inner 8"]
        assert double_ring in [row[:2] + row[4:] for row in rows]


def test_tokens_to_hide_communication_are_those_of_a_sequence(capsys):
    tables = []
    for rows in ("1", "4"):
        assert main(["plan", "--model", "Qwen3-8B", "--seq", "64K", "--rows", rows]) == 0
        text = capsys.readouterr().out
        lines = text.split("| tokens per rank to hide")[1].split("\n\n")[0].splitlines()[2:]
        tables.append([[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")])
    batch_of_1, batch_of_4 = tables
    assert batch_of_1[-1] == ["this job", "8,192", "8,192"]
    assert batch_of_4[-1] == ["this job, each sequence", "8,192", "8,192"]
    assert batch_of_1[:-1] == batch_of_4[:-1] and len(batch_of_1) == 4


def test_json_holds_every_number(tmp_path, capsys):
    path = tmp_path / "deep" / "plan.json"
    assert main([*JOB, "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    keys = "command model engine job memory step ring_step thresholds longest splits suggestions cost_ratio_to_4096"
    assert set(record) == set(keys.split())
    assert record["command"][1:] == [*JOB[1:], "--json", str(path)]
    assert record["model"]["parameters"] == 8_190_735_360 and record["job"]["tokens_per_rank"] == 131072
    memory = record["memory"]
    assert set(memory) == {"items", "peak_phase", "allocated", "overhead", "total", "device", "host", "fits"}
    on_device = [item for item in memory["items"] if not item["on_host"]]
    peak = sum(item["num_bytes"] for item in on_device if item["phase"] in ("", memory["peak_phase"]))
    assert peak == pytest.approx(memory["allocated"]) and memory["fits"] is True
    step = record["step"]
    assert step["seconds"] == pytest.approx(sum(part["seconds"] for part in step["parts"]))
    assert {"tokens_per_second_per_device", "mfu", "hfu", "model_flops", "executed_flops"} < set(step)
    assert {split["ulysses"] for split in record["splits"]} == {1, 2, 4, 8}
    assert "8.19B" in capsys.readouterr().out


def examples():
    text = plan_command._EXAMPLES.split("models of the built-in")[0].replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.startswith("    ring-hf")]


def test_the_examples_of_the_help_text_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    config |= {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    commands = examples()
    assert len(commands) == 11
    for command in commands:
        command = [str(tmp_path) if argument == "path/to/folder" else argument for argument in command]
        assert main(command[1:]) == 0, command
    assert capsys.readouterr().err == ""
    assert (tmp_path / "plan.png").is_file() and (tmp_path / "price.png").is_file()


@pytest.mark.parametrize("table", plan_command.TABLES)
def test_tables_are_printed(table, capsys):
    assert main(["plan", "--table", table]) == 0
    text = capsys.readouterr().out
    assert text.startswith("| ") and len(text.splitlines()) > 8


@pytest.mark.parametrize("arguments", [JOB, ["plan", "--table", "appendix-d"], ["plan", "--table", "published"]])
def test_pictures_are_drawn(arguments, tmp_path):
    path = tmp_path / "deep" / "picture.png"
    assert main([*arguments, "--png", str(path)]) == 0
    pixels = numpy.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape[1] > 900 and len(numpy.unique(pixels.astype(int) @ [65536, 256, 1])) > 30
    assert (pixels[:, -1] > 250).all()  # nothing is cut off at the right edge
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
    ("--model Qwen3-8B --ulysses two", "--ulysses 'two' is not a number of ranks"),
    ("--model Qwen2.5-0.5B --devices 16 --ulysses 16", "--ulysses 16: Qwen/Qwen2.5-0.5B has 14 query heads"),
    ("--model Qwen3-8B --inner 3", "--inner 3 cannot cut a ring of 8 ranks"),
    ("--model Qwen3-8B --inner 0", "--inner 0 cannot cut a ring of 8 ranks into several equal rings"),
    ("--model Qwen3-8B --inner -4", "--inner -4 cannot cut a ring of 8 ranks into several equal rings"),
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
        "--optimizer adamw_8bit does not work on FSDP2: bitsandbytes does not support DTensors (its issue 1633: "
        "illegal memory access). Choose one of adamw_torch, adamw_torch_fused, adamw_torch_8bit, adamw_torch_4bit, "
        "rmsprop",
    ),
    ("--model Qwen3-8B --zero 1 --optimizer adafactor", "adafactor does not work on DeepSpeed: it needs the rows"),
    (
        "--model Qwen3-8B --zero 2 --offload optimizer --optimizer lion_8bit",
        "lion_8bit does not work on DeepSpeed with offload: Accelerate replaces every optimizer",
    ),
    ("--model Qwen3-8B --fit --zero 3 --ffn-block 4096", "but --zero --ffn-block was given. Leave one of them out"),
    ("--model Llama-3.1-405B --device a100-40 --seq 64M --fit", "does not fit on 1,024 x A100 40 GB with any memory"),
    ("--model Qwen3-8B --kernel magic", "--kernel 'magic' has no published rate on H100 80 GB. Choose one of auto"),
    ("--model Qwen3-8B --devices 0", "There is nothing to plan with 0 devices"),
    (
        "--model Qwen3-8B --node-bandwidth -1",
        "A bandwidth of -1 bytes/s is not possible. Pass a positive one, or leave",
    ),
    ("--model Qwen3-8B --lora -16", "--lora -16 is not a rank. Pass a positive one, or 0 to train all parameters"),
    ("--table 100m --png x.png", "--png with --table 100m: only appendix-d, published have a picture"),
    ("--table published --json x.json", "--json with --table published: tables are text"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[options for options, _ in REFUSED])
def test_refuses(options, message, capsys):
    assert main(["plan", *options.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ring-hf plan: ") and message in error


def test_the_help_text_names_every_choice(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    text = capsys.readouterr().out
    for name in (*OFFLOADS, *OPTIMIZERS, *PRECISIONS, *plan_command.TABLES, "Qwen3-30B-A3B", "h200"):
        assert name in text
