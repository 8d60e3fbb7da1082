"""What a plan prints to be run: the recipe's parser reads its YAML, Accelerate's launcher its command."""

import re
import shlex
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from arguments import DataArguments, MemoryArguments, ModelArguments, ParallelArguments, parse
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import TrainingArguments

from ring_hf.hf.trainer.engines import find_engine
from ring_hf.memory import MemoryConfig
from ring_hf.planner import Job, plan, read_model
from ring_hf.planner.engine_bytes import engine_of
from ring_hf.planner.launch_command import FILES, gaps_of, launch_of, launch_text, run_of
from ring_hf.planner.plan_report import text_of
from tests.harness import ROOT

QWEN = read_model("Qwen3-8B")
FINETUNE = (ModelArguments, DataArguments, ParallelArguments, MemoryArguments, TrainingArguments)
SAVED = {"checkpoint": "save-attention", "offload": ("layers", "attention"), "ffn_block": 4096, "loss_block": 2048}
ON_HOST = {"zero": 3, "offload": ("optimizer", "weights")}
JOBS = {
    "one": {"devices": 1, "checkpoint": "none"},
    "one-zero": {"devices": 1, "zero": 3, "offload": ("optimizer",)},
    "ddp-2": {"devices": 2, "optimizer": "adamw_8bit"},
    "ddp-8": {"cp": 4, "rows": 2, "precision": "bf16"},
    "ddp-3": {"devices": 3, "layout": "striped", "transport": "ring"},
    "ddp-16": {"devices": 16, "transport": "direct"},
    "zero1-8": {"zero": 1, "checkpoint": "none"},
    "zero2-4": {"zero": 2, "devices": 4, "offload": ("optimizer", "layers")},
    "zero3-8": {"zero": 3, "precision": "bf16-master", "cp": 4, "ulysses": 2},
    "zero3-host": {**ON_HOST, "precision": "bf16-master"},
    "zero3-16": {"zero": 3, "precision": "bf16-master", "devices": 16},
    "fsdp-8": {"zero": 3, **SAVED, "kernel": "cuda_cudnn", "optimizer": "adamw_torch_8bit"},
    "fsdp-bf16": {"zero": 3, "precision": "bf16", "cp": 4},
    "fsdp-host": ON_HOST,
    "fsdp-fused": {"zero": 3, "fused": True},
    "fsdp-4": {"zero": 3, "devices": 4},
    "fsdp-32": {"zero": 3, "devices": 32, "inner": 8},
    "fsdp-16": {"zero": 3, "devices": 16},
}


def printed(job):
    """(YAML, words of the command) of a report."""
    text = text_of(plan(job)).split("\nto run it, as plan.yaml:\n")[1]
    values, command = text.split("\nand with it\n")
    return values, shlex.split(re.sub(r"<[^>]*>", "0", command).replace("\\\n", " "))


def parsed(job, folder):
    (folder / "plan.yaml").write_text(printed(job)[0])
    return parse(FINETUNE, "", [str(folder / "plan.yaml")], use_cpu=True, output_dir=str(folder))


@pytest.mark.parametrize("name", JOBS)
def test_the_recipe_reads_the_yaml_and_does_what_was_planned(name, tmp_path):
    job = Job(QWEN, 2**17, **JOBS[name])
    model, data, parallel, memory, training = parsed(job, tmp_path)
    assert (model.model, data.max_length) == ("Qwen/Qwen3-8B", 2**17)
    assert (training.optim, training.per_device_train_batch_size) == (job.optimizer, job.rows)
    assert (model.dtype, training.bf16) == (("bfloat16", False) if job.precision == "bf16" else ("float32", True))
    assert training.use_liger_kernel == job.fused
    if job.fused:
        assert training.liger_kernel_config == {"fused_linear_cross_entropy": False}
    assert model.attn_implementation == f"ring_{job.layout}"
    config = parallel.config()
    replicas = 1 if engine_of(job).family == "fsdp2" else job.dp  # FSDP2 shards over all devices
    assert (config.context_parallel_size, config.dp_replicate_size) == (job.cp, replicas)
    assert (config.ulysses_size or 1, config.inner_ring_size or 1) == (job.ulysses, job.inner)
    assert (config.transport, config.kernel) == (job.transport, job.kernel)
    attention = {"none": "none", "full": "recompute", "save-attention": "save"}[job.checkpoint]
    kept = [name for name in ("layers", "attention") if name in job.offload]
    offload = {0: None, 1: kept[0] if kept else None, 2: "all"}[len(kept)]
    assert memory.config() == MemoryConfig(attention, offload, job.ffn_block or None, job.loss_block or None)


def launched_with(words, monkeypatch):
    """Set the variables that Accelerate's launcher makes of a command; return its arguments and an engine's plugin."""
    arguments = launch_command_parser().parse_args(words)
    arguments, _, _ = _validate_launch_command(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ""  # the launcher sets it itself
    prepared = prepare_deepspeed_cmd_env(arguments)[1] if arguments.use_deepspeed else prepare_multi_gpu_env(arguments)
    for key, value in prepared.items():
        if key.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_")):
            monkeypatch.setenv(key, value)
    if arguments.use_deepspeed:
        return arguments, DistributedType.DEEPSPEED, {"deepspeed_plugin": DeepSpeedPlugin()}
    if arguments.use_fsdp:
        return arguments, DistributedType.FSDP, {"fsdp_plugin": FullyShardedDataParallelPlugin()}
    return arguments, DistributedType.MULTI_GPU, {}


@pytest.mark.parametrize("name", [name for name in JOBS if name != "one"])
def test_accelerate_starts_the_engine_and_the_offload_that_were_planned(name, monkeypatch):
    job = Job(QWEN, 2**17, **JOBS[name])
    words = printed(job)[1]
    assert words[:2] == ["accelerate", "launch"]
    assert words[words.index("recipes/finetune.py") + 1] == "plan.yaml" and (ROOT / "recipes/finetune.py").is_file()
    words[words.index("--config_file") + 1] = str(ROOT / words[words.index("--config_file") + 1])
    arguments, kind, plugins = launched_with(words[2:], monkeypatch)
    assert (arguments.num_processes, arguments.num_machines) == (job.devices, -(-job.devices // 8))
    assert arguments.mixed_precision == "no"  # which is the run's to say
    state = SimpleNamespace(distributed_type=kind, **plugins)
    assert find_engine(state).name == engine_of(job).name.removeprefix("DeepSpeed ")
    if arguments.num_machines > 1:
        assert str(arguments.main_process_port) == "29500" and str(arguments.machine_rank) == "0"
    if arguments.use_deepspeed:
        zero = state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        device = {
            name: zero[f"offload_{key}"]["device"] for key, name in (("optimizer", "optimizer"), ("param", "weights"))
        }
        assert {name for name, where in device.items() if where == "cpu"} == {"optimizer", "weights"} & set(
            job.offload
        )
    if arguments.use_fsdp:
        assert isinstance(state.fsdp_plugin.cpu_offload, CPUOffloadPolicy) == ("weights" in job.offload)


def test_one_process_is_started_by_python():
    assert printed(Job(QWEN, 2**17, devices=1))[1][:3] == ["python", "recipes/finetune.py", "plan.yaml"]


def test_files_are_those_of_their_sizes_and_all_for_gpus_are_used():
    names = {name: key for files in FILES.values() for key, name in files.items()}
    folder = ROOT / "configs" / "accelerate"
    assert set(names) == {path.name for path in folder.glob("*gpu.yaml")} and len(names) == 5
    for name, (num_machines, each) in names.items():
        config = yaml.safe_load((folder / name).read_text())
        assert (config["num_machines"], config["num_processes"]) == (num_machines, num_machines * each)
    exact = {**JOBS["fsdp-32"], "inner": 1}
    for settings in (JOBS["ddp-2"], JOBS["ddp-8"], JOBS["zero3-8"], JOBS["fsdp-8"], exact):
        assert "--num_processes" not in launch_of(Job(QWEN, 2**17, **settings))


def test_what_the_recipe_cannot_be_told_is_said():
    job = Job(QWEN, 2**17, lora=16, fp8=True, fused=True, ffn_block=4096)
    assert len(gaps_of(job)) == 3
    text = launch_text(job)
    for gap in gaps_of(job):
        assert f"  # not in it: {gap}\n" in text
    assert yaml.safe_load(text.split("yaml:\n")[1].split("\nand with it")[0])["model"] == QWEN.name
    assert gaps_of(Job(QWEN, 2**17, zero=3, **SAVED)) == []


def test_only_what_differs_from_automatic_is_written():
    keys = set(run_of(Job(QWEN, 2**17)))
    assert keys.isdisjoint({"transport", "kernel", "ulysses_size", "inner_ring_size", "memory_offload", "dtype"})
    assert keys >= {"model", "max_length", "context_parallel_size", "memory_attention", "optim", "bf16"}
