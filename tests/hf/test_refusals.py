"""Every refusal in one place: what is refused, and words of the message that names the fault and the way out."""

import re
from types import SimpleNamespace

import pytest
import torch
from transformers.masking_utils import create_causal_mask

from ring_hf import memory
from ring_hf.hf import ContextParallelCollator, ContextParallelConfig
from ring_hf.hf.attention import announcements
from ring_hf.hf.attention.backend import attention, mask_2d
from ring_hf.hf.batch_metadata import METADATA_KEY, ContextParallelMetadata, InvalidBatch
from ring_hf.hf.checks.argument_rules import ARGUMENT_RULES, first_error
from ring_hf.hf.checks.batch_rules import find_batch_error
from ring_hf.hf.checks.model_rules import MODEL_RULES
from ring_hf.hf.trainer.engines import ENGINES
from ring_hf.hf.trainer.model_guard import base_model
from tests.harness import run_distributed
from tests.hf.faults import FAULTS, LeftPadding, arguments, run_fault
from tests.hf.models import context_of, llama, rank_of, rows
from tests.hf.refusal_tables import (
    ARGUMENTS,
    BATCHES,
    CALLS,
    COLLATORS,
    CONFIGS,
    DESCRIPTION,
    DISTRIBUTED,
    FOUR,
    MODELS,
    ONES,
    PASSED,
    PREFIXED,
    SHARD,
)

# Configuration time


@pytest.mark.parametrize("name", CONFIGS)
def test_config_refuses(name):
    settings, message = CONFIGS[name]
    with pytest.raises(ValueError, match=message):
        ContextParallelConfig(**settings)


def test_environment_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setenv("RING_HF_CONTEXT_PARALLEL_SIZE", "two")
    with pytest.raises(ValueError, match="RING_HF_CONTEXT_PARALLEL_SIZE='two' must be a whole number"):
        ContextParallelConfig()
    monkeypatch.setenv("RING_HF_CONTEXT_PARALLEL_SIZE", "2")
    monkeypatch.setenv("RING_HF_OVERLAP", "perhaps")
    with pytest.raises(ValueError, match="RING_HF_OVERLAP='perhaps' must be true or false"):
        ContextParallelConfig()
    monkeypatch.setenv("RING_HF_OVERLAP", "true")
    monkeypatch.setenv("RING_HF_ULYSSES_SIZE", "all")
    with pytest.raises(ValueError, match="RING_HF_ULYSSES_SIZE='all' must be a whole number or \"auto\""):
        ContextParallelConfig()


def test_wrong_world_size_names_both_numbers_and_the_way_out():
    with pytest.raises(ValueError) as refusal:
        ContextParallelConfig(context_parallel_size=3)._fit(8, ENGINES["DDP"])
    assert str(refusal.value) == (
        "context_parallel_size=3 does not divide 8 processes. Set it to 1 or 2 or 4 or 8, or start 3, 6 or 9 "
        "processes."
    )


def test_a_size_that_nobody_gave_is_refused_in_several_processes(monkeypatch):
    with pytest.raises(ValueError, match=r"2 processes were started, but nothing says how many.*or 1 if plain data"):
        ContextParallelConfig()._fit(2, ENGINES["DDP"])
    ContextParallelConfig()._fit(1, ENGINES["DDP"])
    ContextParallelConfig(context_parallel_size=1)._fit(2, ENGINES["DDP"])
    monkeypatch.setenv("RING_HF_CONTEXT_PARALLEL_SIZE", "1")
    ContextParallelConfig()._fit(2, ENGINES["DDP"])


# Batches: the collator refuses, and says so in the batch


def refusal_of(collator, features, num_ranks=4):
    with rank_of(num_ranks, 1):
        result = collator(features)
    assert isinstance(result[METADATA_KEY], InvalidBatch), "the batch was accepted"
    assert (result["labels"] == -100).all() and (result["shift_labels"] == -100).all()
    return result[METADATA_KEY].message


@pytest.mark.parametrize("name", BATCHES)
def test_collator_refuses(name):
    inner_batch, message = BATCHES[name]
    found = refusal_of(ContextParallelCollator(llama(), inner=lambda features: dict(inner_batch)), rows(16, 16))
    assert re.search(message, found), found


@pytest.mark.parametrize("name", COLLATORS)
def test_examples_are_refused(name):
    settings, features, message = COLLATORS[name]
    found = refusal_of(ContextParallelCollator(llama(), **settings), features, num_ranks=2)
    assert re.search(message, found), found


def test_backend_that_is_not_ours_is_refused_by_the_collator():
    found = refusal_of(ContextParallelCollator(llama("sdpa")), rows(16, 16))
    assert "attn_implementation='sdpa' attends inside one shard only" in found and "ring_zigzag" in found


def test_inner_collator_and_packing_exclude_each_other():
    with pytest.raises(ValueError, match="packing=True belongs to the default collator"):
        ContextParallelCollator(llama(), inner=LeftPadding(), packing=True)


def test_prefixes_that_a_backend_would_not_look_at_are_refused_in_one_process():
    with pytest.raises(ValueError, match=r"prefix_lm=True with attn_implementation='sdpa'.*ring_zigzag"):
        ContextParallelCollator(llama("sdpa"), prefix_lm=True)(PREFIXED)


def test_prefixes_with_a_router_loss_in_one_process_are_refused():
    model = llama()
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match=r"prefix_lm=True with output_router_logits=True in one process"):
        ContextParallelCollator(model, prefix_lm=True)(PREFIXED)
    with pytest.raises(ValueError, match="column prefix_length, which only counts with"):
        ContextParallelCollator(llama("sdpa"))(PREFIXED)


def test_numpy_batches_are_refused():
    with pytest.raises(ValueError, match="return_tensors='np': only PyTorch tensors"):
        ContextParallelCollator(llama())(rows(16), return_tensors="np")


# The attention function


def call(
    query=(1, 4, 8, 8),
    key=(1, 2, 8, 8),
    value=None,
    dtype=torch.float32,
    training=False,
    backend="ring_zigzag",
    **kwargs,
):
    model = llama(backend)
    module = model.model.layers[0].self_attn.to(dtype).train(training)
    for name, setting in kwargs.pop("module_config", {}).items():
        setattr(module.config, name, setting)
    mask = kwargs.pop("attention_mask", None)
    if isinstance(batch := kwargs.get(METADATA_KEY), ContextParallelMetadata):
        announcements.register(model)
        announcements.announce(model, batch)
    tensors = (torch.zeros(shape, dtype=dtype) for shape in (query, key, value or key))
    return attention(module, *tensors, mask, scaling=0.3, **kwargs)


@pytest.mark.parametrize("name", CALLS)
def test_attention_refuses(name):
    settings, message = CALLS[name]
    with pytest.raises(ValueError, match=message):
        call(**settings)


def test_training_batch_that_did_not_come_from_the_collator_is_refused():
    with rank_of(2, 0), pytest.raises(ValueError, match="did not come from ContextParallelCollator"):
        call(training=True)


def test_static_cache_is_refused():
    with pytest.raises(ValueError, match=r"A static cache \(32 slots, 20 of them filled\)"):
        mask_2d(q_length=1, kv_length=32, q_offset=19)


def test_additions_to_the_causal_mask_are_refused():
    config = llama().config
    inputs = torch.zeros(1, 8, 32)
    for addition in (
        {"or_mask_function": lambda batch, head, q, k: k < 4},
        {"block_sequence_ids": torch.zeros(1, 8, dtype=torch.long)},
    ):
        with pytest.raises(ValueError, match="The model adds to its attention mask"):
            create_causal_mask(config, inputs, None, past_key_values=None, **addition)


def test_a_cache_beyond_one_chunk_of_attention_is_refused():
    config = SimpleNamespace(attention_chunk_size=8)
    assert mask_2d(q_length=12, kv_length=12, config=config, local_size=8) is None
    with pytest.raises(ValueError, match=r"beyond one chunk of attention \(9 tokens, attention_chunk_size=8\)"):
        mask_2d(q_length=1, kv_length=9, q_offset=8, config=config, local_size=8)


# Models


@pytest.mark.parametrize("name", MODELS)
def test_model_is_refused(name):
    build, message = MODELS[name]
    found = first_error(MODEL_RULES, build())
    assert found is not None and re.search(message, found), found


def test_the_plain_model_is_accepted_and_something_else_is_no_model():
    assert first_error(MODEL_RULES, llama()) is None
    with pytest.raises(ValueError, match="Linear holds no Transformers model"):
        base_model(torch.nn.Linear(1, 1))


# Trainer arguments


@pytest.mark.parametrize("name", ARGUMENTS)
def test_trainer_argument_is_refused(name):
    settings, message = ARGUMENTS[name]
    args = arguments(ContextParallelConfig())
    for key, value in settings.items():
        if key == "accelerator_config":
            for field, setting in value.items():
                setattr(args.accelerator_config, field, setting)
        else:
            setattr(args, key, value)
    found = first_error(ARGUMENT_RULES, args)
    assert found is not None and message in found


def test_plain_arguments_are_accepted():
    assert first_error(ARGUMENT_RULES, arguments(ContextParallelConfig())) is None


# What is passed to the model beside a sharded batch


@pytest.mark.parametrize("name", PASSED)
def test_model_arguments_are_refused(name):
    changes, message = PASSED[name]
    found = find_batch_error(llama(), (), {**SHARD, **changes}, context_of(2, 0))
    assert found is not None and message in found
    assert find_batch_error(llama(), (), SHARD, context_of(2, 0)) is None


def test_weights_of_tokens_in_half_precision_are_refused():
    model = llama()
    memory.apply(model, attention="none", ffn_block=None, loss_block=8)
    weights = torch.ones(2, 8)
    assert find_batch_error(model, (), {**SHARD, "loss_weights": weights}, context_of(2, 0)) is None
    found = find_batch_error(model, (), {**SHARD, "loss_weights": weights.bfloat16()}, context_of(2, 0))
    assert "loss_weights are torch.bfloat16, which rounds them: under DeepSpeed" in found


def test_router_losses_that_would_be_overlooked_are_refused():
    for config, passed, message in (
        (False, {"output_router_logits": True}, "output_router_logits=True was passed to the model, but its config"),
        (True, {"return_dict": False}, "output_router_logits=True with return_dict=False hides the auxiliary loss"),
    ):
        model = llama()
        model.config.output_router_logits = config
        found = find_batch_error(model, (), {**SHARD, **passed}, context_of(2, 0))
        assert found is not None and message in found
        assert find_batch_error(model, (), SHARD, context_of(2, 0)) is None


def test_tokens_by_position_are_refused():
    assert "Tokens were passed by position" in find_batch_error(
        llama(), (ONES,), {METADATA_KEY: DESCRIPTION}, context_of(2, 0)
    )


# Two processes: every rank gets the message, whoever is at fault, and none hangs


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_both_ranks_refuse_together(name):
    for message in run_distributed(2, run_fault, name, timeout=60):
        assert DISTRIBUTED[name] in message, message


@pytest.mark.parametrize("name", FOUR)
def test_all_replicas_refuse_together(name):
    for message in run_distributed(4, run_fault, name, timeout=60):
        assert FOUR[name] in message, message


def test_every_fault_is_tested():
    assert set(FAULTS) == set(DISTRIBUTED) | set(FOUR)
