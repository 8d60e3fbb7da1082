"""The table of optimizers: the Trainer's names, and the bytes that each optimizer really keeps after a step."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from ring_hf.planner import TrainingJob, read_model
from ring_hf.planner.memory_estimate import estimate_memory, optimizer_bytes
from ring_hf.planner.optimizer_table import make_optimizer_table
from ring_hf.planner.optimizers import DEFAULT_OPTIMIZER, OPTIMIZERS, PRECISIONS, supports_engine
from tests.support.harness import ROOT, run_distributed

LLAMA = read_model("Llama-3.1-8B")
HIDDEN = 512
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Names of the Trainer that the planner does not have, and why.
UNSUPPORTED = {
    "another device than a GPU": ["adamw_torch_xla", "adamw_torch_npu_fused"],
    "its package, torchdistx, is no longer developed": ["adamw_anyprecision"],
    "its states depend on a rank and on names of modules": [
        *(f"galore_{kind}" for kind in ("adamw", "adamw_8bit", "adafactor")),
        *(f"galore_{kind}_layerwise" for kind in ("adamw", "adamw_8bit", "adafactor")),
        *("apollo_adamw", "apollo_adamw_layerwise"),
    ],
    "it updates weights inside the backward, which leaves no gradients to reduce": ["lomo", "adalomo"],
    "weights of training and of evaluation differ, which no engine here supports": [
        "schedule_free_adamw",
        "schedule_free_radam",
        "schedule_free_sgd",
    ],
    "the states of its package are not known here": ["grokadamw", "stable_adamw"],
}
TESTED_PACKAGES = ("torch", "transformers", "bitsandbytes")
ON_CPU = [
    name
    for name, spec in OPTIMIZERS.items()
    if spec.package in TESTED_PACKAGES and not name.startswith("paged_ademamix")
]


def test_names_are_the_trainers_except_unsupported_ones():
    unsupported = [name for names in UNSUPPORTED.values() for name in names]
    assert sorted([*OPTIMIZERS, *unsupported]) == sorted(name.value for name in OptimizerNames)
    assert TrainingArguments(use_cpu=True).optim == DEFAULT_OPTIMIZER


def make_optimizer(name, parameters):
    arguments = TrainingArguments(optim=name, use_cpu=True, report_to=[])
    optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return optimizer_class(parameters, **settings)


def state_bytes(optimizer):
    """Return the bytes of states on a rank, without step counters and the 256 values of 8-bit codes."""
    states = (item for state in optimizer.state.values() for item in state.items())
    tensors = [value for name, value in states if name not in ("step", "qmap1", "qmap2")]
    parts = [value.to_local() if isinstance(value, DTensor) else value for value in tensors if torch.is_tensor(value)]
    return sum(part.numel() * part.element_size() for part in parts)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_an_optimizer_keeps_the_bytes_of_the_table(name, precision):
    spec = OPTIMIZERS[name]
    bias = spec.package != "bitsandbytes"  # which keeps the states of small tensors in fp32
    layers = torch.nn.Sequential(
        torch.nn.Linear(HIDDEN, 3 * HIDDEN, bias=False), torch.nn.Linear(3 * HIDDEN, HIDDEN, bias=bias)
    )
    layers = layers.to(DTYPES[precision])
    optimizer = make_optimizer(name, layers.parameters())
    layers(torch.ones(2, HIDDEN, dtype=DTYPES[precision])).sum().backward()
    optimizer.step()
    parameters = sum(weight.numel() for weight in layers.parameters())
    expected = spec.total_bytes(PRECISIONS[precision], parameters, 0, HIDDEN, HIDDEN)
    allocated = state_bytes(optimizer)
    if spec.is_factored:  # expected is a maximum, and a bias has no rows and columns
        assert 0.5 * expected < allocated - 4 * HIDDEN <= expected
    else:
        assert allocated == expected
        assert spec.bits or allocated == parameters * spec.num_states * DTYPES[precision].itemsize


def test_only_torchao_is_not_in_the_environment():
    """If it is installed one day, the test above should also create its optimizers."""
    constraints = (ROOT / "constraints.txt").read_text().lower()
    assert {spec.package for spec in OPTIMIZERS.values()} == {*TESTED_PACKAGES, "torchao"}
    assert "torch==" in constraints and "bitsandbytes==" in constraints and "torchao" not in constraints
    assert len(ON_CPU) == len([spec for spec in OPTIMIZERS.values() if spec.package in TESTED_PACKAGES]) - 2


def steps_on_shards(rank, world_size):
    """Return the bytes that each optimizer keeps on a rank of FSDP2, None if it cannot update its parameters."""
    mesh, allocated = init_device_mesh("cpu", (world_size,)), {}
    for name in (name for name, spec in OPTIMIZERS.items() if spec.package in ("torch", "transformers")):
        layer = torch.nn.Linear(HIDDEN, HIDDEN, bias=False)
        fully_shard(layer, mesh=mesh)
        optimizer = make_optimizer(name, layer.parameters())
        layer(torch.ones(2, HIDDEN)).sum().backward()
        try:
            optimizer.step()
            allocated[name] = state_bytes(optimizer)
        except RuntimeError as error:
            assert "mixed torch.Tensor and DTensor" in str(error)
            allocated[name] = None
    return allocated


def test_optimizers_that_work_on_shards_keep_a_share_of_the_states():
    for allocated in run_distributed(2, steps_on_shards):
        works = {name: num_bytes is not None for name, num_bytes in allocated.items()}
        assert len(works) == 6 and works == {name: supports_engine(name, False, False) for name in works}
        for name, num_bytes in allocated.items():
            if num_bytes is not None:
                assert num_bytes == OPTIMIZERS[name].bytes_per_parameter(PRECISIONS["fp32"]) * HIDDEN * HIDDEN / 2


def test_scales_of_blocks_and_embeddings_in_fp32_are_counted():
    P, embeddings = LLAMA.parameters, LLAMA.vocab * LLAMA.hidden
    assert optimizer_bytes(TrainingJob(LLAMA, 8192, optimizer="adamw_torch_8bit")) == 2 * P * (1 + 4 / 256)
    assert optimizer_bytes(TrainingJob(LLAMA, 8192, optimizer="adamw_torch_4bit")) == 2 * P * (1 / 2 + 4 / 256)
    others = P - embeddings  # the head is not an embedding
    assert (
        optimizer_bytes(TrainingJob(LLAMA, 8192, optimizer="adamw_8bit"))
        == 2 * others * (1 + 4 / 256) + 8 * embeddings
    )
    flat = optimizer_bytes(TrainingJob(LLAMA, 8192, optimizer="adamw_8bit", zero=3, precision="bf16-master"))
    assert flat == 2 * P * (1 + 4 / 256) + 4 * P  # DeepSpeed hands over flat partitions
    assert optimizer_bytes(TrainingJob(LLAMA, 8192, optimizer="lion_8bit", lora=8)) < 0.01 * P


def test_a_factored_optimizer_keeps_almost_nothing():
    job = TrainingJob(LLAMA, 8192, optimizer="adafactor")
    assert 0 < optimizer_bytes(job) < 0.01 * LLAMA.parameters
    (item,) = [item for item in estimate_memory(job).items if item.name == "optimizer states"]
    assert item.num_bytes == optimizer_bytes(job)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_can_be_planned_where_it_works(name):
    for deepspeed in (False, True):
        for offload in ((), ("optimizer", "weights")):
            settings = {"zero": 3, "offload": offload, "precision": "bf16-master" if deepspeed else "fp32"}
            if supports_engine(name, deepspeed, bool(offload)):
                assert TrainingJob(LLAMA, 8192, optimizer=name, **settings).optimizer == name
            else:
                with pytest.raises(ValueError, match=f"--optimizer {name} does not work on "):
                    TrainingJob(LLAMA, 8192, optimizer=name, **settings)
    assert estimate_memory(TrainingJob(LLAMA, 8192, optimizer=name)).total > 0


def test_the_table_of_optimizers_has_the_bytes_of_each_engine():
    lines = [line for line in make_optimizer_table().splitlines() if line.startswith("| ")]
    rows = {name: cells for name, _, *cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)}
    assert rows["AdamW (default)"] == ["4 + 4 + 8", "2 + 4 + 12", "2 + 2 + 4", "DDP, FSDP2, ZeRO"]
    assert rows["8-bit AdamW (bitsandbytes)"] == ["4 + 4 + 2.03", "2 + 4 + 6.03", "2 + 2 + 2.03", "DDP, ZeRO"]
    assert rows["Adafactor"] == ["4 + 4 + 0.01", "-", "2 + 2 + 0.01", "DDP"]
    assert rows["AdamW in host memory"] == ["-", "2 (16 in host memory)", "-", "ZeRO"]
    assert rows["all states in host memory"][-1] == "FSDP2, ZeRO-3"
