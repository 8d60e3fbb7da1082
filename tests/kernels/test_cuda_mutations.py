"""The contract tests can fail: they detect each assumption about PyTorch's operators that is broken on purpose.

Either a stand-in refuses the call, as the real operator would or should, or the numbers are wrong. `pytest -s` prints
a line for each.
"""

import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from ring_hf.geometry import CausalBlock
from ring_hf.kernels import KERNELS, causal_blocks, cuda_cudnn, cuda_efficient, routed
from ring_hf.verify import random_cases
from ring_hf.verify.thread_ranks import threads_as_ranks
from tests.kernels.test_flash_contract import max_band_difference, problem, replace
from tests.support.aten_stand_ins import aten_stand_in

MODULES = {"cuda_efficient": cuda_efficient, "cuda_cudnn": cuda_cudnn}


def _wrap(name, wrapper):
    """Replace an operator or function of the adapter by `wrapper(original)`."""

    def break_adapter(patch, adapter):
        module = MODULES[adapter]
        patch.setattr(module, name, wrapper(getattr(module, name)))

    return break_adapter


def _set(target, name, value):
    return lambda patch, adapter: patch.setattr(target, name, value)


def _replace_fields(**changes):
    """Register another frozen kernel under the same name."""

    def break_adapter(patch, adapter):
        patch.setitem(KERNELS, adapter, replace(KERNELS[adapter], **changes))

    return break_adapter


def _lse_in_base_2(forward):
    def wrapper(*args, **kwargs):
        out, lse, *others = forward(*args, **kwargs)
        return out, lse / math.log(2), *others

    return wrapper


def _change_arg(index, change):
    """Call the operator with another argument at a position."""

    def wrap(operator):
        def wrapper(*args, **kwargs):
            args = list(args)
            args[index] = change(args[index])
            return operator(*args, **kwargs)

        return wrapper

    return wrap


def _transpose(lse):
    return lse.transpose(1, 2).contiguous().view(lse.shape)


def _drop_arg(index):
    return lambda operator: lambda *args, **kwargs: operator(*args[:index], *args[index + 1 :], **kwargs)


def _reorder_args(*order):
    return lambda operator: lambda *args, **kwargs: operator(*(args[index] for index in order), **kwargs)


def _pass_window(operator):
    return lambda *args, **kwargs: operator(*args, window_size=7, **kwargs)


def _keep_first_head(backward):
    def wrapper(*args, **kwargs):
        dq, dk, dv, dbias = backward(*args, **kwargs)
        for x in (dk, dv):
            x[:, 1:] = 0  # as if one head were selected instead of summing all
        return dq, dk, dv, dbias

    return wrapper


original_split = causal_blocks.split


def _split_bottom_right(num_q, num_k, lo, hi):
    """Treat bands that end at the last query and key as causal, as in flash-attn."""
    if lo is None and hi == num_k - num_q:
        return [CausalBlock(0, num_q, 0, num_k, "causal")]
    return original_split(num_q, num_k, lo, hi)


def _split_without_window(num_q, num_k, lo, hi):
    return original_split(num_q, num_k, None, hi)


def _route_all_to_first(self, tiles):
    return [(self.first, list(tiles))]


def _route_all_to_both(self, tiles):
    tiles = list(tiles)
    return [(self.first, tiles), (self.second, tiles)]


@dataclass(frozen=True)
class Fault:
    """A broken assumption.

    Args:
        adapter: the kernel that makes it.
        break_adapter: `(patch, adapter)` breaks it.
        detected_by: the mask of a ring with GQA heads, `mask-heads`, or "bands".
    """

    adapter: str
    break_adapter: Callable[..., None]
    detected_by: str = "causal"


EFFICIENT, CUDNN = "cuda_efficient", "cuda_cudnn"
FAULTS = {
    "lse-base-2": Fault(EFFICIENT, _wrap("_ATEN_FORWARD", _lse_in_base_2)),
    "lse-base-2-cudnn": Fault(CUDNN, _wrap("_ATEN_FORWARD", _lse_in_base_2)),
    "lse-transposed": Fault(EFFICIENT, _wrap("_ATEN_BACKWARD", _change_arg(6, _transpose))),
    "lse-transposed-cudnn": Fault(CUDNN, _wrap("_ATEN_BACKWARD", _change_arg(5, _transpose))),
    "lse-with-three-dims-cudnn": Fault(CUDNN, _wrap("_ATEN_BACKWARD", _change_arg(5, lambda lse: lse.squeeze(-1)))),
    "lse-not-padded": Fault(EFFICIENT, _set(cuda_efficient, "_LSE_MULTIPLE", 1)),
    "lse-padded-with-0": Fault(
        EFFICIENT, _wrap("_ATEN_BACKWARD", _change_arg(6, lambda lse: lse.nan_to_num(posinf=0.0)))
    ),
    "out-not-in-rows": Fault(EFFICIENT, _set(cuda_efficient, "_to_dense_rows", lambda out: out)),
    "heads-of-gradients-not-summed": Fault(EFFICIENT, _wrap("_ATEN_BACKWARD", _keep_first_head)),
    "heads-not-alike": Fault(EFFICIENT, _set(cuda_efficient, "_equalize_heads", lambda q, k, v: (q, k, v))),
    "not-aligned": Fault(EFFICIENT, _replace_fields(prepare=lambda *tensors: tensors), "causal-mla"),
    "causal-bottom-right": Fault(EFFICIENT, _set(causal_blocks, "split", _split_bottom_right), "bands"),
    "causal-bottom-right-cudnn": Fault(CUDNN, _set(causal_blocks, "split", _split_bottom_right), "bands"),
    "window-ignored": Fault(EFFICIENT, _set(causal_blocks, "split", _split_without_window), "window"),
    "window-passed": Fault(EFFICIENT, _wrap("_ATEN_FORWARD", _pass_window), "window"),
    "small-tiles-cudnn": Fault(CUDNN, _set(routed.RoutedKernel, "_partition", _route_all_to_first), "packed"),
    "dropout-missing": Fault(EFFICIENT, _wrap("_ATEN_BACKWARD", _drop_arg(9))),
    "dropout-missing-cudnn": Fault(CUDNN, _wrap("_ATEN_BACKWARD", _drop_arg(13))),
    "seed-and-offset-before-lse": Fault(
        EFFICIENT, _wrap("_ATEN_BACKWARD", _reorder_args(0, 1, 2, 3, 4, 5, 7, 8, 6, 9, 10, 11))
    ),
    "seed-and-offset-last-cudnn": Fault(  # as in flash attention
        CUDNN, _wrap("_ATEN_BACKWARD", _reorder_args(0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 14, 6, 7))
    ),
    "not-dense-cudnn": Fault(CUDNN, _set(cuda_cudnn, "_to_dense_rows", lambda x: x)),
    "tiles-twice": Fault(CUDNN, _set(routed.RoutedKernel, "_partition", _route_all_to_both), "full"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_shows(name, monkeypatch):
    fault = FAULTS[name]
    adapter = fault.adapter

    def max_difference() -> float:
        if fault.detected_by == "bands":
            return max_band_difference(KERNELS[adapter], 5)
        mask, _, heads = fault.detected_by.partition("-")
        with threads_as_ranks() as run:
            return random_cases.worst_difference(replace(problem("zigzag", mask, heads or "gqa"), kernel=adapter), run)

    # The fault is undone before the stand-ins are, because it replaces some of them.
    large = 1 if fault.detected_by == "bands" else 5
    with aten_stand_in(adapter, large=large), monkeypatch.context() as patch:
        assert max_difference() <= random_cases.BAR
        fault.break_adapter(patch, adapter)
        try:
            difference = max_difference()
        except (AssertionError, TypeError, RuntimeError, ValueError) as error:
            message = str(error).partition("\n")[0] or traceback.extract_tb(error.__traceback__)[-1].line
            print(f"MUTATION {name:30} {type(error).__name__}: {message[:80]}")
        else:
            print(f"MUTATION {name:30} off by {difference:.2e}")
            assert not difference <= 1e-3
