"""The config: the sources of its values, the fields that Accelerate reads, and the mesh that distributes the data."""

import json
import pickle
from typing import NamedTuple

import pytest
import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from ring_hf.hf import ContextParallelCollator, ContextParallelConfig, context
from ring_hf.hf.batch_metadata import METADATA_KEY
from ring_hf.hf.trainer.engines import ENGINES
from tests.hf.models import llama, rank_of, rows
from tests.support.harness import run_distributed


def test_inherited_sizes_stay_one_in_any_environment(monkeypatch):
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "4")
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "1")
    config = ContextParallelConfig(context_parallel_size=2)
    assert (config.cp_size, config.sp_size, config.tp_size) == (1, 1, 1)
    assert not (config.cp_enabled or config.sp_enabled or config.tp_enabled)
    assert config.context_parallel_size == 2 and config.active_mesh_dims == ["cp"]


@pytest.mark.parametrize("name", ["TP_SIZE", "SP_SIZE"])
def test_other_parallelism_in_the_environment_is_refused(monkeypatch, name):
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{name}", "2")
    with pytest.raises(ValueError, match=f"PARALLELISM_CONFIG_{name}=2 .* is not supported together"):
        ContextParallelConfig(context_parallel_size=2)


def test_unset_fields_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("RING_HF_CONTEXT_PARALLEL_SIZE", "2")
    monkeypatch.setenv("RING_HF_DP_REPLICATE_SIZE", "3")
    monkeypatch.setenv("RING_HF_OVERLAP", "false")
    monkeypatch.setenv("RING_HF_KERNEL", "reference")
    monkeypatch.setenv("RING_HF_TRANSPORT", "direct")
    monkeypatch.setenv("RING_HF_ULYSSES_SIZE", "auto")
    config = ContextParallelConfig()
    assert (config.context_parallel_size, config.dp_replicate_size, config.total_size) == (2, 3, 6)
    assert config.overlap is False and config.kernel == "reference" and config.transport == "direct"
    assert config.ulysses_size == "auto" and config.inner_ring_size == 1
    assert config.active_mesh_dims == ["dp_replicate", "cp"]
    assert ContextParallelConfig(context_parallel_size=4, overlap=True).context_parallel_size == 4
    monkeypatch.setenv("RING_HF_TRANSPORT", "double_ring")
    for name in ("ULYSSES_SIZE", "INNER_RING_SIZE", "HEAD_CHUNKS"):
        monkeypatch.setenv(f"RING_HF_{name}", "2")
    config = ContextParallelConfig(context_parallel_size=8)
    assert (config.transport, config.ulysses_size, config.inner_ring_size) == ("double_ring", 2, 2)
    assert config.head_chunks == 2 and config.to_json()["head_chunks"] == 2


@pytest.mark.parametrize("kernel", ["flash_attn", "cuda", "flash_attn_3", "kernels-community/vllm-flash-attn3"])
def test_kernel_names_are_checked_without_importing_kernels(kernel, monkeypatch):
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"{name} is imported"))
    assert ContextParallelConfig(context_parallel_size=2, kernel=kernel).kernel == kernel


def test_defaults_are_resolved_later():
    config = ContextParallelConfig(context_parallel_size=4)
    assert (config.transport, config.ulysses_size, config.inner_ring_size) == ("auto", None, 1)
    assert config.head_chunks == 1


def test_cp_size_of_an_accelerate_file_is_the_default_size(monkeypatch):
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "4")
    assert ContextParallelConfig().context_parallel_size == 4
    monkeypatch.setenv("RING_HF_CONTEXT_PARALLEL_SIZE", "2")
    assert ContextParallelConfig().context_parallel_size == 2


def test_replicas_follow_from_the_number_of_processes():
    config = ContextParallelConfig(context_parallel_size=2)
    config._fit(8, ENGINES["DDP"])
    assert config.dp_replicate_size == 4 and config.total_size == 8


@pytest.mark.parametrize(
    ("config_sizes", "expected_sizes"),
    [
        ({}, (1, 4)),
        ({"dp_replicate_size": 2}, (2, 2)),
        ({"dp_shard_size": 4}, (1, 4)),
        ({"dp_replicate_size": 4}, (4, 1)),
    ],
    ids=str,
)
def test_fsdp2_shards_over_the_remaining_ranks(config_sizes, expected_sizes):
    config = ContextParallelConfig(context_parallel_size=2, **config_sizes)
    config._fit(8, ENGINES["FSDP2"])
    num_replicas, num_shards = expected_sizes
    assert (config.dp_replicate_size, config.dp_shard_size, config.total_size) == (num_replicas, num_shards, 8)
    assert config.dp_shard_cp_dim_names == (["dp_shard", "cp"] if num_shards > 1 else ["cp"])
    assert config.fsdp_dim_names == (["dp_replicate"] if num_replicas > 1 else []) + ["dp_shard_cp"]


def test_sizes_come_from_an_accelerate_file(monkeypatch):
    for name, size in (("CP_SIZE", "2"), ("DP_SHARD_SIZE", "2"), ("DP_REPLICATE_SIZE", "1")):
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{name}", size)
    config = ContextParallelConfig()
    assert config._requested == (None, 2)  # the launcher sets 1 if a file has no value
    config._fit(4, ENGINES["FSDP2"])
    assert (config.dp_replicate_size, config.dp_shard_size, config.context_parallel_size) == (1, 2, 2)


def test_trackers_get_plain_values_and_pickles_have_no_mesh():
    config = ContextParallelConfig(context_parallel_size=2)
    config.device_mesh = object()
    json.dumps(config.to_json())
    restored = pickle.loads(pickle.dumps(config))
    assert restored.device_mesh is None and restored.context_parallel_size == 2
    assert "context_parallel_size=2" in repr(config)


def test_size_one_trains_in_a_single_process(tmp_path):
    model = llama()
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        parallelism_config=ContextParallelConfig(context_parallel_size=1),
    )
    data = rows(9, 12, 7, 20)
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data, data_collator=ContextParallelCollator(model))
    trainer.train()
    assert context.current() is None and trainer.evaluate()["eval_loss"] > 0
    assert trainer.args.to_dict()["parallelism_config"]["context_parallel_size"] == 1


class TrainerMesh(NamedTuple):
    """The mesh of a Trainer, this rank's coordinates, and the first token of every row that it reads, by batch."""

    dim_names: tuple[str, ...]
    shape: tuple[int, ...]
    replica: int
    context_rank: int
    first_tokens: tuple[tuple[int, ...], ...]


def build_trainer(rank, world_size, context_parallel_size):
    model = llama()
    args = TrainingArguments(
        output_dir="unused",
        use_cpu=True,
        report_to=[],
        per_device_train_batch_size=2,
        parallelism_config=ContextParallelConfig(context_parallel_size=context_parallel_size),
    )
    data = [{"input_ids": [n] * 8} for n in range(1, 17)]
    trainer = Trainer(model, args, train_dataset=data, data_collator=ContextParallelCollator(model))
    mesh = trainer.accelerator.state.device_mesh
    first_tokens = tuple(tuple(batch["input_ids"][:, 0].tolist()) for batch in trainer.get_train_dataloader())
    current = context.current()
    context.activate(None)
    restored = pickle.loads(pickle.dumps(args))
    assert restored.parallelism_config.device_mesh is None
    return TrainerMesh(mesh.mesh_dim_names, tuple(mesh.shape), current.replica, current.rank, first_tokens)


@pytest.mark.parametrize(("cp", "dp"), [(4, 1), (2, 2)])
def test_ranks_of_a_group_read_the_same_rows_and_replicas_read_others(cp, dp):
    results = run_distributed(4, build_trainer, cp)
    for rank, result in enumerate(results):
        assert result.dim_names[-1] == "cp" and result.shape[-1] == cp
        assert (result.replica, result.context_rank) == divmod(rank, cp)
        assert result.first_tokens == results[rank - rank % cp].first_tokens
    distinct = {result.first_tokens for result in results}
    assert len(distinct) == dp
    tokens = sorted(token for batches in distinct for batch in batches for token in batch)
    assert tokens == list(range(1, 17))


def test_metadata_is_not_copied_by_loaders_that_pin_and_move():
    """Neither torch's pinning nor Accelerate's transfer may touch objects that are not tensors."""
    with rank_of(2, 0):
        collator = ContextParallelCollator(llama())
        (batch,) = DataLoader(rows(16, 16), batch_size=2, collate_fn=collator)
        moved = send_to_device(batch, torch.device("cpu"), non_blocking=True)
    assert moved[METADATA_KEY] is batch[METADATA_KEY]
