"""Commands of the README and docs/ run as they are written; long ones with a small model and few steps.

`test_documents.py` parses all the other commands.
"""

import pydoc_data.topics
import re
import shlex
import stat
import sys
import textwrap

import pytest
import torch
import yaml
from arguments import ModelArguments
from loading import load_model, load_tokenizer

from ring_hf.cli import main
from ring_hf.kernels import KERNELS
from tests.repository.documents import BLOCKS, PAGES, command, commands, excerpt
from tests.support.harness import ROOT, accelerate_launch, run_command

ALGORITHMS, PLANNER, RECIPES = "docs/algorithms.md", "docs/planner.md", "docs/recipes.md"
MACHINE = "docs/check_your_machine.md"
SMALL = {
    "model_config": {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "tokenizer": "bytes",
    "attn_implementation": "sdpa",
}
TRAIN = ["--max_steps", "1", "--max_length", "64", "--use_cpu", "true"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model in place of the user's."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    args = ModelArguments(**SMALL)
    tokenizer = load_tokenizer(args)
    load_model(args, tokenizer, 64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text"
    path.mkdir()
    for name in sorted(pydoc_data.topics.topics)[:24]:
        (path / f"{name}.txt").write_text(pydoc_data.topics.topics[name][:2000])
    return str(path)


def cells(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_readme_has_the_two_commands_and_the_diff():
    assert [(block.language, block.content) for block in BLOCKS if block.page == "README.md"][1:] == [
        ("bash", "scripts/quickstart\n"),
        ("bash", "scripts/test\n"),
    ]
    assert len(PAGES["README.md"].splitlines()) <= 200


def test_quickstart_runs_all_of_its_steps(tmp_path):
    script = command("README.md", "scripts/quickstart")
    small = ["--pretrain_steps", "2", "--extend_steps", "1", "--max_windows", "1", "--output_dir", str(tmp_path)]
    done = run_command([*script.words, *small], env={"RING_HF_VENV": sys.prefix})
    for number in "1234":
        assert f"== {number}/4" in done.stdout
    table = (tmp_path / "perplexity.md").read_text()
    assert all(f"\n| {name} " in table for name in ("trained at 256", "extended to 2,048"))
    assert table.splitlines()[0] in done.stdout.rsplit("== 4/4", 1)[1]
    assert (tmp_path / "perplexity.png").read_bytes().startswith(b"\x89PNG")


def test_test_command_runs_lint_types_and_tests(tmp_path):
    (script,) = command("README.md", "scripts/test").words
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("ruff", "mypy", "python"):  # each prints its arguments
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $*"\n')
        (programs / name).chmod(stat.S_IRWXU)
    for path in (script, ".ci/run"):
        lines = run_command([path, "-k", "zigzag"], env={"RING_HF_VENV": str(tmp_path)}).stdout.splitlines()
        called = [line for line in lines if not line.startswith("==")]
        assert called == ["ruff check .", "ruff format --check .", "mypy ", "python -m pytest -k zigzag"]


def test_an_environment_without_python_is_refused():
    with pytest.raises(AssertionError, match="RING_HF_VENV=/nowhere holds no bin/python"):
        run_command(["scripts/test"], env={"RING_HF_VENV": "/nowhere"})


def test_fine_tuning_commands_train_and_save(model, corpus, tmp_path):
    launches = commands(RECIPES, "accelerate", "launch")
    assert len(launches) == 2
    for launch, num_processes in zip(launches, (2, 8), strict=True):
        output = tmp_path / str(num_processes)
        words = launch.replaced(model=model, output_dir=str(output))
        config_index = words.index("--config_file") + 1
        assert yaml.safe_load((ROOT / words[config_index]).read_text())["num_processes"] == num_processes
        if num_processes > 2:  # eight processes are too many for a small machine: two of them, on the CPU, in fp32
            words[config_index] = "configs/accelerate/cpu_2proc.yaml"
            words += ["--context_parallel_size", "2", "--bf16", "false"]
        program = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]
        run_command([*program, *words[1:], "--data", corpus, *TRAIN])
        assert (output / "model.safetensors").is_file()


def test_perplexity_command_writes_table_and_plot(model, corpus, tmp_path):
    words = command(RECIPES, "python", "recipes/perplexity.py").replaced(output_dir=str(tmp_path))
    first = words.index("--models") + 1
    assert [word.split("=")[0] for word in words[first : first + 2]] == ["before", "after"]
    words[first : first + 2] = [f"before={model}", f"after={model}"]
    small = ["--data", corpus, "--lengths", "32", "64", "--max_windows", "2"]
    run_command([sys.executable, *words[1:], *small])
    assert "| after " in (tmp_path / "perplexity.md").read_text()


def test_pictures_are_drawn_by_the_commands_beside_them(tmp_path):
    pictures = re.findall(r"!\[.*?\]\(\.\./(.*?)\)", PAGES[ALGORITHMS] + PAGES[PLANNER])
    drawing = {line.words[-1]: line for line in commands(ALGORITHMS, "ring-hf", "show")}
    planning = command(PLANNER, "ring-hf", "plan", "--table", "published")
    assert set(pictures) == {*drawing, planning.words[-1]} and len(pictures) == 5
    new = {path: tmp_path / f"{number}.png" for number, path in enumerate(pictures)}
    lines = {path: line.replaced(output=str(new[path])) for path, line in drawing.items()}
    lines[planning.words[-1]] = planning.replaced(png=str(new[planning.words[-1]]))
    for path, words in lines.items():
        assert main(words[1:]) == 0
        assert (ROOT / path).read_bytes().startswith(b"\x89PNG")
        assert new[path].read_bytes().startswith(b"\x89PNG") and (ROOT / path).stat().st_size < 60_000


def test_the_simulated_table_is_the_output_of_its_command(capsys):
    words = command(PLANNER, "ring-hf", "simulate").words
    arguments, table = excerpt(PLANNER, "simulated")
    assert arguments == " ".join(words[2:]) and main(words[1:]) == 0
    names, _, *rows = map(cells, table.splitlines())
    printed = [row for row in map(cells, capsys.readouterr().out.splitlines()) if len(row) == 11]
    columns = [printed[0].index(name) for name in names]
    assert rows == [[row[column] for column in columns] for row in printed[2:]]


def test_the_diagnosis_has_the_shape_of_its_command_s_output(capsys):
    words = command(MACHINE, "ring-hf", "doctor").words
    arguments, shown = excerpt(MACHINE, "examined")
    assert arguments == " ".join(words[2:])
    assert main([*words[1:], "--timeout", "250"]) == 0  # a busy machine starts processes slowly
    printed = capsys.readouterr().out
    printed = printed[printed.index("kernels\n") :]
    sections = re.compile(r"^[a-z]+", re.MULTILINE)
    shown = shown.removeprefix("```text\n")
    assert sections.findall(shown) == sections.findall(printed)
    assert re.findall(r"^    (\w+)  ", shown, re.MULTILINE) == list(KERNELS)
    printed_layers = re.findall(r"^  gemma2, .*$", printed, re.MULTILINE)
    assert len(printed_layers) == 2 and re.findall(r"^  gemma2, .*$", shown, re.MULTILINE) == printed_layers


def test_the_published_runs_are_rows_of_their_command_s_table(capsys):
    words = command(PLANNER, "ring-hf", "plan", "--table", "published").words
    arguments, table = excerpt(PLANNER, "planned")
    assert " ".join(words[2:]).startswith(arguments) and main(["plan", *shlex.split(arguments)]) == 0
    printed = [cells(line)[:5] for line in capsys.readouterr().out.splitlines()]
    names, _, *rows = map(cells, table.splitlines())
    assert names in printed and len(rows) >= 10
    assert [row for row in rows if row not in printed] == []


def test_the_planned_run_fits_and_the_text_states_what_other_engines_need(capsys):
    words = command(PLANNER, "ring-hf", "plan", "--model").words[1:]
    full = [word for word in words if word not in ("--lora", "16")]
    assert len(full) == len(words) - 2
    text = " ".join(PAGES[PLANNER].split())
    for arguments, engine, verdict, sentence in (
        (words, "engine: DDP (--zero 0);", r"\nfits: (\d+)", "with {} GiB to spare"),
        (full, "engine: DDP (--zero 0);", r"\ndoes NOT fit: (\d+)", "therefore {} GiB too much"),
        ([*full, "--zero", "3"], "engine: FSDP2 (--zero 3);", r"\nfits: (\d+)", "leave {} GiB to spare"),
    ):
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        (number,) = re.findall(verdict, printed)
        assert engine in printed and sentence.format(number) in text


def test_the_table_of_head_chunks_is_what_the_planner_prints(capsys):
    page = "docs/head_chunks.md"
    words = command(page, "ring-hf", "plan").words[1:]
    assert words[-2:] == ("--head-chunks", "4")
    rows = [row for row in map(cells, PAGES[page].splitlines()) if len(row) == 4 and "GiB" in row[1]]
    assert [row[0] for row in rows] == ["1", "2", "4"]
    lengths_on_device = []
    for num_chunks, memory, length, sent in rows:
        arguments = [*words[:-1], num_chunks]
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        (total,) = re.findall(r"\n\| total +\| +([\d.]+) \|.* % \|", printed)
        assert memory == f"{float(total):.1f} GiB"
        assert re.findall(r" tokens \(([\d.]+M)\)", printed) == [length]
        assert re.findall(r"a rank sends (\d+ GB)", printed) == [sent.replace(",", "")]
        assert main(["layers" if argument == "layers,optimizer" else argument for argument in arguments]) == 0
        lengths_on_device += re.findall(r" tokens \(([\d.]+M)\)", capsys.readouterr().out)
    assert "{}, {} and {} tokens fit.".format(*lengths_on_device) in PAGES[page]


def test_the_diff_trains_with_two_processes(model, tmp_path):
    (diff,) = (block.content for block in BLOCKS if block.language == "diff" and block.page == "README.md")
    body = "\n".join(line[1:] for line in diff.splitlines())
    assert body.count("context_parallel_size=8") == 1
    assert sum(line.startswith("+") for line in diff.splitlines()) == 4
    script = f"""
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
        name, output_dir = {model!r}, {str(tmp_path / "out")!r}
        dataset = Dataset.from_dict({{"input_ids": [[i + j for j in range(40)] for i in range(24)]}})
    """
    path = tmp_path / "train.py"
    path.write_text(textwrap.dedent(script) + body.replace("context_parallel_size=8", "context_parallel_size=2"))
    done = accelerate_launch([str(path)], 2, timeout=200)
    assert "'train_loss'" in done.stdout


def test_readme_repeats_numbers_of_the_pages():
    """The results of the README stand in the pages that say how they were measured."""
    rows = [cells(line) for line in PAGES["README.md"].split("## Results")[1].split("##")[0].splitlines()]
    numbers = [number for row in rows if row[:1] for number in re.findall(r"\d[\d,.]*\d", row[-1])]
    pages = PAGES["docs/measurements.md"] + PAGES[PLANNER]
    assert len(numbers) >= 18 and [number for number in numbers if number not in pages] == []
    (families,) = re.findall(r"(\d+) families of models", PAGES["README.md"])
    assert f"{families} families exact" in PAGES["docs/models.md"]
    measured = re.findall(r"\d\.\d+e-\d+", PAGES["README.md"].split("## Exactness")[1].split("## Results")[0])
    assert len(measured) >= 6 and [number for number in measured if number not in PAGES["docs/exactness.md"]] == []
