"""The launch section of a report: the recipe's parser reads its YAML, Accelerate's launcher its command."""

import re
import shlex
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from arguments import parse
from finetune import ARGUMENTS
from torch.distributed.fsdp import CPUOffloadPolicy

from ring_hf.hf.trainer.engines import find_engine
from ring_hf.memory import MemoryConfig
from ring_hf.planner import TrainingJob, plan, read_model
from ring_hf.planner.engine_bytes import select_engine
from ring_hf.planner.launch_command import (
    FILES,
    format_launch,
    list_unsupported_settings,
    make_launch_command,
    make_recipe_config,
)
from ring_hf.planner.plan_report import format_plan
from tests.support.harness import ROOT

QWEN = read_model("Qwen3-8B")
SAVED = {"checkpoint": "save-attention", "offload": ("layers", "attention"), "ffn_block": 4096, "loss_block": 2048}
ON_HOST = {"zero": 3, "offload": ("optimizer", "weights")}
JOBS = {
    "one": {"devices": 1, "checkpoint": "none"},
    "one-zero": {"devices": 1, "zero": 3, "offload": ("optimizer",)},
    "ddp-2": {"devices": 2, "optimizer": "adamw_8bit"},
    "ddp-8": {"cp": 4, "batch_size": 2, "precision": "bf16"},
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


def printed_launch(job):
    """Return the YAML and the arguments of the command in a report."""
    text = format_plan(plan(job)).split("\nto run this plan, save as plan.yaml:\n")[1]
    values, command = text.split("\nand launch it with:\n")
    return values, shlex.split(re.sub(r"<[^>]*>", "0", command).replace("\\\n", " "))


def parse_printed_yaml(job, folder):
    (folder / "plan.yaml").write_text(printed_launch(job)[0])
    return parse(ARGUMENTS, "", [str(folder / "plan.yaml")], use_cpu=True, output_dir=str(folder))


@pytest.mark.parametrize("name", JOBS)
def test_the_recipe_reads_the_settings_of_the_plan_from_the_yaml(name, tmp_path):
    job = TrainingJob(QWEN, 2**17, **JOBS[name])
    model, data, parallel, memory, _, training = parse_printed_yaml(job, tmp_path)
    assert (model.model, data.max_length) == ("Qwen/Qwen3-8B", 2**17)
    assert (training.optim, training.per_device_train_batch_size) == (job.optimizer, job.batch_size)
    assert (model.dtype, training.bf16) == (("bfloat16", False) if job.precision == "bf16" else ("float32", True))
    assert training.use_liger_kernel == job.fused
    if job.fused:
        assert training.liger_kernel_config == {"fused_linear_cross_entropy": False}
    assert model.attn_implementation == f"ring_{job.layout}"
    config = parallel.config()
    replicas = 1 if select_engine(job).family == "fsdp2" else job.dp  # FSDP2 shards over all devices
    assert (config.context_parallel_size, config.dp_replicate_size) == (job.cp, replicas)
    assert (config.ulysses_size or 1, config.inner_ring_size or 1) == (job.ulysses, job.inner)
    assert (config.transport, config.kernel) == (job.transport, job.kernel)
    attention = {"none": "none", "full": "recompute", "save-attention": "save"}[job.checkpoint]
    activations = [name for name in ("layers", "attention") if name in job.offload]
    offload = {0: None, 1: activations[0] if activations else None, 2: "all"}[len(activations)]
    assert memory.config() == MemoryConfig(attention, offload, job.ffn_block or None, job.loss_block or None)


def simulate_launch(command, monkeypatch):
    """Set the environment variables of Accelerate's launcher; return its arguments, the engine and its plugin."""
    arguments = launch_command_parser().parse_args(command)
    arguments, _, _ = _validate_launch_command(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ""  # the launcher sets it itself
    variables = (
        prepare_deepspeed_cmd_env(arguments)[1] if arguments.use_deepspeed else prepare_multi_gpu_env(arguments)
    )
    for key, value in variables.items():
        if key.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_")):
            monkeypatch.setenv(key, value)
    if arguments.use_deepspeed:
        return arguments, DistributedType.DEEPSPEED, {"deepspeed_plugin": DeepSpeedPlugin()}
    if arguments.use_fsdp:
        return arguments, DistributedType.FSDP, {"fsdp_plugin": FullyShardedDataParallelPlugin()}
    return arguments, DistributedType.MULTI_GPU, {}


@pytest.mark.parametrize("name", [name for name in JOBS if name != "one"])
def test_accelerate_starts_the_engine_and_the_offload_of_the_plan(name, monkeypatch):
    job = TrainingJob(QWEN, 2**17, **JOBS[name])
    command = printed_launch(job)[1]
    assert command[:2] == ["accelerate", "launch"]
    assert (
        command[command.index("recipes/finetune.py") + 1] == "plan.yaml" and (ROOT / "recipes/finetune.py").is_file()
    )
    command[command.index("--config_file") + 1] = str(ROOT / command[command.index("--config_file") + 1])
    arguments, kind, plugins = simulate_launch(command[2:], monkeypatch)
    assert (arguments.num_processes, arguments.num_machines) == (job.devices, -(-job.devices // 8))
    assert arguments.mixed_precision == "no"  # the run decides it
    state = SimpleNamespace(distributed_type=kind, **plugins)
    assert find_engine(state).name == select_engine(job).name.removeprefix("DeepSpeed ")
    if arguments.num_machines > 1:
        assert str(arguments.main_process_port) == "29500" and str(arguments.machine_rank) == "0"
    if arguments.use_deepspeed:
        zero = state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        devices = {"optimizer": zero["offload_optimizer"]["device"], "weights": zero["offload_param"]["device"]}
        offloaded = {name for name, device in devices.items() if device == "cpu"}
        assert offloaded == {"optimizer", "weights"} & set(job.offload)
    if arguments.use_fsdp:
        assert isinstance(state.fsdp_plugin.cpu_offload, CPUOffloadPolicy) == ("weights" in job.offload)


def test_one_process_is_started_by_python():
    assert printed_launch(TrainingJob(QWEN, 2**17, devices=1))[1][:3] == ["python", "recipes/finetune.py", "plan.yaml"]


def test_launch_files_have_their_sizes_and_all_for_gpus_are_used():
    sizes = {name: size for files in FILES.values() for size, name in files.items()}
    folder = ROOT / "configs" / "accelerate"
    assert set(sizes) == {path.name for path in folder.glob("*gpu.yaml")} and len(sizes) == 5
    for name, (num_machines, devices_per_machine) in sizes.items():
        config = yaml.safe_load((folder / name).read_text())
        assert (config["num_machines"], config["num_processes"]) == (num_machines, num_machines * devices_per_machine)
    exact = {**JOBS["fsdp-32"], "inner": 1}
    for settings in (JOBS["ddp-2"], JOBS["ddp-8"], JOBS["zero3-8"], JOBS["fsdp-8"], exact):
        assert "--num_processes" not in make_launch_command(TrainingJob(QWEN, 2**17, **settings))


def test_settings_that_the_recipe_lacks_are_listed():
    job = TrainingJob(QWEN, 2**17, lora=16, fp8=True, fused=True, ffn_block=4096)
    assert len(list_unsupported_settings(job)) == 3
    text = format_launch(job)
    for setting in list_unsupported_settings(job):
        assert f"  # not included: {setting}\n" in text
    assert yaml.safe_load(text.split("yaml:\n")[1].split("\nand launch it")[0])["model"] == QWEN.name
    assert list_unsupported_settings(TrainingJob(QWEN, 2**17, zero=3, **SAVED)) == []


def test_automatic_settings_are_left_out():
    keys = set(make_recipe_config(TrainingJob(QWEN, 2**17)))
    assert keys.isdisjoint({"transport", "kernel", "ulysses_size", "inner_ring_size", "memory_offload", "dtype"})
    assert keys >= {"model", "max_length", "context_parallel_size", "memory_attention", "optim", "bf16"}
