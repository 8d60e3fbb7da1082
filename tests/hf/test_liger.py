"""`use_liger_kernel=True`: accepted where Liger's loss takes shards as they are, which is tried, and refused by name
otherwise. `tests/memory/test_trainer.py` trains with it."""

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations import liger as integration

from ring_hf.hf.checks.liger import check_liger
from ring_hf.memory import apply
from tests import liger_stand_in
from tests.liger_stand_in import averaging_loss, deaf_loss, liger
from tests.memory.models import batch, model_of, step

ASKED = SimpleNamespace(use_liger_kernel=True)


def patched(loss=None, **settings):
    """A model as `Trainer.train` makes it."""
    model = model_of("llama").float()
    with liger(loss):
        integration.apply_liger_kernel(model, {**liger_stand_in.SETTINGS, **settings})
    return model


@pytest.mark.parametrize("settings", [{}, {"fused_linear_cross_entropy": False}], ids=["fused loss", "own loss"])
def test_a_loss_that_takes_shards_as_they_are_is_accepted(settings):
    model = patched(**settings)
    assert check_liger(ASKED, model, applied=True) is None and model.training


@pytest.mark.parametrize("loss", [deaf_loss, averaging_loss])
def test_a_loss_that_does_not_is_refused(loss):
    model = patched(loss)
    assert "a loss that does not take the labels of a shard as they are" in check_liger(ASKED, model, applied=True)
    assert check_liger(ASKED, model, applied=False) is None
    assert check_liger(SimpleNamespace(use_liger_kernel=False), model, applied=True) is None


def test_levers_that_liger_would_make_void_are_refused():
    model = model_of("llama")
    apply(model, attention="save", ffn_block=7, loss_block=None)
    assert "(ffn_block=7, loss_block=None) would be ignored" in check_liger(ASKED, model, applied=False)
    only_attention = model_of("llama")
    apply(only_attention, attention="save", ffn_block=None, loss_block=None)
    assert check_liger(ASKED, only_attention, applied=False) is None


def test_an_auxiliary_loss_of_one_shard_is_refused():
    model = model_of("llama")
    model.config.output_router_logits = True
    assert "use_liger_kernel=True with output_router_logits=True" in check_liger(ASKED, model, applied=False)


@pytest.mark.parametrize(
    ("lever", "settings"), [("loss", {"swiglu": False}), ("ffn", {"fused_linear_cross_entropy": False})]
)
def test_without_context_parallelism_levers_notice_that_they_were_made_void(lever, settings):
    model = model_of("llama")
    apply(model, **{"attention": "none", "ffn_block": None, "loss_block": None, f"{lever}_block": 7})
    wanted = step(model, batch())
    assert torch.isfinite(wanted[0])
    with liger(liger_stand_in.fused_loss):
        integration.apply_liger_kernel(model, settings)
    with pytest.raises(ValueError, match=f"was replaced since memory.apply.*{lever}_block would be ignored"):
        step(model, batch())
