"""The contract tests can fail: each assumption about PyTorch's operators that is broken on purpose shows.

Either a stand-in refuses the call, as the real operator would or should, or the numbers are wrong. `pytest -s` prints
a line for each.
"""

import math
import traceback

import pytest

from ring_hf.geometry import Piece
from ring_hf.kernels import KERNELS, causal_blocks, cuda_cudnn, cuda_efficient, routed
from scripts import fuzz
from tests.aten_stand_ins import aten_stand_in
from tests.kernels.test_flash_contract import problem, replace, worst_band
from tests.threads import threads_as_ranks

MODULES = {"cuda_efficient": cuda_efficient, "cuda_cudnn": cuda_cudnn}


def _wrapped(name, wrap):
    """Puts `wrap(original)` between a kernel and its operator."""

    def break_(patch, adapter):
        module = MODULES[adapter]
        patch.setattr(module, name, wrap(getattr(module, name)))

    return break_


def _set(module, name, value):
    return lambda patch, adapter: patch.setattr(module, name, value)


def _field(**changes):
    """Another frozen kernel of the same name."""

    def break_(patch, adapter):
        kernel = KERNELS[adapter]
        patch.setitem(KERNELS, adapter, replace(kernel, **changes))

    return break_


def _base_2(forward):
    def attend(*arguments, **maths):
        out, lse, *rest = forward(*arguments, **maths)
        return out, lse / math.log(2), *rest

    return attend


def _with_argument(index, change):
    """The operator gets another argument at a position."""

    def wrap(operator):
        def call(*arguments, **maths):
            arguments = list(arguments)
            arguments[index] = change(arguments[index])
            return operator(*arguments, **maths)

        return call

    return wrap


def _transposed(lse):
    return lse.transpose(1, 2).contiguous().view(lse.shape)


def _without(index):
    return lambda operator: lambda *arguments, **maths: operator(*arguments[:index], *arguments[index + 1 :], **maths)


def _in_order(*order):
    return lambda operator: lambda *arguments, **maths: operator(*(arguments[n] for n in order), **maths)


def _window_to_operator(operator):
    return lambda *arguments, **maths: operator(*arguments, window_size=7, **maths)


def _one_group(backward):
    def differentiate(*arguments, **maths):
        dq, dk, dv, bias = backward(*arguments, **maths)
        for x in (dk, dv):
            x[:, 1:] = 0  # what remains when heads are picked instead of summed
        return dq, dk, dv, bias

    return differentiate


def _bottom_right(num_q, num_k, lo, hi):
    """Causal for all that ends at the last query and key, as flash-attn means it."""
    if lo is None and hi == num_k - num_q:
        return [Piece(0, num_q, 0, num_k, "causal")]
    return pieces_split(num_q, num_k, lo, hi)


def _windows_are_causal(num_q, num_k, lo, hi):
    return pieces_split(num_q, num_k, None, hi)


def _first_kernel_alone(self, tiles):
    return [(self.first, list(tiles))]


pieces_split = causal_blocks.split
# fault -> (adapter, how to break it, what shows it: the mask of a ring, of GQA heads unless it says so, or "bands")
FAULTS = {
    "lse-base-2": ("cuda_efficient", _wrapped("_forward", _base_2), "causal"),
    "lse-base-2-cudnn": ("cuda_cudnn", _wrapped("_forward", _base_2), "causal"),
    "lse-transposed": ("cuda_efficient", _wrapped("_backward", _with_argument(6, _transposed)), "causal"),
    "lse-transposed-cudnn": ("cuda_cudnn", _wrapped("_backward", _with_argument(5, _transposed)), "causal"),
    "lse-with-three-dims-cudnn": (
        "cuda_cudnn",
        _wrapped("_backward", _with_argument(5, lambda lse: lse.squeeze(-1))),
        "causal",
    ),
    "lse-not-padded": ("cuda_efficient", _set(cuda_efficient, "_LSE", 1), "causal"),
    "lse-padded-with-0": (
        "cuda_efficient",
        _wrapped("_backward", _with_argument(6, lambda lse: lse.nan_to_num(posinf=0.0))),
        "causal",
    ),
    "out-not-in-rows": ("cuda_efficient", _set(cuda_efficient, "_dense_rows", lambda out: out), "causal"),
    "heads-of-gradients-not-summed": ("cuda_efficient", _wrapped("_backward", _one_group), "causal"),
    "heads-not-alike": ("cuda_efficient", _set(cuda_efficient, "_alike", lambda q, k, v: (q, k, v)), "causal"),
    "not-aligned": ("cuda_efficient", _field(prepare=lambda *tensors: tensors), "causal-mla"),
    "causal-bottom-right": ("cuda_efficient", _set(causal_blocks, "split", _bottom_right), "bands"),
    "causal-bottom-right-cudnn": ("cuda_cudnn", _set(causal_blocks, "split", _bottom_right), "bands"),
    "window-ignored": ("cuda_efficient", _set(causal_blocks, "split", _windows_are_causal), "window"),
    "window-handed-over": ("cuda_efficient", _wrapped("_forward", _window_to_operator), "window"),
    "small-tiles-cudnn": ("cuda_cudnn", _set(routed.RoutedKernel, "_dealt", _first_kernel_alone), "packed"),
    "dropout-missing": ("cuda_efficient", _wrapped("_backward", _without(9)), "causal"),
    "dropout-missing-cudnn": ("cuda_cudnn", _wrapped("_backward", _without(13)), "causal"),
    "seed-and-offset-before-lse": (
        "cuda_efficient",
        _wrapped("_backward", _in_order(0, 1, 2, 3, 4, 5, 7, 8, 6, 9, 10, 11)),
        "causal",
    ),
    "seed-and-offset-last-cudnn": (  # where flash attention's are
        "cuda_cudnn",
        _wrapped("_backward", _in_order(0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 14, 6, 7)),
        "causal",
    ),
    "not-dense-cudnn": ("cuda_cudnn", _set(cuda_cudnn, "_dense", lambda x: x), "causal"),
    "tiles-twice": (
        "cuda_cudnn",
        _set(
            routed.RoutedKernel, "_dealt", lambda self, tiles: [(self.first, list(tiles)), (self.second, list(tiles))]
        ),
        "full",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_shows(fault, monkeypatch):
    adapter, break_, shown_by = FAULTS[fault]

    def worst() -> float:
        if shown_by == "bands":
            return worst_band(KERNELS[adapter], 5)
        mask, _, heads = shown_by.partition("-")
        with threads_as_ranks() as run:
            return fuzz.worst_difference(replace(problem("zigzag", mask, heads or "gqa"), kernel=adapter), run)

    # The fault goes before the stand-ins do, some of which it replaces.
    with aten_stand_in(adapter, large=1 if shown_by == "bands" else 5), monkeypatch.context() as patch:
        assert worst() <= fuzz.BAR
        break_(patch, adapter)
        try:
            found = worst()
        except (AssertionError, TypeError, RuntimeError, ValueError) as error:
            said = str(error).partition("\n")[0] or traceback.extract_tb(error.__traceback__)[-1].line
            print(f"MUTATION {fault:30} {type(error).__name__}: {said[:80]}")
        else:
            print(f"MUTATION {fault:30} off by {found:.2e}")
            assert not found <= 1e-3
