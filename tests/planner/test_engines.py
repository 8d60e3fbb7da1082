"""A plan assumes the engine that training accepts, says so first, and says what training refuses."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch.nn.parallel import DistributedDataParallel

from ring_hf import ContextParallelConfig
from ring_hf.cli import main
from ring_hf.planner import Job, plan, read_model
from ring_hf.planner.engine import DEEPSPEED, ENGINES, ONE_PROCESS, engine_of
from ring_hf.planner.memory import memory_of, trained_parameters
from ring_hf.planner.published import RUNS
from ring_hf.planner.report import text_of
from tests.harness import run_distributed
from tests.planner.live import Live

QWEN = read_model("Qwen3-8B")
# What Accelerate calls the engines of each stage of ZeRO.
KINDS = {
    0: (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU),
    1: (DistributedType.DEEPSPEED,),
    2: (DistributedType.DEEPSPEED,),
    3: (DistributedType.FSDP, DistributedType.DEEPSPEED),
}


def training_accepts(kind, zero):
    """Whether three processes for a size of two is what a configuration minds, and not the engine."""
    plugins = {"fsdp_plugin": SimpleNamespace(fsdp_version=2), "deepspeed_plugin": SimpleNamespace(zero_stage=zero)}
    state = SimpleNamespace(distributed_type=kind, **plugins)
    accelerator = SimpleNamespace(state=state, device=torch.device("cpu"), num_processes=3)
    with pytest.raises(ValueError) as refusal:
        ContextParallelConfig(context_parallel_size=2)._validate_accelerator(accelerator)
    return "3 processes" in str(refusal.value)


@pytest.mark.parametrize("zero", ENGINES)
def test_the_table_of_engines_is_what_training_accepts(zero):
    assert set(KINDS) == set(ENGINES) and not DEEPSPEED.trains
    assert not training_accepts(DistributedType.DEEPSPEED, 0) and not training_accepts(DistributedType.MEGATRON_LM, 0)
    assert ENGINES[zero].trains == any(training_accepts(kind, zero) for kind in KINDS[zero])


def test_a_plan_assumes_what_training_accepts_unless_told_otherwise():
    assert engine_of(Job(QWEN, 2**20)) is ENGINES[0] and ENGINES[0].name == "DDP"
    assert engine_of(Job(QWEN, 2**20, devices=1)) is ONE_PROCESS
    assert engine_of(Job(QWEN, 2**20, zero=3)) is ENGINES[3]


@pytest.mark.parametrize(
    ("settings", "engine"),
    [
        ({"offload": ("optimizer",)}, DEEPSPEED),
        ({"offload": ("optimizer",), "devices": 1}, DEEPSPEED),
        ({"optimizer": "adamw-bf16-master"}, DEEPSPEED),
        ({"offload": ("optimizer",), "zero": 1}, ENGINES[1]),
        ({"offload": ("weights",), "zero": 3, "devices": 1}, ENGINES[3]),
        ({"offload": ("layers",)}, ENGINES[0]),
    ],
)
def test_what_an_engine_offloads_or_keeps_in_bf16_is_not_ddp(settings, engine):
    assert engine_of(Job(QWEN, 2**20, **settings)) is engine


@pytest.mark.parametrize(
    ("words", "expected", "verdict"),
    [
        ("", "engine: DDP (--zero 0); training accepts it; every device holds all weights", "\ndoes NOT fit: "),
        ("--lora 16", "engine: DDP (--zero 0); training accepts it", "\nfits: "),
        ("--devices 1 --lora 16", "engine: one process; training accepts it; the device holds", "\ndoes NOT fit: "),
        (
            "--zero 3",
            "engine: FSDP2 or DeepSpeed ZeRO-3 (--zero 3); training accepts it; weights, gradients and",
            "\nfits: ",
        ),
        ("--zero 2", "engine: DeepSpeed ZeRO-2 (--zero 2); training accepts it", "\ndoes NOT fit: "),
        (
            "--offload optimizer,layers",
            "engine: DeepSpeed without ZeRO (--zero 0); training REFUSES it: add --zero 1, 2 or 3",
            "\nwith an engine that training refuses, does NOT fit: ",
        ),
    ],
)
def test_the_first_lines_name_the_engine_and_whether_training_accepts_it(words, expected, verdict, tmp_path, capsys):
    path = tmp_path / "plan.json"
    command = ["plan", "--model", "Qwen3-8B", "--seq", "1M", "--offload", "layers", "--loss-block", "2048"]
    assert main([*command, *words.split(), "--json", str(path)]) == 0
    text = capsys.readouterr().out
    assert expected in " ".join(" ".join(text.splitlines()[:5]).split())
    assert verdict in text
    engine = json.loads(path.read_text())["engine"]
    assert engine["name"] in expected and engine["trains"] == ("training accepts it" in expected)


def test_levers_that_training_refuses_come_last_under_a_heading_of_their_own():
    sharded = "shard weights, gradients, states"
    accepted, refused = text_of(plan(Job(QWEN, 2**20))).split("\nlevers, one at a time:\n")[1].split("\nwith engines")
    assert refused.startswith(" that training refuses:\n")
    assert sharded not in refused and "optimizer states and gradients to host memory" in refused
    assert "--lora 16" in accepted and sharded in accepted and "optimizer states and" not in accepted
    levers = plan(Job(QWEN, 2**20)).levers
    assert [lever.trains for lever in levers] == sorted((lever.trains for lever in levers), reverse=True)
    # A job that training refuses has nothing to set apart, and one with ZeRO nothing that is refused.
    for settings in ({"offload": ("optimizer",)}, {"zero": 3}):
        assert "with engines that training refuses" not in text_of(plan(Job(QWEN, 2**20, **settings)))


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
    for settings in ({"devices": 1}, {"zero": 1}, {"zero": 3}, {"offload": ("optimizer",)}):
        assert "gradient buckets (DDP)" not in {item.name for item in memory_of(Job(QWEN, 2**20, **settings)).items}


def test_published_runs_name_the_stage_they_were_made_with():
    assert {run.job.get("zero") for run in RUNS} == {1, 3}
