"""Refusals before and in a forward pass: the message names the fault and the way out."""

import inspect
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
from ring_hf.hf.checks.batch_rules import check_batch
from ring_hf.hf.checks.model_rules import MODEL_RULES
from ring_hf.hf.trainer.engines import ENGINES
from ring_hf.hf.trainer.model_guard import base_model
from tests.hf import faults
from tests.hf.faults import FAULTS, LeftPadding, arguments, run_fault
from tests.hf.models import context_of, llama, rank_of, rows
from tests.hf.refusal_tables import ARGUMENTS, CONFIGS, MODELS
from tests.hf.refused_batches import (
    BATCHES,
    CALLS,
    COLLATORS,
    EXAMPLES_WITH_PREFIX,
    FORWARD_ARGUMENTS,
    ONES,
    SHARD,
    SHARD_METADATA,
)
from tests.support.harness import run_distributed


def by_name(table):
    """Run a test with the value of each row of a table; the key is its id."""
    return pytest.mark.parametrize("case", table.values(), ids=table.keys())


# Configuration time


@by_name(CONFIGS)
def test_config_refuses(case):
    with pytest.raises(ValueError, match=case.message):
        ContextParallelConfig(**case.kwargs)


def test_invalid_environment_variables_are_refused(monkeypatch):
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


def test_a_missing_size_is_refused_in_several_processes(monkeypatch):
    with pytest.raises(ValueError, match=r"2 processes were started, but nothing says how many.*or 1 if plain data"):
        ContextParallelConfig()._fit(2, ENGINES["DDP"])
    ContextParallelConfig()._fit(1, ENGINES["DDP"])
    ContextParallelConfig(context_parallel_size=1)._fit(2, ENGINES["DDP"])
    monkeypatch.setenv("RING_HF_CONTEXT_PARALLEL_SIZE", "1")
    ContextParallelConfig()._fit(2, ENGINES["DDP"])


# Batches: the collator returns the error message in the batch


def invalid_batch_message(collator, features, num_ranks=4):
    """Return the message of the invalid batch that a collator returns."""
    with rank_of(num_ranks, 1):
        result = collator(features)
    assert isinstance(result[METADATA_KEY], InvalidBatch), "the collator accepted the batch"
    assert (result["labels"] == -100).all() and (result["shift_labels"] == -100).all()
    return result[METADATA_KEY].message


@by_name(BATCHES)
def test_collator_refuses(case):
    collator = ContextParallelCollator(llama(), inner=lambda features: dict(case.kwargs))
    message = invalid_batch_message(collator, rows(16, 16))
    assert re.search(case.message, message), message


@by_name(COLLATORS)
def test_examples_are_refused(case):
    collator = ContextParallelCollator(llama(), **case.kwargs)
    message = invalid_batch_message(collator, case.examples, num_ranks=2)
    assert re.search(case.message, message), message


def test_other_backends_are_refused_by_the_collator():
    message = invalid_batch_message(ContextParallelCollator(llama("sdpa")), rows(16, 16))
    assert "attn_implementation='sdpa' attends within one shard only" in message and "ring_zigzag" in message


def test_inner_collator_and_packing_exclude_each_other():
    with pytest.raises(ValueError, match="packing=True belongs to the default collator"):
        ContextParallelCollator(llama(), inner=LeftPadding(), packing=True)


def test_prefixes_under_other_backends_are_refused_in_one_process():
    with pytest.raises(ValueError, match=r"prefix_lm=True with attn_implementation='sdpa'.*ring_zigzag"):
        ContextParallelCollator(llama("sdpa"), prefix_lm=True)(EXAMPLES_WITH_PREFIX)


def test_prefixes_with_a_router_loss_in_one_process_are_refused():
    model = llama()
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match=r"prefix_lm=True with output_router_logits=True in one process"):
        ContextParallelCollator(model, prefix_lm=True)(EXAMPLES_WITH_PREFIX)
    with pytest.raises(ValueError, match="column prefix_length, which has an effect only with"):
        ContextParallelCollator(llama("sdpa"))(EXAMPLES_WITH_PREFIX)


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
    """Call the attention function with zeros of these shapes, from the first layer of a model."""
    model = llama(backend)
    module = model.model.layers[0].self_attn.to(dtype).train(training)
    for name, value_of_config in kwargs.pop("module_config", {}).items():
        setattr(module.config, name, value_of_config)
    mask = kwargs.pop("attention_mask", None)
    if isinstance(metadata := kwargs.get(METADATA_KEY), ContextParallelMetadata):
        announcements.register(model)
        announcements.announce(model, metadata)
    tensors = (torch.zeros(shape, dtype=dtype) for shape in (query, key, value or key))
    return attention(module, *tensors, mask, scaling=0.3, **kwargs)


@by_name(CALLS)
def test_attention_refuses(case):
    with pytest.raises(ValueError, match=case.message):
        call(**case.kwargs)


def test_training_batch_without_metadata_is_refused():
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


@by_name(MODELS)
def test_model_is_refused(case):
    message = first_error(MODEL_RULES, case.build())
    assert message is not None and re.search(case.message, message), message


def test_plain_model_is_accepted_and_other_modules_are_refused():
    assert first_error(MODEL_RULES, llama()) is None
    with pytest.raises(ValueError, match="Linear holds no Transformers model"):
        base_model(torch.nn.Linear(1, 1))


# Trainer arguments


@by_name(ARGUMENTS)
def test_trainer_argument_is_refused(case):
    args = arguments(ContextParallelConfig())
    for key, value in case.kwargs.items():
        if key == "accelerator_config":
            for field, field_value in value.items():
                setattr(args.accelerator_config, field, field_value)
        else:
            setattr(args, key, value)
    message = first_error(ARGUMENT_RULES, args)
    assert message is not None and re.search(case.message, message), message


def test_plain_arguments_are_accepted():
    assert first_error(ARGUMENT_RULES, arguments(ContextParallelConfig())) is None


# Arguments of a forward pass with a sharded batch


@by_name(FORWARD_ARGUMENTS)
def test_model_arguments_are_refused(case):
    message = check_batch(llama(), (), {**SHARD, **case.kwargs}, context_of(2, 0))
    assert message is not None and re.search(case.message, message), message
    assert check_batch(llama(), (), SHARD, context_of(2, 0)) is None


def test_loss_weights_in_half_precision_are_refused():
    model = llama()
    memory.apply(model, attention="none", ffn_block=None, loss_block=8)
    weights = torch.ones(2, 8)
    assert check_batch(model, (), {**SHARD, "loss_weights": weights}, context_of(2, 0)) is None
    message = check_batch(model, (), {**SHARD, "loss_weights": weights.bfloat16()}, context_of(2, 0))
    assert "loss_weights have dtype torch.bfloat16, which rounds them: with DeepSpeed" in message


def test_router_losses_that_hooks_would_miss_are_refused():
    for configured, kwargs, expected_message in (
        (False, {"output_router_logits": True}, "output_router_logits=True was passed to the model, but its config"),
        (True, {"return_dict": False}, "output_router_logits=True with return_dict=False hides the auxiliary loss"),
    ):
        model = llama()
        model.config.output_router_logits = configured
        message = check_batch(model, (), {**SHARD, **kwargs}, context_of(2, 0))
        assert message is not None and expected_message in message
        assert check_batch(model, (), SHARD, context_of(2, 0)) is None


def test_positional_arguments_are_refused():
    message = check_batch(llama(), (ONES,), {METADATA_KEY: SHARD_METADATA}, context_of(2, 0))
    assert "The model got positional arguments" in message


# Several processes: every rank raises the message, whichever is at fault, and none hangs


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if 2 in fault.num_ranks])
def test_both_ranks_refuse_together(name):
    for message in run_distributed(2, run_fault, name, timeout=60):
        assert FAULTS[name].message in message, message


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if 4 in fault.num_ranks])
def test_all_replicas_refuse_together(name):
    for message in run_distributed(4, run_fault, name, timeout=60):
        assert FAULTS[name].message in message, message


def test_every_fault_is_tested():
    scripts = {
        name
        for name, value in vars(faults).items()
        if inspect.isfunction(value) and list(inspect.signature(value).parameters) == ["rank", "world_size"]
    }
    assert scripts == set(FAULTS) and len(FAULTS) == 33
    assert all(set(fault.num_ranks) <= {2, 4} and fault.num_ranks for fault in FAULTS.values())
