"""Weights that an engine shards, without an engine: heads that hand gradients over, weights that are elsewhere.

What engines do with them is tested in `tests/engines`.
"""

from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ring_hf.memory import apply, lazy_logits, token_wise
from ring_hf.memory.sharded_weights import refuse_composite
from tests.memory.models import apart, batch, model_of, step

BLOCKS = {"attention": "none", "ffn_block": 7, "loss_block": 7}


def managed(name="llama"):
    """A model whose head carries the mark that FSDP2 leaves on modules whose weights it gathers."""
    model = model_of(name)
    model.get_output_embeddings()._is_fsdp_managed_module = True
    return model


@pytest.mark.parametrize("settings", [BLOCKS, {**BLOCKS, "loss_block": 10**6}], ids=["blocks", "one block"])
def test_gradients_that_are_handed_over_are_those_of_the_whole_loss(settings):
    plain, model = model_of("llama"), managed()
    apply(model, **settings)
    assert apart(step(model, batch()), step(plain, batch())) <= 1e-9


def test_the_head_is_called_once_and_its_hooks_not_at_every_block():
    model = managed()
    apply(model, **BLOCKS)
    calls = []
    model.lm_head.register_forward_pre_hook(lambda *_: calls.append(1))
    step(model, batch())
    assert len(calls) == 1


def test_rows_shorter_than_a_block_take_the_same_way():
    """Ranks whose rows are short must post the collectives of those whose rows are long."""
    model = managed()
    apply(model, **{**BLOCKS, "loss_block": 10**6})
    with mock.patch.object(lazy_logits, "GradientHandover", wraps=lazy_logits.GradientHandover) as handover:
        step(model, batch())
    assert handover.call_count == 1


def test_detached_logits_are_not_computed_until_somebody_looks():
    model = managed()
    apply(model, **BLOCKS)
    output = model(**batch(), num_items_in_batch=71, use_cache=False)
    with mock.patch.object(lazy_logits, "_compute", wraps=lazy_logits._compute) as compute:
        detached = output.logits.detach()
        assert isinstance(detached, lazy_logits.LazyLogits) and compute.call_count == 0
        assert not detached.requires_grad and not (detached + 1).requires_grad and compute.call_count == 0
        want = model_of("llama")(**batch(), num_items_in_batch=71, use_cache=False).logits
        assert torch.allclose(detached.sum(), want.sum()) and compute.call_count == 1


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


def test_a_model_without_weights_is_proven_with_others():
    model, before = model_of("llama"), model_of("llama")
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()  # as FSDP loads it on all ranks but the first
    own = {name: id(weight) for name, weight in model.named_parameters()}
    apply(model, **BLOCKS)
    assert {name: id(weight) for name, weight in model.named_parameters()} == own
    assert all(not weight.any() for weight in model.parameters())
    model.load_state_dict(before.state_dict())
    assert apart(step(model, batch()), step(before, batch())) <= 1e-9


def test_weights_that_are_there_are_used():
    model = model_of("llama")
    own = [id(weight) for weight in model.parameters()]
    with token_wise.stand_in_weights(model):
        assert [id(weight) for weight in model.parameters()] == own
