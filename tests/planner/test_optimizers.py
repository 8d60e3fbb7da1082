"""The table of optimizers: the Trainer's names, and the bytes that each really keeps after a step."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from ring_hf.planner import Job, read_model
from ring_hf.planner.memory_estimate import memory_of, optimizer_bytes
from ring_hf.planner.optimizers import DEFAULT, OPTIMIZERS, PRECISIONS, works_on
from tests.harness import ROOT, run_distributed

LLAMA = read_model("Llama-3.1-8B")
HIDDEN = 512
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Names of the Trainer that the planner leaves out, and why.
LEFT_OUT = {
    "another device than a GPU": ["adamw_torch_xla", "adamw_torch_npu_fused"],
    "its package, torchdistx, is no longer developed": ["adamw_anyprecision"],
    "a rank, and names of modules, decide its states": [
        *(f"galore_{kind}" for kind in ("adamw", "adamw_8bit", "adafactor")),
        *(f"galore_{kind}_layerwise" for kind in ("adamw", "adamw_8bit", "adafactor")),
        *("apollo_adamw", "apollo_adamw_layerwise"),
    ],
    "it updates weights inside the backward pass, where no gradient is left to reduce": ["lomo", "adalomo"],
    "weights of training and of evaluation differ, which no engine here knows": [
        "schedule_free_adamw",
        "schedule_free_radam",
        "schedule_free_sgd",
    ],
    "the states of its package are not known here": ["grokadamw", "stable_adamw"],
}
MADE = ("torch", "transformers", "bitsandbytes")
ON_CPU = [name for name, row in OPTIMIZERS.items() if row.package in MADE and not name.startswith("paged_ademamix")]


def test_names_are_the_trainers_and_those_left_out_say_why():
    left_out = [name for names in LEFT_OUT.values() for name in names]
    assert sorted([*OPTIMIZERS, *left_out]) == sorted(name.value for name in OptimizerNames)
    assert TrainingArguments(use_cpu=True).optim == DEFAULT


def make(name, parameters):
    arguments = TrainingArguments(optim=name, use_cpu=True, report_to=[])
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return kind(parameters, **settings)


def bytes_kept(optimizer):
    """Bytes of a rank, without the counters of steps and the 256 values that 8 bits stand for."""
    states = (item for state in optimizer.state.values() for item in state.items())
    tensors = [value for name, value in states if name not in ("step", "qmap1", "qmap2")]
    parts = [value.to_local() if isinstance(value, DTensor) else value for value in tensors if torch.is_tensor(value)]
    return sum(part.numel() * part.element_size() for part in parts)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_an_optimizer_keeps_what_the_table_says(name, precision):
    row = OPTIMIZERS[name]
    bias = row.package != "bitsandbytes"  # which keeps the states of few numbers in fp32
    layers = torch.nn.Sequential(
        torch.nn.Linear(HIDDEN, 3 * HIDDEN, bias=False), torch.nn.Linear(3 * HIDDEN, HIDDEN, bias=bias)
    )
    layers = layers.to(DTYPES[precision])
    optimizer = make(name, layers.parameters())
    layers(torch.ones(2, HIDDEN, dtype=DTYPES[precision])).sum().backward()
    optimizer.step()
    parameters = sum(weight.numel() for weight in layers.parameters())
    expected = row.bytes_in_all(PRECISIONS[precision], parameters, 0, HIDDEN, HIDDEN)
    kept = bytes_kept(optimizer)
    if row.factored:  # at most, and a bias has no rows and columns
        assert 0.5 * expected < kept - 4 * HIDDEN <= expected
    else:
        assert kept == expected
        assert row.bits or kept == parameters * row.numbers * DTYPES[precision].itemsize


def test_the_rows_of_one_package_are_compared_with_its_source_alone():
    """It is not in the development environment; with it there, the test above should make them."""
    constraints = (ROOT / "constraints.txt").read_text().lower()
    assert {row.package for row in OPTIMIZERS.values()} == {*MADE, "torchao"}
    assert "torch==" in constraints and "bitsandbytes==" in constraints and "torchao" not in constraints
    assert len(ON_CPU) == len([row for row in OPTIMIZERS.values() if row.package in MADE]) - 2


def steps_on_shards(rank, world_size):
    """For each optimizer, bytes that a rank keeps for parameters of FSDP2, or None if it cannot update them."""
    mesh, kept = init_device_mesh("cpu", (world_size,)), {}
    for name in (name for name, row in OPTIMIZERS.items() if row.package in ("torch", "transformers")):
        layer = torch.nn.Linear(HIDDEN, HIDDEN, bias=False)
        fully_shard(layer, mesh=mesh)
        optimizer = make(name, layer.parameters())
        layer(torch.ones(2, HIDDEN)).sum().backward()
        try:
            optimizer.step()
            kept[name] = bytes_kept(optimizer)
        except RuntimeError as error:
            assert "mixed torch.Tensor and DTensor" in str(error)
            kept[name] = None
    return kept


def test_what_works_on_shards_keeps_a_share():
    for kept in run_distributed(2, steps_on_shards):
        assert len(kept) == 6 and {name: works_on(name, False, False) for name in kept} == {
            name: number is not None for name, number in kept.items()
        }
        for name, number in kept.items():
            if number is not None:
                assert number == OPTIMIZERS[name].bytes_of(PRECISIONS["fp32"]) * HIDDEN * HIDDEN / 2


def test_scales_of_blocks_and_embeddings_in_fp32_are_counted():
    P, embeddings = LLAMA.parameters, LLAMA.vocab * LLAMA.hidden
    assert optimizer_bytes(Job(LLAMA, 8192, optimizer="adamw_torch_8bit")) == 2 * P * (1 + 4 / 256)
    assert optimizer_bytes(Job(LLAMA, 8192, optimizer="adamw_torch_4bit")) == 2 * P * (1 / 2 + 4 / 256)
    of_layers = P - embeddings  # the head is no embedding
    assert optimizer_bytes(Job(LLAMA, 8192, optimizer="adamw_8bit")) == 2 * of_layers * (1 + 4 / 256) + 8 * embeddings
    flat = optimizer_bytes(Job(LLAMA, 8192, optimizer="adamw_8bit", zero=3, precision="bf16-master"))
    assert flat == 2 * P * (1 + 4 / 256) + 4 * P  # DeepSpeed hands over flat partitions
    assert optimizer_bytes(Job(LLAMA, 8192, optimizer="lion_8bit", lora=8)) < 0.01 * P


def test_a_factored_optimizer_keeps_next_to_nothing():
    job = Job(LLAMA, 8192, optimizer="adafactor")
    assert 0 < optimizer_bytes(job) < 0.01 * LLAMA.parameters
    (item,) = [item for item in memory_of(job).items if item.name == "optimizer states"]
    assert item.num_bytes == optimizer_bytes(job)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_can_be_planned_where_it_works(name):
    for deepspeed in (False, True):
        for offload in ((), ("optimizer", "weights")):
            settings = {"zero": 3, "offload": offload, "precision": "bf16-master" if deepspeed else "fp32"}
            if works_on(name, deepspeed, bool(offload)):
                assert Job(LLAMA, 8192, optimizer=name, **settings).optimizer == name
            else:
                with pytest.raises(ValueError, match=f"--optimizer {name} does not work on "):
                    Job(LLAMA, 8192, optimizer=name, **settings)
    assert memory_of(Job(LLAMA, 8192, optimizer=name)).total > 0
