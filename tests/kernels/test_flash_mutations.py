"""The contract tests can fail: each assumption about FlashAttention that is broken on purpose shows.

Either a stand-in refuses the call, as the real function would, or the numbers are wrong. `pytest -s` prints the table.
"""

import math
import traceback
from dataclasses import replace

import pytest
import torch

from ring_hf.kernels import KERNELS, flash_packages, flash_varlen, hub
from tests.flash_stand_ins import kernel_named, stand_in
from tests.kernels.test_flash_contract import fuzz, problem, threads_as_ranks, worst_band


def _kernels(change):
    """Breaks every adapter by `change(kernel)`, what to replace of it."""

    def break_(patch):
        for kernels in (KERNELS, hub.KERNELS):
            for name, kernel in list(kernels.items()):
                if isinstance(kernel, flash_varlen.FlashKernel):
                    patch.setitem(kernels, name, replace(kernel, **change(kernel)))

    return break_


def _forms(change):
    """Breaks the form of every package, after it was recognised, by `change(form)`, what to replace of it."""

    def break_(patch):
        original = flash_packages.fitting

        def fitting(*arguments):
            package = original(*arguments)
            return replace(package, form=replace(package.form, **change(package.form)))

        patch.setattr(flash_packages, "fitting", fitting)

    return break_


def _wrapped(which, change):
    """Breaks what an adapter's function (`attend` or `differentiate`) is given or gives back."""
    return _kernels(lambda kernel: {which: lambda *arguments: change(getattr(kernel, which), *arguments)})


def _arguments(which, change):
    """Breaks the arguments by name that the packages are given besides tensors."""

    def break_(patch):
        original = getattr(flash_packages, which)
        patch.setattr(flash_packages, which, lambda *arguments: change(original(*arguments)))

    return break_


def _base_2(attend, *arguments):
    out, lse = attend(*arguments)
    return out, lse / math.log(2)


def _not_written(differentiate, *arguments):
    return tuple(torch.empty_like(grad) for grad in differentiate(*arguments))


def _dout_swapped_with_out(differentiate, dout, q, k, v, out, *others):
    return differentiate(out, q, k, v, dout, *others)


def _keys_swapped_with_values(attend, q, k, v, *others):
    return attend(q, v, k, *others)


def _patched(module, name, value):
    return lambda patch: patch.setattr(module, name, value)


def _top_left(tile):
    return None if tile.lo is None else -tile.lo, tile.hi


def _of_lse(change):
    """Breaks the lse that backward is given."""

    def break_(patch):
        original = flash_varlen.lse_for
        patch.setattr(flash_varlen, "lse_for", lambda *arguments: change(original(*arguments)))

    return break_


def _documents_in_64_bits(patch):
    original = flash_varlen._tokens
    patch.setattr(flash_varlen, "_tokens", lambda *x: (original(*x)[0], original(*x)[1].long()))


def _without(*names):
    return lambda found: {name: value for name, value in found.items() if name not in names}


def _swapped(one, other):
    return lambda found: found | {one: found[other], other: found[one]} if {one, other} <= set(found) else found


def _windows_swapped(form):
    return {"windows": form.windows[::-1]}


ATEN, OLD_2, NEW_2, OLD_3, NEW_3, PAIR_4, FOUR_4 = BROKEN = (
    *("aten", "2.6.3", "2.8.3", "3-2.8.3", "3-2025-09", "4-beta10", "4-beta26"),
)
PACKAGED, ONE_FUNCTION = BROKEN[1:], (OLD_3, NEW_3, PAIR_4, FOUR_4)
VLLM = "kernels-community/vllm-flash-attn3"
# fault -> (how to break it, the mask of a ring or "bands" that shows it, the adapters)
FAULTS = {
    "lse in base 2": (_wrapped("attend", _base_2), "causal", (*BROKEN, VLLM)),
    "lse transposed": (
        _of_lse(lambda lse: lse.transpose(-1, -2).contiguous().view(lse.shape)),
        "causal",
        (*BROKEN, VLLM),
    ),
    "lse not contiguous": (
        _of_lse(lambda lse: lse.transpose(-1, -2).contiguous().transpose(-1, -2)),
        "causal",
        BROKEN,
    ),
    "lse of the wrong result": (_forms(lambda form: {"lse_at": 0}), "causal", PACKAGED),
    "lse not asked for": (_forms(lambda form: {"forward_always": {}}), "causal", (PAIR_4, FOUR_4)),
    "lse by another name": (
        _forms(lambda form: {"lse": "lse" if form.lse == "softmax_lse" else "softmax_lse"}),
        "causal",
        PACKAGED,
    ),
    "window aligned top left": (_patched(flash_varlen, "window", _top_left), "chunks", BROKEN),
    "window aligned top left, bands": (_patched(flash_varlen, "window", _top_left), "bands", BROKEN),
    "window's sides swapped": (_forms(_windows_swapped), "causal", (NEW_2, NEW_3, PAIR_4, FOUR_4)),
    "-1 for a side without bound": (_forms(lambda form: {"unbounded": -1}), "causal", (PAIR_4, FOUR_4)),
    "None for a side without bound": (_forms(lambda form: {"unbounded": None}), "causal", PACKAGED[:4]),
    "rows not cut": (_kernels(lambda kernel: {"cuts_rows": False}), "bands", (ATEN, OLD_2, NEW_2)),
    "head dims not padded": (_patched(flash_varlen, "padded", lambda x, width: x), "causal", BROKEN),
    "padding of values kept": (_patched(flash_varlen, "given_back", lambda x, *_: x), "causal", BROKEN),
    "dout swapped with out": (_wrapped("differentiate", _dout_swapped_with_out), "causal", (*BROKEN, VLLM)),
    "keys swapped with values": (_wrapped("attend", _keys_swapped_with_values), "causal", BROKEN),
    "gradients not written": (_wrapped("differentiate", _not_written), "causal", (*BROKEN, VLLM)),
    "scale missing": (_arguments("_shared_arguments", _without("softmax_scale")), "causal", PACKAGED),
    "dropout missing": (_forms(lambda form: {"forward_always": {}}), "causal", (OLD_2, NEW_2, OLD_3, VLLM)),
    "lengths missing": (
        _arguments("_shared_arguments", _without("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")),
        "packed",
        PACKAGED,
    ),
    "longest missing": (
        _arguments("_shared_arguments", _without("max_seqlen_q", "max_seqlen_k")),
        "packed",
        PACKAGED,
    ),
    "lengths swapped": (_arguments("_shared_arguments", _swapped("cu_seqlens_q", "cu_seqlens_k")), "packed", PACKAGED),
    "lengths in 64 bits": (_documents_in_64_bits, "packed", BROKEN),
    "a token twice in a call": (
        _patched(flash_varlen._Pack, "take", lambda self, tile: self.tiles.append(tile) or True),
        "prefix",
        BROKEN,
    ),
    "softcap lost forward": (
        _arguments("_forward_arguments", lambda found: found | {"softcap": 0.0}),
        "softcap",
        (OLD_2, NEW_2, OLD_3, NEW_3, FOUR_4, VLLM),
    ),
    "softcap lost backward": (
        _arguments("_backward_arguments", lambda found: found | {"softcap": 0.0}),
        "softcap",
        (OLD_2, NEW_2, OLD_3, NEW_3, FOUR_4, VLLM),
    ),
    "softcap None backward": (
        _arguments("_backward_arguments", lambda found: found | {"softcap": None}),
        "causal",
        PACKAGED,
    ),
}
PAIRS = [(fault, adapter) for fault, (_, _, adapters) in FAULTS.items() for adapter in adapters]


def test_every_fault_is_tried_where_it_can_be_made():
    assert (len(FAULTS), len(PAIRS)) == (27, 161)


@pytest.mark.parametrize("fault, adapter", PAIRS)
def test_fault_shows(fault, adapter, monkeypatch):
    break_, shown_by, _ = FAULTS[fault]

    def worst(large: int) -> float:
        monkeypatch.setattr(flash_varlen, "_packed_calls", flash_varlen._PackedCalls(most=1000))
        with stand_in(adapter, large) as name:
            if shown_by == "bands":
                return worst_band(kernel_named(name), 5)
            mask, softcap = ("causal", 0.5) if shown_by == "softcap" else (shown_by, None)
            with threads_as_ranks() as run:
                case = replace(problem("zigzag", mask, "mla"), kernel=name, softcap=softcap)
                return fuzz.worst_difference(case, run)

    assert worst(12) <= fuzz.BAR
    break_(monkeypatch)
    try:
        found = worst(12)
    except (AssertionError, AttributeError, TypeError, RuntimeError, ValueError, IndexError) as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        said = str(error).splitlines()[0] if str(error) else f"{at.name}: {at.line}"
        said = f"{type(error).__name__}: {said}"
    else:
        said = f"off by {found:.2e}"
        assert not found <= 1e-3, f"{fault} does not show with {adapter}"
    print(f"\nMUTATION {fault:32}{adapter:36}{shown_by:10}{said[:110]}", end=" ")
