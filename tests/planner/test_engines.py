"""A plan assumes an engine that training accepts, names it first, and refuses settings that no engine can run."""

import json
import re
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch.nn.parallel import DistributedDataParallel

from ring_hf import ContextParallelConfig
from ring_hf.cli import main
from ring_hf.planner import TrainingJob, read_model
from ring_hf.planner.engine_bytes import DDP, ENGINES, FSDP2, HSDP, ONE_PROCESS, ZERO, select_engine
from ring_hf.planner.memory_estimate import estimate_memory, trained_parameters
from ring_hf.planner.published import RUNS
from tests.planner.live import LiveTensorTracker
from tests.support.harness import run_distributed

QWEN = read_model("Qwen3-8B")
# Accelerate's type of each engine, and the stage of ZeRO.
KINDS = {
    "DDP": (DistributedType.MULTI_GPU, 0),
    "FSDP2": (DistributedType.FSDP, 0),
    "HSDP (FSDP2)": (DistributedType.FSDP, 0),
    **{f"DeepSpeed ZeRO-{zero}": (DistributedType.DEEPSPEED, zero) for zero in (1, 2, 3)},
}


def training_accepts(kind, zero):
    """Return whether a configuration for 2 ranks refuses 3 processes, instead of the engine."""
    plugins = {"fsdp_plugin": SimpleNamespace(fsdp_version=2), "deepspeed_plugin": SimpleNamespace(zero_stage=zero)}
    plugins["fsdp_plugin"].mixed_precision_policy = None
    state = SimpleNamespace(distributed_type=kind, **plugins)
    accelerator = SimpleNamespace(state=state, device=torch.device("cpu"), num_processes=3)
    with pytest.raises(ValueError) as refusal:
        ContextParallelConfig(context_parallel_size=2)._validate_accelerator(accelerator)
    return "3 processes" in str(refusal.value)


def test_training_accepts_every_engine_that_a_plan_assumes():
    assert {engine.name for engine in ENGINES} == {*KINDS, ONE_PROCESS.name}
    assert all(training_accepts(*kind) for kind in KINDS.values())
    assert not training_accepts(DistributedType.DEEPSPEED, 0) and not training_accepts(DistributedType.MEGATRON_LM, 0)


@pytest.mark.parametrize(
    ("settings", "engine", "weights"),
    [
        ({}, DDP, 4),
        ({"devices": 1}, ONE_PROCESS, 4),
        ({"offload": ("layers",)}, DDP, 4),
        ({"precision": "bf16"}, DDP, 2),
        ({"zero": 1}, ZERO[1], 2),
        ({"zero": 2, "offload": ("optimizer",)}, ZERO[2], 2),
        ({"zero": 3}, FSDP2, 4),
        ({"zero": 3, "precision": "bf16"}, FSDP2, 2),
        ({"zero": 3, "dp_replicate": 2, "cp": 4}, HSDP, 4),
        ({"zero": 3, "offload": ("optimizer", "weights")}, FSDP2, 4),
        ({"zero": 3, "precision": "bf16-master"}, ZERO[3], 2),
        ({"zero": 3, "offload": ("optimizer",)}, ZERO[3], 2),
        ({"zero": 3, "offload": ("optimizer",), "devices": 1}, ZERO[3], 2),
        ({"zero": 3, "offload": ("optimizer", "weights"), "precision": "bf16-master"}, ZERO[3], 2),
    ],
)
def test_states_and_their_precision_say_which_engine_it_is(settings, engine, weights):
    job = TrainingJob(QWEN, 2**20, **settings)
    assert select_engine(job) is engine and job.precision_spec.weights == weights


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero": 3, "dp_replicate": 3, "cp": 4}, "--dp-replicate 3 does not divide the 2 groups of --devices 8"),
        ({"zero": 2, "dp_replicate": 2, "cp": 4}, "--dp-replicate 2 is HSDP, which FSDP2 alone does"),
        ({"zero": 3, "dp_replicate": 2, "cp": 4, "precision": "bf16-master"}, "is HSDP, which FSDP2 alone does"),
        ({"offload": ("optimizer",)}, "--offload optimizer with --zero 0: only DeepSpeed and FSDP2"),
        ({"offload": ("weights", "optimizer")}, "--offload optimizer,weights with --zero 0"),
        ({"zero": 3, "offload": ("weights",)}, "--offload weights needs the optimizer in host memory"),
        ({"precision": "bf16-master"}, "--precision bf16-master is DeepSpeed's, but --zero 0 is DDP"),
        ({"zero": 2, "precision": "fp32"}, "--precision fp32 with --zero 2: DeepSpeed trains with fp32 master"),
        ({"zero": 3, "precision": "bf16", "offload": ("optimizer",)}, "FSDP2 offloads the weights with the optimizer"),
        ({"precision": "half"}, "--precision 'half' is not known. Choose one of auto, fp32, bf16-master, bf16"),
    ],
)
def test_settings_that_no_engine_can_run_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainingJob(QWEN, 2**20, **settings)


@pytest.mark.parametrize(
    ("options", "expected", "verdict"),
    [
        ("", "engine: DDP (--zero 0); every device holds all weights", "does NOT fit: "),
        ("--lora 16", "engine: DDP (--zero 0); every device", "fits: "),
        ("--devices 1 --lora 16", "engine: one process; the device holds", "does NOT fit: "),
        ("--zero 3", "engine: FSDP2 (--zero 3); weights, gradients and optimizer states are sharded", "fits: "),
        ("--zero 2", "engine: DeepSpeed ZeRO-2 (--zero 2); gradients and optimizer states", "fits: "),
        (
            "--zero 3 --offload optimizer,layers",
            "engine: DeepSpeed ZeRO-3 (--zero 3); weights, gradients and optimizer states are sharded over all "
            "devices; in host memory by --offload_optimizer_device cpu: gradients, optimizer states",
            "fits: ",
        ),
        (
            "--zero 3 --offload optimizer,weights,layers",
            "engine: FSDP2 (--zero 3); weights, gradients and optimizer states are sharded over all devices; in host "
            "memory by --fsdp_offload_params true: weights, gradients, optimizer states",
            "fits: ",
        ),
    ],
)
def test_the_first_lines_name_the_engine_and_its_offload(options, expected, verdict, tmp_path, capsys):
    path = tmp_path / "plan.json"
    command = ["plan", "--model", "Qwen3-8B", "--seq", "1M", "--offload", "layers", "--loss-block", "2048"]
    assert main([*command, *options.split(), "--json", str(path)]) == 0
    text = capsys.readouterr().out
    assert expected in " ".join(" ".join(text.splitlines()[:6]).split())
    assert f"\n{verdict}" in text
    assert json.loads(path.read_text())["engine"]["name"] in expected


def bytes_of_ddp(rank, world_size):
    """Return the bytes of the gradients, and the bytes that DDP allocates before there are gradients."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
    weight_bytes = sum(weight.nbytes for weight in layers.parameters())
    with LiveTensorTracker(*layers.parameters()) as live:
        wrapped = DistributedDataParallel(layers)  # with Accelerate's arguments
        # A thread of gloo frees the copy of the weights that DDP broadcasts, some time after the broadcast.
        deadline = time.monotonic() + 10
        while live.now > 1.5 * weight_bytes and time.monotonic() < deadline:
            time.sleep(0.01)
        allocated = live.now
        wrapped(torch.ones(1, 64)).sum().backward()
    return sum(weight.grad.nbytes for weight in layers.parameters()), allocated


def test_ddp_allocates_buckets_as_large_as_the_gradients():
    for gradients, allocated in run_distributed(2, bytes_of_ddp):
        assert gradients <= allocated <= 1.02 * gradients
    for lora in (0, 16):
        items = {item.name: item for item in estimate_memory(TrainingJob(QWEN, 2**20, lora=lora)).items}
        assert items["gradient buckets (DDP)"].num_bytes == 4 * trained_parameters(QWEN, lora)
        assert items["gradient buckets (DDP)"].phase == "" and not items["gradient buckets (DDP)"].on_host
    for settings in ({"devices": 1}, {"zero": 1}, {"zero": 3}):
        assert "gradient buckets (DDP)" not in {
            item.name for item in estimate_memory(TrainingJob(QWEN, 2**20, **settings)).items
        }


def test_published_runs_name_their_stage_of_zero():
    assert {run.job.get("zero") for run in RUNS} == {1, 3}
