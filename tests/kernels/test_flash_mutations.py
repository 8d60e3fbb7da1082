"""The contract tests can fail: they detect each assumption about FlashAttention that is broken on purpose.

Either a stand-in refuses the call, as the real function would, or the numbers are wrong. `pytest -s` prints the table.
"""

import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from ring_hf.kernels import KERNELS, flash_packages, flash_varlen, hub
from ring_hf.verify import random_cases
from ring_hf.verify.thread_ranks import threads_as_ranks
from tests.kernels.test_flash_contract import max_band_difference, problem
from tests.support.flash_stand_ins import kernel_named, stand_in


def _replace_in_kernels(change):
    """Replace the fields `change(kernel)` of every adapter."""

    def break_adapters(patch):
        for kernels in (KERNELS, hub.KERNELS):
            for name, kernel in list(kernels.items()):
                if isinstance(kernel, flash_varlen.FlashKernel):
                    patch.setitem(kernels, name, replace(kernel, **change(kernel)))

    return break_adapters


def _replace_in_variant(change):
    """Replace the fields `change(variant)` of the API of every package, after it was recognised."""

    def break_adapters(patch):
        original = flash_packages.match_variant

        def match_variant(*args):
            package = original(*args)
            return replace(package, variant=replace(package.variant, **change(package.variant)))

        patch.setattr(flash_packages, "match_variant", match_variant)

    return break_adapters


def _wrap_launch(name, wrapper):
    """Call `wrapper(original, *args)` instead of an adapter's `launch_forward` or `launch_backward`."""

    def change(kernel):
        original = getattr(kernel, name)
        return {name: lambda *args: wrapper(original, *args)}

    return _replace_in_kernels(change)


def _change_args(function_name, change):
    """Change the keyword arguments that a function of `flash_packages` returns."""

    def break_adapters(patch):
        original = getattr(flash_packages, function_name)
        patch.setattr(flash_packages, function_name, lambda *args: change(original(*args)))

    return break_adapters


def _set(target, name, value):
    return lambda patch: patch.setattr(target, name, value)


def _change_lse(change):
    """Change the lse that backward gets."""

    def break_adapters(patch):
        original = flash_varlen.gather_lse
        patch.setattr(flash_varlen, "gather_lse", lambda *args: change(original(*args)))

    return break_adapters


def _lse_in_base_2(launch_forward, *args):
    out, lse = launch_forward(*args)
    return out, lse / math.log(2)


def _drop_gradients(launch_backward, *args):
    return tuple(torch.empty_like(grad) for grad in launch_backward(*args))


def _swap_dout_and_out(launch_backward, dout, q, k, v, out, *others):
    return launch_backward(out, q, k, v, dout, *others)


def _swap_keys_and_values(launch_forward, q, k, v, *others):
    return launch_forward(q, v, k, *others)


def _top_left_window(tile):
    return None if tile.lo is None else -tile.lo, tile.hi


def _lengths_in_64_bits(patch):
    original = flash_varlen._index_tokens

    def index_tokens(*args):
        index, cu_seqlens = original(*args)
        return index, cu_seqlens.long()

    patch.setattr(flash_varlen, "_index_tokens", index_tokens)


def _add_any_tile(self, tile):
    self.tiles.append(tile)
    return True


def _without(*names):
    return lambda args: {name: value for name, value in args.items() if name not in names}


def _swapped(first, second):
    def swap(args):
        return args | {first: args[second], second: args[first]} if {first, second} <= set(args) else args

    return swap


ATEN, OLD_2, NEW_2, OLD_3, NEW_3, OLD_4, NEW_4 = ADAPTERS = (
    *("aten", "2.6.3", "2.8.3", "3-2.8.3", "3-2025-09", "4-beta10", "4-beta26"),
)
PACKAGES = ADAPTERS[1:]
VLLM = "kernels-community/vllm-flash-attn3"
WITH_SOFTCAP = (OLD_2, NEW_2, OLD_3, NEW_3, NEW_4, VLLM)


@dataclass(frozen=True)
class Fault:
    """A broken assumption.

    Args:
        adapters: the adapters that make it.
        break_adapters: `(patch)` breaks it.
        detected_by: the mask of a ring, "softcap" (a causal ring with it), or "bands".
    """

    adapters: tuple[str, ...]
    break_adapters: Callable[[pytest.MonkeyPatch], None]
    detected_by: str = "causal"


FAULTS = {
    "lse in base 2": Fault((*ADAPTERS, VLLM), _wrap_launch("launch_forward", _lse_in_base_2)),
    "lse transposed": Fault(
        (*ADAPTERS, VLLM), _change_lse(lambda lse: lse.transpose(-1, -2).contiguous().view(lse.shape))
    ),
    "lse not contiguous": Fault(
        ADAPTERS, _change_lse(lambda lse: lse.transpose(-1, -2).contiguous().transpose(-1, -2))
    ),
    "lse of the wrong result": Fault(PACKAGES, _replace_in_variant(lambda variant: {"lse_index": 0})),
    "lse not asked for": Fault((OLD_4, NEW_4), _replace_in_variant(lambda variant: {"forward_constants": {}})),
    "lse by another name": Fault(
        PACKAGES,
        _replace_in_variant(lambda variant: {"lse_arg": "lse" if variant.lse_arg == "softmax_lse" else "softmax_lse"}),
    ),
    "window aligned top left": Fault(ADAPTERS, _set(flash_varlen, "compute_window", _top_left_window), "chunks"),
    "window aligned top left, bands": Fault(ADAPTERS, _set(flash_varlen, "compute_window", _top_left_window), "bands"),
    "window's sides swapped": Fault(
        (NEW_2, NEW_3, OLD_4, NEW_4), _replace_in_variant(lambda variant: {"window_args": variant.window_args[::-1]})
    ),
    "-1 for a side without bound": Fault((OLD_4, NEW_4), _replace_in_variant(lambda variant: {"no_bound": -1})),
    "None for a side without bound": Fault(PACKAGES[:4], _replace_in_variant(lambda variant: {"no_bound": None})),
    "tall tiles not split": Fault(
        (ATEN, OLD_2, NEW_2), _replace_in_kernels(lambda kernel: {"split_tall_tiles": False}), "bands"
    ),
    "head dims not padded": Fault(ADAPTERS, _set(flash_varlen, "pad_head_dim", lambda x, head_dim: x)),
    "padding of values kept": Fault(ADAPTERS, _set(flash_varlen, "from_kernel_layout", lambda x, *_: x)),
    "dout swapped with out": Fault((*ADAPTERS, VLLM), _wrap_launch("launch_backward", _swap_dout_and_out)),
    "keys swapped with values": Fault(ADAPTERS, _wrap_launch("launch_forward", _swap_keys_and_values)),
    "gradients not written": Fault((*ADAPTERS, VLLM), _wrap_launch("launch_backward", _drop_gradients)),
    "scale missing": Fault(PACKAGES, _change_args("_shared_args", _without("softmax_scale"))),
    "dropout missing": Fault(
        (OLD_2, NEW_2, OLD_3, VLLM), _replace_in_variant(lambda variant: {"forward_constants": {}})
    ),
    "lengths missing": Fault(
        PACKAGES,
        _change_args("_shared_args", _without("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")),
        "packed",
    ),
    "longest missing": Fault(
        PACKAGES, _change_args("_shared_args", _without("max_seqlen_q", "max_seqlen_k")), "packed"
    ),
    "lengths swapped": Fault(
        PACKAGES, _change_args("_shared_args", _swapped("cu_seqlens_q", "cu_seqlens_k")), "packed"
    ),
    "lengths in 64 bits": Fault(ADAPTERS, _lengths_in_64_bits, "packed"),
    "a token twice in a call": Fault(ADAPTERS, _set(flash_varlen._TilePack, "try_add", _add_any_tile), "prefix"),
    "softcap lost forward": Fault(
        WITH_SOFTCAP, _change_args("_forward_args", lambda args: args | {"softcap": 0.0}), "softcap"
    ),
    "softcap lost backward": Fault(
        WITH_SOFTCAP, _change_args("_backward_args", lambda args: args | {"softcap": 0.0}), "softcap"
    ),
    "softcap None backward": Fault(PACKAGES, _change_args("_backward_args", lambda args: args | {"softcap": None})),
}
PAIRS = [(name, adapter) for name, fault in FAULTS.items() for adapter in fault.adapters]


def test_every_fault_is_tried_with_every_adapter_that_can_make_it():
    assert (len(FAULTS), len(PAIRS)) == (27, 161)


@pytest.mark.parametrize("name, adapter", PAIRS)
def test_fault_shows(name, adapter, monkeypatch):
    fault = FAULTS[name]

    def max_difference() -> float:
        monkeypatch.setattr(flash_varlen, "_launch_cache", flash_varlen._LaunchCache(max_tokens=1000))
        with stand_in(adapter) as kernel:
            if fault.detected_by == "bands":
                return max_band_difference(kernel_named(kernel), 5)
            mask, softcap = ("causal", 0.5) if fault.detected_by == "softcap" else (fault.detected_by, None)
            with threads_as_ranks() as run:
                case = replace(problem("zigzag", mask, "mla"), kernel=kernel, softcap=softcap)
                return random_cases.worst_difference(case, run)

    assert max_difference() <= random_cases.BAR
    fault.break_adapters(monkeypatch)
    try:
        difference = max_difference()
    except (AssertionError, AttributeError, TypeError, RuntimeError, ValueError, IndexError) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = str(error).splitlines()[0] if str(error) else f"{frame.name}: {frame.line}"
        outcome = f"{type(error).__name__}: {text}"
    else:
        outcome = f"off by {difference:.2e}"
        assert not difference <= 1e-3, f"{name} does not show with {adapter}"
    print(f"\nMUTATION {name:32}{adapter:36}{fault.detected_by:10}{outcome[:110]}", end=" ")
