"""Every command and code block of the README runs: long ones with a model and a number of steps made for a test."""

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
from tests.harness import ROOT, accelerate_launch, run_command

README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
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


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """What stands in for a model of the user's."""
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


def words(number, **replaced):
    """A command of the README, with what stands for the user's own replaced; everything replaced must have been
    there."""
    found = shlex.split(COMMANDS[number].replace("\\\n", " "))
    for old, new in replaced.items():
        key = "--" + old
        assert key in found, f"{key} in {COMMANDS[number]}"
        found[found.index(key) + 1] = new
    return found


def test_all_commands_and_blocks_are_found():
    assert len(COMMANDS) == 14
    assert len(blocks("diff")) == 1
    assert README.count("```") == 2 * (len(COMMANDS) + len(blocks("diff")) + 2)  # and a report, and the file tree


def test_quickstart_runs_all_of_its_steps(tmp_path):
    assert COMMANDS[0] == "scripts/quickstart\n"
    small = ["--pretrain_steps", "2", "--extend_steps", "1", "--max_windows", "1", "--output_dir", str(tmp_path)]
    done = run_command(["scripts/quickstart", *small], env={"RING_HF_VENV": sys.prefix})
    for number in "1234":
        assert f"== {number}/4" in done.stdout
    table = (tmp_path / "perplexity.md").read_text()
    assert all(f"\n| {name} " in table for name in ("trained at 256", "extended to 2,048"))
    assert table.splitlines()[0] in done.stdout.rsplit("== 4/4", 1)[1]
    assert (tmp_path / "perplexity.png").read_bytes().startswith(b"\x89PNG")


def test_test_command_runs_lint_types_and_tests(tmp_path):
    assert COMMANDS[1] == "scripts/test\n"
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("ruff", "mypy", "python"):  # each says what it was asked to do
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $*"\n')
        (programs / name).chmod(stat.S_IRWXU)
    for script in ("scripts/test", ".ci/run"):
        lines = run_command([script, "-k", "zigzag"], env={"RING_HF_VENV": str(tmp_path)}).stdout.splitlines()
        called = [line for line in lines if not line.startswith("==")]
        assert called == ["ruff check .", "ruff format --check .", "mypy ", "python -m pytest -k zigzag"]


def test_an_environment_that_is_none_is_refused():
    with pytest.raises(AssertionError, match="RING_HF_VENV=/nowhere holds no bin/python"):
        run_command(["scripts/test"], env={"RING_HF_VENV": "/nowhere"})


def test_fine_tuning_commands_train_and_save(model, corpus, tmp_path):
    for number, processes in ((2, 2), (3, 8)):
        output = tmp_path / str(number)
        command = words(number, model=model, output_dir=str(output))
        launch = yaml.safe_load((ROOT / command[command.index("--config_file") + 1]).read_text())
        assert launch["num_processes"] == processes
        if processes > 2:  # eight processes are too many for a small machine: two of them, on the CPU, in fp32
            command[command.index("--config_file") + 1] = "configs/accelerate/cpu_2proc.yaml"
            command += ["--context_parallel_size", "2", "--bf16", "false"]
        program = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]
        run_command([*program, *command[1:], "--data", corpus, *TRAIN])
        assert (output / "model.safetensors").is_file()


def test_perplexity_command_writes_table_and_plot(model, corpus, tmp_path):
    command = words(4, output_dir=str(tmp_path))
    models = command.index("--models")
    assert [word.split("=")[0] for word in command[models + 1 : models + 3]] == ["before", "after"]
    command[models + 1 : models + 3] = [f"before={model}", f"after={model}"]
    small = ["--data", corpus, "--lengths", "32", "64", "--max_windows", "2"]
    run_command([sys.executable, *command[1:], *small])
    assert "| after " in (tmp_path / "perplexity.md").read_text()


def test_pictures_are_drawn_by_the_commands_beside_them(tmp_path):
    drawn = re.sub(r"<!-- measured: .*?<!-- end measured -->", "", README, flags=re.DOTALL)  # results have no command
    shown = re.findall(r"!\[.*?\]\((.*?)\)", drawn)
    commands = {words(n)[-1]: words(n, output=str(tmp_path / f"{n}.png")) for n in (5, 6, 7, 8)}
    commands |= {words(13)[-1]: words(13, png=str(tmp_path / "13.png"))}
    assert set(shown) == set(commands) and len(shown) == 5
    for path, command in commands.items():
        assert command[:2] in (["ring-hf", "show"], ["ring-hf", "plan"])
        assert main(command[1:]) == 0
        old, new = (ROOT / path).read_bytes(), (tmp_path / command[-1]).read_bytes()
        assert old.startswith(b"\x89PNG") and new.startswith(b"\x89PNG") and len(old) < 60_000


def test_the_simulated_table_is_what_its_command_prints(capsys):
    command = words(9)
    assert command[:2] == ["ring-hf", "simulate"]
    assert main(command[1:]) == 0
    said = capsys.readouterr().out
    excerpt = re.search(r"<!-- simulated: (.*?) -->\n(.*?)<!-- end simulated -->", README, re.DOTALL)
    assert excerpt is not None and excerpt[1] == " ".join(command[2:])
    names, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in excerpt[2].splitlines())
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines()]
    table = [line for line in lines if len(line) == 11]
    columns = [table[0].index(name) for name in names]
    assert rows == [[line[column] for column in columns] for line in table[2:]]


def test_the_examination_has_the_shape_of_what_its_command_prints(capsys):
    command = words(10)
    assert command[:2] == ["ring-hf", "doctor"]
    excerpt = re.search(r"<!-- examined: (.*?) -->\n```text\n(.*?)```\n<!-- end examined -->", README, re.DOTALL)
    assert excerpt is not None and excerpt[1] == " ".join(command[2:])
    assert main([*command[1:], "--timeout", "250"]) == 0  # a busy machine starts processes slowly
    said = capsys.readouterr().out

    said = said[said.index("kernels\n") :]
    sections = re.compile(r"^[a-z]+", re.MULTILINE)
    assert sections.findall(excerpt[2]) == sections.findall(said)
    assert re.findall(r"^    (\w+)  ", excerpt[2], re.MULTILINE) == list(KERNELS)
    said_layers = re.findall(r"^  gemma2, .*$", said, re.MULTILINE)
    assert len(said_layers) == 2 and re.findall(r"^  gemma2, .*$", excerpt[2], re.MULTILINE) == said_layers


def test_the_planned_table_is_of_the_one_its_command_prints(capsys):
    command = words(13)
    excerpt = re.search(r"<!-- planned: (.*?) -->\n(.*?)<!-- end planned -->", README, re.DOTALL)
    assert excerpt is not None and " ".join(command[2:]).startswith(excerpt[1])
    assert main(["plan", *shlex.split(excerpt[1])]) == 0
    said = [[cell.strip() for cell in line.split("|")[1:6]] for line in capsys.readouterr().out.splitlines()]
    names, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in excerpt[2].splitlines())
    assert names in said and len(rows) >= 10
    assert [row for row in rows if row not in said] == []


def test_the_planned_run_fits_with_the_engine_that_trains_and_the_text_says_what_others_take(capsys):
    command = words(12)
    full = [word for word in command[1:] if word not in ("--lora", "16")]
    assert len(full) == len(command) - 3
    text = README.split(shlex.join(command) + "\n```\n")[1].split("\n\n")[0].replace("\n", " ")
    for arguments, engine, verdict, sentence in (
        (command[1:], "engine: DDP (--zero 0);", r"\nfits: (\d+)", "with {} GiB to spare"),
        (full, "engine: DDP (--zero 0);", r"\ndoes NOT fit: (\d+)", "therefore {} GiB too much"),
        ([*full, "--zero", "3"], "engine: FSDP2 (--zero 3);", r"\nfits: (\d+)", "leave {} GiB to spare"),
    ):
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        (number,) = re.findall(verdict, printed)
        assert engine in printed and sentence.format(number) in text


def test_the_diff_trains_with_two_processes(model, tmp_path):
    body = "\n".join(line[1:] for line in blocks("diff")[0].splitlines())
    assert body.count("context_parallel_size=8") == 1
    assert sum(line.startswith("+") for line in blocks("diff")[0].splitlines()) == 4
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


def test_the_file_tree_names_what_exists():
    tree = README.rsplit("```\n", 2)[1]
    folder, found = ROOT, 0
    for line in tree.splitlines():
        name = line.split()[0]
        nested = line.startswith("  ")
        folder = folder if nested else (ROOT / name if name.endswith("/") else ROOT)
        assert (folder / ("" if name.endswith("/") and not nested else name)).exists(), line
        found += 1
    assert found >= 20
    packages = {path.name + "/" for path in (ROOT / "ring_hf").iterdir() if (path / "__init__.py").is_file()}
    assert packages <= set(tree.split())


def test_names_in_the_text_exist():
    import ring_hf

    names = set(re.findall(r"ring_hf\.([A-Za-z_]+)\b", README))
    assert names == {"ContextParallelConfig", "ContextParallelCollator", "context_attention", "memory"}
    assert all(hasattr(ring_hf, name) for name in names)
    paths = set(re.findall(r"\b(?:configs|recipes|scripts)/[A-Za-z0-9_/-]+(?:\.(?:yaml|py|md|png))?", README)) - {
        "scripts/"
    }
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert missing == []
    assert len(paths) >= 6
