"""A forward that was replaced is traced to whoever replaced it: TRL, Accelerate, others."""

import functools
import types

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module

from ring_hf.memory import apply
from tests.memory.models import batch, model_of, step

NO_OPTIONS = {"attention": "none", "ffn_block": None, "loss_block": None}
OPTIONS = [{"attention": "save"}, {"ffn_block": 7}, {"loss_block": 7}]


def add_stand_in_for_trls_head(model):
    """What TRL 1.16 does, without TRL: the forward of the class is wrapped by a function of its own module."""
    code = """
def add_fused_lm_head(model):
    original_forward = model.forward

    @functools.wraps(type(model).forward)
    def _fused_forward(self, *args, fused_lm_head=False, labels=None, **kwargs):
        if not fused_lm_head:
            return original_forward(*args, labels=labels, **kwargs)
        hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        logits = hidden @ self.get_output_embeddings().weight.T
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        return types.SimpleNamespace(loss=loss)

    model.forward = types.MethodType(_fused_forward, model)
"""
    module = {"__name__": "trl.trainer.utils", "functools": functools, "types": types, "torch": torch}
    exec(code, module)
    module["add_fused_lm_head"](model)


def add_trls_head(model):
    pytest.importorskip("trl").trainer.utils.add_fused_lm_head(model)


HEADS = [add_stand_in_for_trls_head, add_trls_head]


@pytest.mark.parametrize("option", OPTIONS, ids=str)
@pytest.mark.parametrize("add_head", HEADS)
def test_after_trl_the_message_names_its_head_and_the_order(add_head, option):
    model = model_of("llama")
    add_head(model)
    with pytest.raises(ValueError) as refusal:
        apply(model, **{**NO_OPTIONS, **option})
    assert str(refusal.value) == (
        "The forward of 1 modules was replaced (LlamaForCausalLM, for example), by TRL: its trainers give a model a "
        "fused LM head, which takes the loss tile by tile itself. Call memory.apply before the trainer is made, with "
        "loss_block=None."
    )


@pytest.mark.parametrize("add_head", HEADS)
def test_before_trl_options_work_without_blocks_of_the_loss(add_head):
    tokens = batch()["input_ids"]
    plain, model = model_of("llama"), model_of("llama")
    apply(model, **{**NO_OPTIONS, "attention": "save", "ffn_block": 7})
    losses = []
    for each in (plain, model):
        add_head(each)
        loss = each(input_ids=tokens, labels=tokens, fused_lm_head=True).loss
        loss.backward()
        losses.append(loss.detach())
    assert torch.allclose(*losses, rtol=1e-6)
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    for name, weight in plain.named_parameters():
        assert torch.allclose(weight.grad, gradients[name], rtol=1e-4, atol=1e-7), name

    blocks = model_of("llama")
    apply(blocks, **{**NO_OPTIONS, "loss_block": 7})
    add_head(blocks)
    with pytest.raises(
        ValueError, match=r"TRL gave LlamaForCausalLM a fused LM head.* be ignored. Set loss_block=None"
    ):
        blocks(input_ids=tokens, labels=tokens, fused_lm_head=True)


def test_hooks_of_accelerate_and_functions_of_others_are_named():
    hooked = model_of("llama")
    for module in list(hooked.modules()):
        add_hook_to_module(module, ModelHook())
    with pytest.raises(
        ValueError, match=r"modules was replaced .*as Accelerate does for device_map. .*without device_map"
    ):
        apply(hooked, **{**NO_OPTIONS, "ffn_block": 7})

    model = model_of("llama")
    mlp = model.model.layers[1].mlp
    mlp.forward = functools.partial(mlp.forward)
    with pytest.raises(
        ValueError, match=r"\(model.layers.1.mlp, for example\), by a function of transformers.models.ll"
    ):
        apply(model, **{**NO_OPTIONS, "ffn_block": 7})
    mlp.forward = torch.relu
    with pytest.raises(ValueError, match=r"by something that is not a Python function. Call memory.apply first"):
        apply(model, **{**NO_OPTIONS, "ffn_block": 7})


def test_a_replacement_does_not_outlive_its_removal():
    model = model_of("llama")
    add_stand_in_for_trls_head(model)
    del model.forward
    apply(model, **{**NO_OPTIONS, "loss_block": 7})
    assert torch.isfinite(step(model, batch())[0])
