"""Every config is read as its program reads it, and opens with the command, the hardware, the time and what to
expect."""

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from arguments import (
    DataArguments,
    MemoryArguments,
    ModelArguments,
    ParallelArguments,
    PerplexityArguments,
    SourceArguments,
    parse,
)
from transformers import TrainingArguments

from tests.harness import ROOT

LAUNCHES = {path.name: path for path in sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))}
RUNS = {
    str(path.relative_to(ROOT)): path
    for path in sorted((ROOT / "configs").rglob("*.yaml"))
    if path.parent.name != "accelerate"
}
FINETUNE = (ModelArguments, DataArguments, ParallelArguments, MemoryArguments, TrainingArguments)
PERPLEXITY = (PerplexityArguments, SourceArguments)


def header(path):
    lines = path.read_text().splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def test_all_configs_are_found():
    assert len(LAUNCHES) == 4
    assert len(RUNS) == 4
    assert len(LAUNCHES) + len(RUNS) == len(list((ROOT / "configs").rglob("*.*")))


@pytest.mark.parametrize("name", LAUNCHES)
def test_launch_configs_are_accepted_by_accelerate(name):
    config = load_config_from_file(str(LAUNCHES[name]))
    assert config.distributed_type.value == "MULTI_GPU"  # the only type that starts several processes on a CPU as well
    assert str(config.num_processes) in name
    assert config.use_cpu is name.startswith("cpu")
    assert ("Not yet run on a GPU" in header(LAUNCHES[name])) is ("gpu" in name)


@pytest.mark.parametrize("name", RUNS)
def test_run_configs_hold_only_known_keys_and_sensible_values(name):
    script = "perplexity" if "perplexity" in name else "finetune"
    types, extra = (PERPLEXITY, []) if script == "perplexity" else (FINETUNE, ["--model", "some/model"])
    if "model_config" in yaml.safe_load(RUNS[name].read_text()):
        extra = []
    parsed = parse(types, "", [str(RUNS[name]), *extra], use_cpu=True)
    assert parsed[0] != types[0](**({} if script == "perplexity" else {"model": "some/model"}))


@pytest.mark.parametrize("name", RUNS)
def test_run_configs_open_with_command_hardware_time_and_expectation(name):
    text = header(RUNS[name])
    assert name in text
    for word in ("Hardware: ", "Time: ", "Expect: "):
        assert text.count(word) == 1, f"{word!r} in {name}"
    paths = [word for word in text.split() if word.startswith(("configs/", "recipes/")) and "." in word]
    assert paths
    assert all((ROOT / path.rstrip(".,;:")).is_file() for path in paths)
