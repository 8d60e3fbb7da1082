"""A plan assumes an engine that training accepts, says so first, and refuses what no engine does."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch.nn.parallel import DistributedDataParallel

from ring_hf import ContextParallelConfig
from ring_hf.cli import main
from ring_hf.planner import Job, read_model
from ring_hf.planner.engine_bytes import DDP, ENGINES, FSDP2, ONE_PROCESS, ZERO, engine_of
from ring_hf.planner.memory_estimate import memory_of, trained_parameters
from ring_hf.planner.published import RUNS
from tests.harness import run_distributed
from tests.planner.live import Live

QWEN = read_model("Qwen3-8B")
# What Accelerate calls each engine, and the stage of ZeRO.
KINDS = {
    "DDP": (DistributedType.MULTI_GPU, 0),
    "FSDP2": (DistributedType.FSDP, 0),
    **{f"DeepSpeed ZeRO-{zero}": (DistributedType.DEEPSPEED, zero) for zero in (1, 2, 3)},
}


def training_accepts(kind, zero):
    """Whether three processes for a size of two is what a configuration minds, and not the engine."""
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
        ({"zero": 3, "offload": ("optimizer", "weights")}, FSDP2, 4),
        ({"zero": 3, "precision": "bf16-master"}, ZERO[3], 2),
        ({"zero": 3, "offload": ("optimizer",)}, ZERO[3], 2),
        ({"zero": 3, "offload": ("optimizer",), "devices": 1}, ZERO[3], 2),
        ({"zero": 3, "offload": ("optimizer", "weights"), "precision": "bf16-master"}, ZERO[3], 2),
    ],
)
def test_states_and_their_precision_say_which_engine_it_is(settings, engine, weights):
    job = Job(QWEN, 2**20, **settings)
    assert engine_of(job) is engine and job.precision_facts.weights == weights


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offload": ("optimizer",)}, "--offload optimizer with --zero 0: nothing but DeepSpeed and FSDP2"),
        ({"offload": ("weights", "optimizer")}, "--offload optimizer,weights with --zero 0"),
        ({"zero": 3, "offload": ("weights",)}, "--offload weights needs its optimizer there, too"),
        ({"precision": "bf16-master"}, "--precision bf16-master is DeepSpeed's, but --zero 0 is DDP"),
        ({"zero": 2, "precision": "fp32"}, "--precision fp32 with --zero 2: DeepSpeed trains with fp32 master"),
        ({"zero": 3, "precision": "bf16", "offload": ("optimizer",)}, "FSDP2 offloads weights with it"),
        ({"precision": "half"}, "--precision 'half' is not known. Choose one of auto, fp32, bf16-master, bf16"),
    ],
)
def test_what_no_engine_does_is_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Job(QWEN, 2**20, **settings)


@pytest.mark.parametrize(
    ("words", "expected", "verdict"),
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
def test_the_first_lines_name_the_engine_and_its_offload(words, expected, verdict, tmp_path, capsys):
    path = tmp_path / "plan.json"
    command = ["plan", "--model", "Qwen3-8B", "--seq", "1M", "--offload", "layers", "--loss-block", "2048"]
    assert main([*command, *words.split(), "--json", str(path)]) == 0
    text = capsys.readouterr().out
    assert expected in " ".join(" ".join(text.splitlines()[:6]).split())
    assert f"\n{verdict}" in text
    assert json.loads(path.read_text())["engine"]["name"] in expected


def bytes_of_ddp(rank, world_size):
    """(bytes of the gradients, bytes that DDP allocates before any gradient is there)."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
    with Live(*layers.parameters()) as live:
        wrapped = DistributedDataParallel(layers)  # as Accelerate makes it
        allocated = live.now
        wrapped(torch.ones(1, 64)).sum().backward()
    return sum(weight.grad.nbytes for weight in layers.parameters()), allocated


def test_buckets_are_as_large_as_the_gradients_as_ddp_allocates_them():
    for gradients, allocated in run_distributed(2, bytes_of_ddp):
        assert gradients <= allocated <= 1.02 * gradients
    for lora in (0, 16):
        items = {item.name: item for item in memory_of(Job(QWEN, 2**20, lora=lora)).items}
        assert items["gradient buckets (DDP)"].num_bytes == 4 * trained_parameters(QWEN, lora)
        assert items["gradient buckets (DDP)"].moment == "" and not items["gradient buckets (DDP)"].on_host
    for settings in ({"devices": 1}, {"zero": 1}, {"zero": 3}):
        assert "gradient buckets (DDP)" not in {item.name for item in memory_of(Job(QWEN, 2**20, **settings)).items}


def test_published_runs_name_the_stage_they_were_made_with():
    assert {run.job.get("zero") for run in RUNS} == {1, 3}
