"""Checkpoints that are not whole are never taken for whole ones, whatever was cut off or is missing."""

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import trainer as transformers_trainer

from ring_hf.hf import find_damage, last_checkpoint
from ring_hf.hf.trainer.whole_checkpoints import MANIFEST, UNFINISHED, take_whole_checkpoints


def write_checkpoint(folder, num_processes=2, zero=False):
    """Write what a Trainer writes, with small tensors."""
    folder.mkdir(parents=True)
    tensors = {"weight": torch.arange(50.0)}
    save_file(tensors, folder / "model.safetensors")
    for rank in range(num_processes):
        torch.save(tensors, folder / ("rng_state.pth" if num_processes == 1 else f"rng_state_{rank}.pth"))
        if zero:
            (folder / "global_step2").mkdir(exist_ok=True)
            torch.save(tensors, folder / f"global_step2/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    if not zero:
        torch.save(tensors, folder / "optimizer.pt")
    (folder / MANIFEST).write_text(json.dumps({"num_processes": num_processes}))
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 2}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


CONTENTS = sorted(["model.safetensors", "rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "trainer_state.json"])
ZERO = [f"global_step2/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([*((False, name) for name in CONTENTS), *((True, name) for name in ZERO)]), st.floats(0, 0.999))
def test_a_file_that_is_cut_off_anywhere_is_detected(folder, file, fraction):
    is_zero, name = file
    checkpoint = folder / f"whole {is_zero}"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, zero=is_zero)
    assert find_damage(checkpoint) is None
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: int(fraction * len(content))])
    damage = find_damage(checkpoint)
    (checkpoint / name).write_bytes(content)
    assert damage is not None and ("is cut off" in damage or "no readable" in damage)


@pytest.mark.parametrize(
    ("missing", "zero", "damage"),
    [
        ("trainer_state.json", False, "no readable trainer_state.json"),
        ("rng_state_0.pth", False, "rank 0 has not written"),
        ("rng_state_1.pth", False, "rank 1 has not written"),
        (ZERO[1], True, "has not the shards of 2 ranks"),
    ],
)
def test_a_missing_file_is_detected(tmp_path, missing, zero, damage):
    checkpoint = write_checkpoint(tmp_path / "checkpoint-2", zero=zero)
    (checkpoint / missing).unlink()
    assert damage in (find_damage(checkpoint) or "whole")


def test_other_unfinished_checkpoints_are_detected(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint-2")
    (checkpoint / UNFINISHED).touch()
    assert UNFINISHED in find_damage(checkpoint)
    (checkpoint / UNFINISHED).unlink()
    (checkpoint / "pytorch_model_fsdp_0").mkdir()
    (checkpoint / "pytorch_model_fsdp_0/__0_0.distcp").touch()
    assert find_damage(checkpoint) == "shards without .metadata"
    (checkpoint / "pytorch_model_fsdp_0/.metadata").touch()
    assert find_damage(checkpoint) is None
    index = {"weight_map": {"weight": "model-2-of-2.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert find_damage(checkpoint) == "model-2-of-2.safetensors is missing"


@pytest.mark.parametrize("num_processes", [1, 4])
def test_without_a_manifest_the_ranks_must_be_in_sequence(tmp_path, num_processes):
    checkpoint = write_checkpoint(tmp_path / "checkpoint-2", num_processes)
    (checkpoint / MANIFEST).unlink()
    assert find_damage(checkpoint) is None
    if num_processes > 1:
        (checkpoint / "rng_state_1.pth").unlink()
        assert find_damage(checkpoint) == "rank 1 has not written its state"


def test_the_last_whole_checkpoint_is_taken_also_by_the_trainer(tmp_path, caplog):
    for step in (8, 10, 12):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-12/trainer_state.json").unlink()
    shutil.copytree(tmp_path / "checkpoint-12", tmp_path / "checkpoint-14.old")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert "checkpoint-12 is not whole (no readable trainer_state.json)" in caplog.text
    original = transformers_trainer.get_last_checkpoint
    try:
        assert original(str(tmp_path)).endswith("checkpoint-12")
        take_whole_checkpoints()
        assert transformers_trainer.get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-10")
        assert transformers_trainer.get_last_checkpoint(str(tmp_path / "checkpoint-8")) is None
    finally:
        transformers_trainer.get_last_checkpoint = original
