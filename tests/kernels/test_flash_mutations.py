"""The contract tests can fail: each assumption about flash-attn that is broken on purpose shows.

Either a stand-in refuses the call, as the real function would, or the numbers are wrong.
"""

import math

import pytest

from ring_hf.kernels import KERNELS, flash_attn_2, flash_calls
from tests.flash_stand_ins import stand_in
from tests.kernels.test_flash_contract import fuzz, problem, replace, threads_as_ranks, worst_band


def _base_2(patch):
    for name in ("flash_attn_2", "cuda_flash"):
        kernel = KERNELS[name]

        def attend(*arguments, original=kernel.attend):
            out, lse = original(*arguments)
            return out, lse / math.log(2)

        patch.setitem(KERNELS, name, replace(kernel, attend=attend))


def _top_left(patch):
    def window(tile):
        return None if tile.lo is None else -tile.lo, tile.hi

    patch.setattr(flash_calls, "window", window)


def _lse_transposed(patch):
    original = flash_calls.lse_for

    def lse_for(lse, place, dtype):
        right = original(lse, place, dtype)
        return right.transpose(-1, -2).contiguous().view(right.shape)

    patch.setattr(flash_calls, "lse_for", lse_for)


def _lse_not_contiguous(patch):
    original = flash_calls.lse_for

    def lse_for(lse, place, dtype):
        return original(lse, place, dtype).transpose(-1, -2).contiguous().transpose(-1, -2)

    patch.setattr(flash_calls, "lse_for", lse_for)


def _without(argument):
    def break_(patch):
        original = flash_attn_2._maths

        def maths(*arguments):
            return {name: value for name, value in original(*arguments).items() if name != argument}

        patch.setattr(flash_attn_2, "_maths", maths)

    return break_


def _documents_in_64_bits(patch):
    original = flash_calls._tokens
    patch.setattr(flash_calls, "_tokens", lambda *x: (original(*x)[0], original(*x)[1].long()))


# fault -> (how to break it, what shows it: the mask of a ring, or "bands", or what the stand-in says)
FAULTS = {
    "lse-base-2": (_base_2, "causal"),
    "window-top-left": (_top_left, "chunks"),
    "window-top-left-bands": (_top_left, "bands"),
    "lse-transposed": (_lse_transposed, "causal"),
    "lse-not-contiguous": (_lse_not_contiguous, "causal"),
    "rows-not-cut": (lambda patch: patch.setattr(flash_calls, "cut_rows", lambda tile: iter((tile,))), "bands"),
    "dropout-missing": (_without("dropout_p"), "causal"),
    "alibi-missing": (_without("alibi_slopes"), "causal"),
    "scale-missing": (_without("softmax_scale"), "causal"),
    "head-dims-not-padded": (lambda patch: patch.setattr(flash_calls, "one_head_dim", lambda *x: x), "causal"),
    "tokens-twice-in-a-call": (
        lambda patch: patch.setattr(flash_calls._Pack, "take", lambda self, tile: self.tiles.append(tile) or True),
        "prefix",
    ),
    "cumulative-lengths-in-64-bits": (_documents_in_64_bits, "packed"),
    "value-padding-kept": (
        lambda patch: patch.setattr(flash_calls, "given_back", lambda x, *_: x),
        "causal",
    ),
}
OF_FLASH_ATTN_ALONE = ("dropout-missing", "alibi-missing", "scale-missing")
PAIRS = [
    (fault, adapter)
    for fault in FAULTS
    for adapter in ("aten", "2.6.3", "2.8.3")
    if adapter != "aten" or fault not in OF_FLASH_ATTN_ALONE
]


@pytest.mark.parametrize("fault, adapter", PAIRS)
def test_fault_shows(fault, adapter, monkeypatch):
    break_, shown_by = FAULTS[fault]

    def worst(large: int) -> float:
        with stand_in(adapter, large) as kernel:
            if shown_by == "bands":
                return worst_band(KERNELS[kernel], 5)
            with threads_as_ranks() as run:
                return fuzz.worst_difference(replace(problem("zigzag", shown_by, "mla"), kernel=kernel), run)

    assert worst(12) <= fuzz.BAR
    break_(monkeypatch)
    try:
        found = worst(12)
    except (AssertionError, TypeError, RuntimeError, ValueError) as error:
        print(f"MUTATION {fault} {adapter}: {type(error).__name__} {str(error)[:100]}")
    else:
        print(f"MUTATION {fault} {adapter}: off by {found:.2e}")
        assert not found <= 1e-3
