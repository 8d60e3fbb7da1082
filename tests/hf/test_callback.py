"""The Trainer's callback warms up the groups of the resolved degrees before anything is trained or evaluated."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from ring_hf.geometry import RingOptions
from ring_hf.hf.degrees import ResolvedDegrees
from ring_hf.hf.trainer import callback

SPLIT = ResolvedDegrees("ring_zigzag", "zigzag", 8, RingOptions("auto", 2, 2))


@pytest.mark.parametrize("error", [None, "dropout"])
def test_groups_warm_up_after_all_ranks_agree(error):
    calls = []

    def raise_on_all_ranks(error, values, context):
        calls.append("agree")
        if error is not None:
            raise ValueError(error)

    stand_ins = {
        "process": SimpleNamespace(current=lambda: SimpleNamespace(group="ranks", engine="DDP"), reset=lambda: None),
        "base_model": lambda model: SimpleNamespace(config=None),
        "first_error": lambda rules, subject: error,
        "check_loader": lambda loader: None,
        "AcceleratorState": lambda: None,
        "check_sharded_weights": lambda context, model: None,
        "check_blocks": lambda engine, model: None,
        "check_memory": lambda args, model, engine_checkpoints: None,
        "check_liger": lambda args, model, is_patched: None,
        "find_degrees_error": lambda config, context: None,
        "resolve_degrees": lambda config, context: SPLIT,
        "raise_on_all_ranks": raise_on_all_ranks,
        "group_of": lambda name: name,
        "warm_up": lambda *args: calls.append(args),
        "guard_model": mock.MagicMock(),
    }
    stand_ins["guard_model"].return_value.should_log.return_value = False
    args = SimpleNamespace(parallelism_config=None, device=torch.device("cpu"))
    with mock.patch.multiple(callback, **stand_ins):
        if error is None:
            callback.ContextParallelCallback().on_init_end(args, None, None, model=object())
            assert calls == ["agree", ("ranks", torch.device("cpu"), 2, 2)]
        else:
            with pytest.raises(ValueError, match="dropout"):
                callback.ContextParallelCallback().on_init_end(args, None, None, model=object())
            assert calls == ["agree"]
