"""Engines and their settings: selection, refusals and notices before anything runs."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch.distributed.fsdp import MixedPrecision, MixedPrecisionPolicy
from transformers import PreTrainedModel, TrainingArguments

from ring_hf import memory
from ring_hf.hf import ContextParallelConfig
from ring_hf.hf.checks.argument_rules import check_memory
from ring_hf.hf.trainer.engines import (
    ENGINES,
    check_blocks,
    check_engine,
    check_sharded_weights,
    checkpoints_layers,
    collect_messages,
    engine_of,
    find_engine,
    require_gradient_method,
)
from tests.hf.models import llama

BF16 = torch.bfloat16


def fsdp(version=2, **settings):
    plugin = {"fsdp_version": version, "state_dict_type": "StateDictType.FULL_STATE_DICT"}
    plugin |= {"mixed_precision_policy": None, "activation_checkpointing": False}
    return SimpleNamespace(
        distributed_type=DistributedType.FSDP, fsdp_plugin=SimpleNamespace(**{**plugin, **settings}), device_mesh=None
    )


def deepspeed(stage, gathers=True, **config):
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config=config, zero3_save_16bit_model=gathers)
    return SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, deepspeed_plugin=plugin)


def plain(kind):
    return SimpleNamespace(distributed_type=DistributedType[kind])


def accelerator(state, device="cpu"):
    return SimpleNamespace(
        state=state, distributed_type=state.distributed_type, device=torch.device(device), num_processes=2
    )


def arguments(**settings):
    return TrainingArguments(use_cpu=True, report_to=[], **settings)


STATES = {
    "DDP": plain("MULTI_GPU"),
    "FSDP1": fsdp(1),
    "FSDP2": fsdp(2),
    "ZeRO-1": deepspeed(1),
    "ZeRO-2": deepspeed(2),
    "ZeRO-3": deepspeed(3),
}


@pytest.mark.parametrize("name", STATES)
def test_engine_is_selected_from_the_accelerate_state(name):
    assert find_engine(STATES[name]) is ENGINES[name] and check_engine(accelerator(STATES[name])) is None
    assert [engine.name for engine in ENGINES.values() if engine.is_running(STATES[name])] == [name]


def sharded_at_loading(**sizes):
    if not hasattr(PreTrainedModel, "is_distributed_loading_by_transformers"):
        pytest.skip("Transformers before 5.23 cannot train a model that it has sharded while loading it")
    config = {"tp_size": 1, "pp_size": 1, "ep_size": 1, "fsdp_size": 2, "fsdp_mixed_precision": False}
    model = llama("ring_zigzag")
    model._is_distributed_loading_by_transformers = True
    model.config.distributed_config = SimpleNamespace(**{**config, **sizes})
    return model


def context(engine):
    return SimpleNamespace(engine=engine, size=2, num_replicas=2)


def test_model_sharded_at_loading_has_its_own_engine():
    assert set(ENGINES) == {*STATES, "FSDP2 at loading"}
    ddp, model = context("DDP"), sharded_at_loading()
    assert engine_of(ddp, model) is ENGINES["FSDP2 at loading"] and check_sharded_weights(ddp, model) is None
    assert engine_of(ddp, llama("ring_zigzag")) is ENGINES["DDP"]


@pytest.mark.parametrize("name", ["tp_size", "pp_size", "ep_size"])
def test_loading_with_other_parallelism_is_refused_by_name(name):
    message = check_sharded_weights(context("DDP"), sharded_at_loading(**{name: 2}))
    assert f"DistributedConfig({name}=2)" in message and "Load it with DistributedConfig(fsdp_size=4)" in message


def test_sharding_the_same_weights_twice_is_refused():
    message = check_sharded_weights(context("FSDP2"), sharded_at_loading())
    assert "FSDP2 was requested as well" in message


def test_dtensors_of_other_meshes_are_refused():
    model = llama("ring_zigzag")
    assert check_sharded_weights(context("DDP"), model) is None
    model.lm_head.weight.device_mesh = SimpleNamespace(mesh_dim_names=("dp_replicate", "dp_shard_cp"))
    assert "and DDP did not create them" in check_sharded_weights(context("DDP"), model)
    assert check_sharded_weights(context("FSDP2"), model) is None
    for names in (("tp",), ("dp_shard_cp", "tp"), None):
        model.lm_head.weight.device_mesh = SimpleNamespace(mesh_dim_names=names)
        assert "and FSDP2 did not create them" in check_sharded_weights(context("FSDP2"), model)


@pytest.mark.parametrize("kind", ["MEGATRON_LM", "XLA", "MULTI_XPU", "MULTI_NPU"])
def test_other_engines_are_refused_by_name(kind):
    with pytest.raises(ValueError, match=f"The engine {kind} is not proven with context parallelism. Use one of DDP,"):
        ContextParallelConfig(context_parallel_size=2)._validate_accelerator(accelerator(plain(kind)))


def test_fsdp_that_accelerate_would_silently_run_as_ddp_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"FSDP was requested, but Accelerate runs DDP here .it has"):
        ContextParallelConfig(context_parallel_size=2)._validate_accelerator(accelerator(plain("MULTI_CPU")))
    assert check_engine(accelerator(fsdp())) is None


def test_device_that_is_neither_cpu_nor_cuda_is_refused():
    with pytest.raises(ValueError, match="runs on CPU and CUDA devices, but this process has meta"):
        ContextParallelConfig()._validate_accelerator(accelerator(plain("NO"), "meta"))


SHARDED = "StateDictType.SHARDED_STATE_DICT"
BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_steps": 500, "eval_steps": 500}


@dataclass(frozen=True)
class Refusal:
    """Settings that an engine refuses.

    Attributes:
        engine: its name.
        state: Accelerate's state.
        message: a part of the error message.
        arguments: of `TrainingArguments`.
        uses_liger: whether `use_liger_kernel` is set.
    """

    engine: str
    state: SimpleNamespace
    message: str
    arguments: dict[str, Any] = field(default_factory=dict)
    uses_liger: bool = False


REFUSED = {
    "the best of sharded checkpoints": Refusal(
        "FSDP2", fsdp(state_dict_type=SHARDED), "ranks may choose different", arguments=BEST
    ),
    "the best of FSDP1's": Refusal(
        "FSDP1", fsdp(1, state_dict_type=SHARDED), "ranks may choose different ones", arguments=BEST
    ),
    "FSDP1 in bf16": Refusal(
        "FSDP1",
        fsdp(1, mixed_precision_policy=MixedPrecision(param_dtype=BF16, buffer_dtype=BF16)),
        "casts buffers to torch.bfloat16, among them the frequencies of RoPE",
    ),
    "AutoTP": Refusal(
        "ZeRO-2", deepspeed(2, tensor_parallel={"autotp_size": 2}), "autotp_size=2 in the DeepSpeed config"
    ),
    "DeepSpeed's Ulysses": Refusal("ZeRO-3", deepspeed(3, sequence_parallel_size=4), "set context_parallel_size=4"),
    **{
        f"a fused loss on {name}": Refusal(
            name, STATES[name], "reads the weights of the LM head outside of its layer", uses_liger=True
        )
        for name in ("FSDP1", "FSDP2", "ZeRO-3")
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_cannot_be_exact_are_refused(name):
    refusal = REFUSED[name]
    args = arguments(**refusal.arguments)
    args.use_liger_kernel = refusal.uses_liger
    (message,) = collect_messages(ENGINES[refusal.engine].rules, refusal.state, args)
    assert refusal.message in message and ("Set " in message or "Leave it out" in message)


def test_settings_that_are_exact_pass():
    args = arguments(**BEST)
    for name, state in STATES.items():
        assert collect_messages(ENGINES[name].rules, state, args) == []
    args.use_liger_kernel, args.liger_kernel_config = True, {"fused_linear_cross_entropy": False}
    assert collect_messages(ENGINES["FSDP2"].rules, STATES["FSDP2"], args) == []
    fp32 = fsdp(1, mixed_precision_policy=MixedPrecision(param_dtype=torch.float32, buffer_dtype=torch.float32))
    assert collect_messages(ENGINES["FSDP1"].rules, fp32, arguments()) == []


def test_notices_name_memory_costs_and_missing_models():
    accumulated = arguments(gradient_accumulation_steps=2)
    notices = collect_messages(ENGINES["FSDP2"].notices, fsdp(state_dict_type=SHARDED), accumulated)
    assert len(notices) == 2 and "sync_each_batch" in notices[0] and "accelerate merge-weights" in notices[1]
    accumulated.accelerator_config.gradient_accumulation_kwargs = {"sync_each_batch": True}
    assert collect_messages(ENGINES["FSDP2"].notices, fsdp(), accumulated) == []
    (notice,) = collect_messages(ENGINES["ZeRO-3"].notices, deepspeed(3, gathers=False), arguments())
    assert "zero_to_fp32.py" in notice and collect_messages(ENGINES["ZeRO-3"].notices, deepspeed(3), arguments()) == []


def test_fsdp2_casts_weights_only():
    policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=BF16, output_dtype=BF16)
    state = fsdp(mixed_precision_policy=policy)
    ENGINES["FSDP2"].adapt(state, 2)
    adapted = state.fsdp_plugin.mixed_precision_policy
    assert (adapted.param_dtype, adapted.reduce_dtype) == (BF16, torch.float32)
    assert adapted.output_dtype is None and adapted.cast_forward_inputs is False
    state = fsdp()
    ENGINES["FSDP2"].adapt(state, 2)
    assert state.fsdp_plugin.mixed_precision_policy is None


def test_deepspeed_loader_gets_the_mesh_of_ranks_with_equal_rows():
    state = deepspeed(3)
    ENGINES["ZeRO-3"].adapt(state, 4)
    assert state.ds_device_mesh.mesh_dim_names == ("tp",) and state.ds_device_mesh["tp"].size() == 4
    unshared = deepspeed(3)
    ENGINES["ZeRO-3"].adapt(unshared, 1)
    assert not hasattr(unshared, "ds_device_mesh")


def test_sizes_that_an_engine_cannot_take_are_refused():
    with pytest.raises(ValueError, match=r"dp_shard_size=2 cuts weights over the device mesh.*but ZeRO-3 runs here"):
        ContextParallelConfig(context_parallel_size=2, dp_shard_size=2)._fit(8, ENGINES["ZeRO-3"])
    with pytest.raises(ValueError, match=r"dp_replicate_size=3 \* dp_shard_size=1 = 6, but 8 .*product is 4"):
        ContextParallelConfig(context_parallel_size=2, dp_replicate_size=3)._fit(8, ENGINES["FSDP2"])
    with pytest.raises(ValueError, match="leaves no ranks over which FSDP2 could cut the weights"):
        ContextParallelConfig(context_parallel_size=1, dp_replicate_size=8)._fit(8, ENGINES["FSDP2"])


def test_checkpointing_by_engine_and_memory_is_refused():
    model = llama()
    assert checkpoints_layers(fsdp(activation_checkpointing=True)) and not checkpoints_layers(fsdp())
    assert not checkpoints_layers(plain("NO")) and check_memory(arguments(), model, True) is None
    memory.apply(model, attention="save", ffn_block=None, loss_block=None)
    assert check_memory(arguments(), model, False) is None
    assert "activation_checkpointing in fsdp_config conflicts with" in check_memory(arguments(), model, True)


def test_blocks_without_whole_weights_are_refused():
    model = llama()
    assert check_blocks(ENGINES["FSDP1"], model) is None
    memory.apply(model, attention="save", ffn_block=None, loss_block=8)
    assert "loss_block=8) needs whole weights, but FSDP1 exposes them as views" in check_blocks(
        ENGINES["FSDP1"], model
    )
    assert all(check_blocks(engine, model) is None for name, engine in ENGINES.items() if name != "FSDP1")
    without_blocks = llama()
    memory.apply(without_blocks, attention="save", ffn_block=None, loss_block=None)
    assert check_blocks(ENGINES["FSDP1"], without_blocks) is None


def test_a_trial_step_that_an_engine_cannot_take_is_refused():
    with pytest.raises(ValueError, match=r"A trial step is needed, because verify=True, but .* on FSDP1.*Use FSDP2"):
        require_gradient_method(ENGINES["FSDP1"], "verify=True")
    assert all(require_gradient_method(engine, "") for name, engine in ENGINES.items() if name != "FSDP1")
