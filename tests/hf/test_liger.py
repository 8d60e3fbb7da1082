"""`use_liger_kernel=True` is accepted if Liger's loss is exact on a shard, and refused by name otherwise.

`tests/memory/test_trainer.py` trains with it.
"""

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations import liger as integration

from ring_hf.hf.checks.liger import check_liger
from ring_hf.memory import apply
from tests.memory.models import batch, model_of, step
from tests.support import liger_stand_in
from tests.support.liger_stand_in import averaging_loss, deaf_loss, liger

ARGUMENTS = SimpleNamespace(use_liger_kernel=True)


def patched(loss=None, **settings):
    """Return a model that Liger has patched, as in `Trainer.train`."""
    model = model_of("llama").float()
    with liger(loss):
        integration.apply_liger_kernel(model, {**liger_stand_in.SETTINGS, **settings})
    return model


@pytest.mark.parametrize("settings", [{}, {"fused_linear_cross_entropy": False}], ids=["fused loss", "own loss"])
def test_a_loss_that_uses_shift_labels_is_accepted(settings):
    model = patched(**settings)
    assert check_liger(ARGUMENTS, model, is_patched=True) is None and model.training


@pytest.mark.parametrize("loss", [deaf_loss, averaging_loss])
def test_other_fused_losses_are_refused(loss):
    model = patched(loss)
    assert "a loss that does not use shift_labels" in check_liger(ARGUMENTS, model, is_patched=True)
    assert check_liger(ARGUMENTS, model, is_patched=False) is None
    assert check_liger(SimpleNamespace(use_liger_kernel=False), model, is_patched=True) is None


def test_memory_options_that_liger_would_replace_are_refused():
    model = model_of("llama")
    apply(model, attention="save", ffn_block=7, loss_block=None)
    assert "(ffn_block=7, loss_block=None) would be ignored" in check_liger(ARGUMENTS, model, is_patched=False)
    only_attention = model_of("llama")
    apply(only_attention, attention="save", ffn_block=None, loss_block=None)
    assert check_liger(ARGUMENTS, only_attention, is_patched=False) is None


def test_an_auxiliary_loss_of_one_shard_is_refused():
    model = model_of("llama")
    model.config.output_router_logits = True
    assert "use_liger_kernel=True with output_router_logits=True" in check_liger(ARGUMENTS, model, is_patched=False)


@pytest.mark.parametrize(
    ("option", "settings"), [("loss", {"swiglu": False}), ("ffn", {"fused_linear_cross_entropy": False})]
)
def test_memory_options_notice_that_liger_replaced_them(option, settings):
    model = model_of("llama")
    apply(model, **{"attention": "none", "ffn_block": None, "loss_block": None, f"{option}_block": 7})
    loss, *_ = step(model, batch())
    assert torch.isfinite(loss)
    with liger(liger_stand_in.fused_loss):
        integration.apply_liger_kernel(model, settings)
    with pytest.raises(ValueError, match=f"was replaced since memory.apply.*{option}_block would be ignored"):
        step(model, batch())
