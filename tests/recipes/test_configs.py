"""Every config is read as its program reads it, and opens with the command, the hardware, the time and what to
expect."""

import importlib
import math
import re
import subprocess
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from arguments import ModelArguments, ParallelArguments, PerplexityArguments, SourceArguments, parse
from sft import ARGUMENTS as SFT
from transformers import TrainingArguments

from ring_hf.hf import ContextParallelConfig
from ring_hf.hf.trainer.engines import collect_messages, find_engine
from tests.support.harness import ROOT

LAUNCHES = {path.name: path for path in sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))}
RUNS = {
    str(path.relative_to(ROOT)): path
    for path in sorted((ROOT / "configs").rglob("*.yaml"))
    if path.parent.name not in ("accelerate", "extend")
}
STAGES = list((ROOT / "configs" / "extend").glob("*.yaml"))  # see test_stage_configs.py
PERPLEXITY = (PerplexityArguments, SourceArguments)


def header(path):
    lines = path.read_text().splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def test_all_configs_are_found():
    assert len(LAUNCHES) == 7
    assert len(RUNS) == 6
    others = 2  # one for Slurm, and a chat template
    assert len(LAUNCHES) + len(RUNS) + len(STAGES) + others == len(list((ROOT / "configs").rglob("*.*")))


@pytest.mark.parametrize("name", LAUNCHES)
def test_launch_configs_are_accepted_by_accelerate(name):
    config = load_config_from_file(str(LAUNCHES[name]))
    # MULTI_GPU is the only type that starts several processes on a CPU as well.
    kinds = {"cpu": "MULTI_GPU", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "hsdp": "FSDP", "zero3": "DEEPSPEED"}
    assert config.distributed_type.value == kinds[name.split("_")[0]]
    sizes = [int(number) for number in re.findall(r"\d+", name.split("_")[1])]
    assert config.num_processes == math.prod(sizes) and config.num_machines == (sizes[0] if len(sizes) > 1 else 1)
    assert config.use_cpu is name.startswith("cpu")
    assert ("Not yet run on a GPU" in re.sub(r"\s*\n# ", " ", header(LAUNCHES[name]))) is ("gpu" in name)


def launched_with(name, monkeypatch):
    """Set the variables that Accelerate's launcher makes of a file, and return the state of an Accelerator."""
    arguments = launch_command_parser().parse_args(["--config_file", str(LAUNCHES[name]), "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ""  # the launcher sets it itself
    variables = (
        prepare_deepspeed_cmd_env(arguments)[1] if arguments.use_deepspeed else prepare_multi_gpu_env(arguments)
    )
    for key, value in variables.items():
        if key.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_")):
            monkeypatch.setenv(key, value)
    if arguments.use_deepspeed:
        kind, plugin = "deepspeed_plugin", DeepSpeedPlugin()
    else:
        kind, plugin = "fsdp_plugin", FullyShardedDataParallelPlugin()
    return SimpleNamespace(
        distributed_type=load_config_from_file(str(LAUNCHES[name])).distributed_type, **{kind: plugin}
    )


@pytest.mark.parametrize(
    ("name", "engine", "settings", "sizes"),
    [
        ("fsdp2_8gpu.yaml", "FSDP2", {"context_parallel_size": 8}, (1, 1, 8)),
        ("fsdp2_8gpu.yaml", "FSDP2", {"context_parallel_size": 4}, (1, 2, 8)),
        ("hsdp_4x8gpu.yaml", "FSDP2", {"context_parallel_size": 16, "dp_replicate_size": 2}, (2, 1, 32)),
        ("hsdp_4x8gpu.yaml", "FSDP2", {"context_parallel_size": 32}, (1, 1, 32)),
        ("zero3_8gpu.yaml", "ZeRO-3", {"context_parallel_size": 8}, (1, 1, 8)),
    ],
)
def test_launch_configs_start_the_engine_they_name(name, engine, settings, sizes, monkeypatch):
    state = launched_with(name, monkeypatch)
    args = TrainingArguments(use_cpu=True, report_to=[])
    args.accelerator_config.gradient_accumulation_kwargs = {"sync_each_batch": True}  # as the recipe does
    row = find_engine(state)
    assert row.name == engine and collect_messages((*row.rules, *row.notices), state, args) == []
    config = ContextParallelConfig(**settings)
    config._fit(sizes[2], row)
    assert (config.dp_replicate_size, config.dp_shard_size, config.total_size) == sizes


def test_the_slurm_script_starts_a_launcher_on_every_machine():
    path = ROOT / "configs" / "slurm" / "finetune.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    paths = re.findall(r"(?:configs|recipes)/[\w/.]+", text)
    assert "configs/accelerate/hsdp_4x8gpu.yaml" in paths and all((ROOT / name).is_file() for name in paths)
    assert "Not yet run\n# on a GPU" in text and text.count('"$@"') == 2


@pytest.mark.parametrize("name", RUNS)
def test_run_configs_hold_only_known_keys_and_sensible_values(name, tmp_path):
    script = next((script for script in ("perplexity", "sft") if script in name), "finetune")
    types = PERPLEXITY if script == "perplexity" else importlib.import_module(script).ARGUMENTS
    extra = [] if script == "perplexity" else ["--model", "some/model"]
    if "model_config" in yaml.safe_load(RUNS[name].read_text()):
        extra = []
    if name == "configs/sft.yaml":
        parsed = parse(SFT, "", [str(RUNS[name]), *extra, "--data", "conversations.jsonl"], use_cpu=True)
        assert parsed[0] == ModelArguments("some/model") and parsed[3] == ParallelArguments(2)
        return
    text = RUNS[name].read_text().replace("bf16: true", "bf16: false")  # which asks for a GPU when it is parsed
    (tmp_path / "run.yaml").write_text(text)
    parsed = parse(types, "", [str(tmp_path / "run.yaml"), *extra], use_cpu=True)
    assert parsed[0] != types[0](**({} if script == "perplexity" else {"model": "some/model"}))


@pytest.mark.parametrize("name", RUNS)
def test_run_configs_open_with_command_hardware_time_and_expectation(name):
    text = header(RUNS[name])
    assert name in text
    words = ["Hardware: ", "Time: ", "Expect: "]
    for word in words if "quickstart" in name else [*words, "Memory: ", "Source: "]:
        assert text.count(word) == 1, f"{word!r} in {name}"
    paths = [word for word in text.split() if word.startswith(("configs/", "recipes/")) and "." in word]
    assert paths
    awaited = {"recipes/sft.py"} if not (ROOT / "recipes" / "sft.py").is_file() else set()
    assert all((ROOT / path.rstrip(".,;:")).is_file() for path in paths if path not in awaited)
