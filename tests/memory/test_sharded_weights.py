"""Weights that an engine shards, without an engine: heads that hand gradients over, weights that are elsewhere.

`tests/engines` tests the same with engines.
"""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor

from ring_hf.memory import apply, lazy_logits, sharding_error, token_wise
from ring_hf.memory.sharded_weights import refuse_composite
from tests.memory.models import batch, model_of, relative_difference, step

BLOCKS = {"attention": "none", "ffn_block": 7, "loss_block": 7}


def managed(name="llama"):
    """Return a model whose head has the attribute that FSDP2 sets on modules whose weights it gathers."""
    model = model_of(name)
    model.get_output_embeddings()._is_fsdp_managed_module = True
    return model


@pytest.mark.parametrize("settings", [BLOCKS, {**BLOCKS, "loss_block": 10**6}], ids=["blocks", "one block"])
def test_gradients_that_are_handed_over_are_those_of_the_whole_loss(settings):
    plain, model = model_of("llama"), managed()
    apply(model, **settings)
    assert relative_difference(step(model, batch()), step(plain, batch())) <= 1e-9


def test_the_head_is_called_once_and_its_hooks_not_at_every_block():
    model = managed()
    apply(model, **BLOCKS)
    calls = []
    model.lm_head.register_forward_pre_hook(lambda *_: calls.append(1))
    step(model, batch())
    assert len(calls) == 1


def test_rows_shorter_than_a_block_post_the_same_collectives():
    """Ranks whose rows are short must post the collectives of those whose rows are long."""
    model = managed()
    apply(model, **{**BLOCKS, "loss_block": 10**6})
    with mock.patch.object(lazy_logits, "GradientHandover", wraps=lazy_logits.GradientHandover) as handover:
        step(model, batch())
    assert handover.call_count == 1


def test_detached_logits_are_not_computed_until_they_are_used():
    model = managed()
    apply(model, **BLOCKS)
    output = model(**batch(), num_items_in_batch=71, use_cache=False)
    with mock.patch.object(lazy_logits, "_compute", wraps=lazy_logits._compute) as compute:
        detached = output.logits.detach()
        assert isinstance(detached, lazy_logits.LazyLogits) and compute.call_count == 0
        assert not detached.requires_grad and not (detached + 1).requires_grad and compute.call_count == 0
        expected = model_of("llama")(**batch(), num_items_in_batch=71, use_cache=False).logits
        assert torch.allclose(detached.sum(), expected.sum()) and compute.call_count == 1


def test_heads_made_of_modules_are_refused_under_zero3():
    model = get_peft_model(model_of("llama"), LoraConfig(target_modules=["lm_head"]))
    head = model.get_output_embeddings()
    refuse_composite(head)
    for weight in head.parameters():
        weight.ds_id = 1
    with pytest.raises(ValueError, match=r"The LM head is a Linear made of modules .LoRA.*or set loss_block=None"):
        refuse_composite(head)


def test_feed_forward_layers_are_gathered_as_one_unit():
    model = model_of("llama")
    apply(model, **BLOCKS)
    assert [module._z3_leaf for module in model.modules() if hasattr(module, "_z3_leaf")] == [True] * len(
        model.model.layers
    )
    assert not hasattr(model.lm_head, "_z3_leaf")


def test_a_model_without_weights_is_tried_with_random_ones():
    model, before = model_of("llama"), model_of("llama")
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()  # as FSDP loads it on all ranks but the first
    own = {name: id(weight) for name, weight in model.named_parameters()}
    apply(model, **BLOCKS)
    assert {name: id(weight) for name, weight in model.named_parameters()} == own
    assert all(not weight.any() for weight in model.parameters())
    model.load_state_dict(before.state_dict())
    assert relative_difference(step(model, batch()), step(before, batch())) <= 1e-9


def test_weights_of_this_process_are_used():
    model = model_of("llama")
    own = [id(weight) for weight in model.parameters()]
    with token_wise.stand_in_weights(model):
        assert [id(weight) for weight in model.parameters()] == own


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def with_a_wrapped_matrix(mesh):
    """As a size-based policy of FSDP2 does to large matrices."""
    model = model_of("llama")
    fully_shard(model.model.layers[0].mlp.up_proj, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def with_tensor_parallelism(mesh):
    model = model_of("llama")
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [Replicate()]))
    return model


SHARDED = {
    "FSDP2 inside": (
        with_a_wrapped_matrix,
        r"FSDP2 wraps Linear inside of LlamaMLP.* every decoder layer wrapped",
    ),
    "tensor parallelism": (
        with_tensor_parallelism,
        r"layers.0.mlp.up_proj.weight is a DTensor that no FSDP2 module gathers",
    ),
}


@pytest.mark.parametrize("name", SHARDED)
def test_parts_that_are_sharded_by_themselves_are_refused_by_apply(mesh, name):
    build, message = SHARDED[name]
    model = build(mesh)
    with pytest.raises(ValueError, match=message):
        apply(model, **BLOCKS)
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_that_fsdp2_gathers_are_not_refused(mesh):
    model = model_of("llama")
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert len(apply(model, **BLOCKS).feed_forward) == 2 and sharding_error(model) is None


def test_parts_sharded_after_apply_are_refused_before_a_step(mesh):
    model = model_of("llama")
    assert sharding_error(model) is None
    apply(model, **BLOCKS)
    assert sharding_error(model) is None
    fully_shard(model.model.layers[1].mlp.down_proj, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert "FSDP2 wraps Linear inside of LlamaMLP" in sharding_error(model)


def test_layers_called_several_times_are_refused_under_zero3():
    model = model_of("hrm_text")
    apply(model, **BLOCKS)
    assert sharding_error(model) is None
    weight = next(p for name, p in model.named_parameters() if "mlp" in name)
    weight.ds_id, weight.ds_status = 1, SimpleNamespace(name="NOT_AVAILABLE")
    assert "HrmTextMLP is called several times in a pass, so that ZeRO-3 gathers its parts" in sharding_error(model)
    weight.ds_status = SimpleNamespace(name="AVAILABLE")  # as small weights are kept on every rank
    assert sharding_error(model) is None


def test_heads_made_of_modules_are_refused_under_zero3_by_apply():
    model = get_peft_model(model_of("llama"), LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    for weight in model.get_output_embeddings().parameters():
        weight.ds_id = 1
    with pytest.raises(ValueError, match="The LM head is a Linear made of modules"):
        apply(model, **BLOCKS)
