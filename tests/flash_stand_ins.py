"""Stand-ins for FlashAttention's packages and PyTorch's CUDA flash attention: their calls and results, on a CPU.

Each takes the arguments of the version it stands for (`flash_stand_ins_signatures.py`), returns as many results, and
is found where the real one would be. What they compute is in `flash_stand_ins_maths.py`.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import torch

from ring_hf.kernels import (
    KERNELS,
    Kernel,
    cuda_cudnn,
    cuda_flash,
    flash_attn_2,
    flash_attn_3,
    flash_attn_4,
    flash_varlen,
    hub,
)
from tests.flash_stand_ins_maths import (
    CALLS,
    Bounds,
    clamped_by_three,
    clamped_by_two,
    compute_backward,
    compute_forward,
    dims_of_four,
    dims_of_three,
    one_head_dim,
    spans,
    taken_by_four,
)
from tests.flash_stand_ins_signatures import SIGNATURES


@dataclass(frozen=True)
class Rules:
    """What the versions of a package have in common."""

    bounds: Callable[..., Bounds]
    fits: Callable[[int, int], bool]
    unseen: float
    raw_lse: bool
    lse: str  # its name in backward
    no_softcap: tuple[float | None, ...]  # what switches it off in forward


TWO = Rules(clamped_by_two, one_head_dim, math.inf, True, "softmax_lse", (0.0,))
THREE = Rules(clamped_by_three, dims_of_three, -math.inf, True, "softmax_lse", (0.0,))
FOUR = Rules(taken_by_four, dims_of_four, -math.inf, False, "lse", (0.0, None))
_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_USED = {
    *("dout", "q", "k", "v", "out", "lse", "softmax_lse", "dq", "dk", "dv", *_LENGTHS, "return_lse", "deterministic"),
    *("softmax_scale", "softcap", "window_size", "window_size_left", "window_size_right"),
}


class StandIn:
    """A function with the parameters of `text`; as a custom operator it hides them behind `_init_fn`, as real ones."""

    def __init__(self, name: str, text: str, run: Callable[[SimpleNamespace], object], operator: bool) -> None:
        signature = eval(f"lambda {text}: None")
        parameters = inspect.signature(signature)

        def function(*args, **kwargs):
            bound = parameters.bind(*args, **kwargs)
            bound.apply_defaults()
            for name, value in bound.arguments.items():
                if name not in _USED and value != parameters.parameters[name].default:
                    assert value is None or value is False or (type(value) is float and value == 0.0), name
            return run(SimpleNamespace(**bound.arguments))

        function.__signature__ = parameters
        function.__name__ = name
        self.call = function
        if operator:
            self._init_fn = function
        else:
            self.__signature__ = parameters

    def __call__(self, *args, **kwargs):
        return self.call(*args, **kwargs)


def _maths(a: SimpleNamespace, rules: Rules) -> tuple[list[tuple[slice, slice]] | None, Bounds, float]:
    """Documents, window and scale of a call."""
    scale = a.q.shape[-1] ** -0.5 if a.softmax_scale is None else a.softmax_scale
    assert type(scale) is float
    lengths = [getattr(a, name, None) for name in _LENGTHS]
    if lengths[0] is None:
        assert lengths == [None] * 4
    documents = None if lengths[0] is None else spans(*lengths, a.q, a.k)
    longest = lengths[2:] if documents else (a.q.shape[1], a.k.shape[1])
    window = a.window_size if hasattr(a, "window_size") else (a.window_size_left, a.window_size_right)
    assert all((bound is None and rules is FOUR) or type(bound) is int for bound in window)
    return documents, rules.bounds(*window, *longest), scale


def _forward(rules: Rules, results: Callable[..., tuple], a: SimpleNamespace) -> tuple:
    documents, bounds, scale = _maths(a, rules)
    softcap = None if a.softcap in rules.no_softcap else a.softcap
    assert softcap is None or type(softcap) is float
    out, lse = compute_forward(a.q, a.k, a.v, documents, bounds, scale, softcap, rules.fits, rules.unseen)
    return results(a, out, lse if getattr(a, "return_lse", True) else None)


def _backward(rules: Rules, results: Callable[..., object], a: SimpleNamespace) -> object:
    documents, bounds, scale = _maths(a, rules)
    assert type(a.softcap) is float and type(a.deterministic) is bool
    lse = getattr(a, rules.lse)
    tensors = a.dout, a.q, a.k, a.v, a.out, lse
    grads = compute_backward(*tensors, documents, bounds, scale, a.softcap or None, rules.fits, rules.raw_lse)
    CALLS["deterministic"] += a.deterministic
    for into, grad in zip((a.dq, a.dk, a.dv), grads, strict=True):
        if into is not None:
            assert into.shape == grad.shape
            into.copy_(grad)
    return results(a)


# PyTorch 2.13.
# fmt: off
def aten_forward(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *,
                 scale=None, window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None,
                 block_table=None, num_splits=None):
    assert type(dropout_p) is float and dropout_p == 0.0 and is_causal is False and return_debug_mask is False
    assert all(x is None for x in (alibi_slopes, seqused_k, block_table, num_splits))
    documents = None if cum_seq_q is None else spans(cum_seq_q, cum_seq_k, max_q, max_k, query, key)
    assert documents or (max_q, max_k) == (query.shape[1], key.shape[1])
    window = (-1 if x is None else x for x in (window_size_left, window_size_right))
    bounds = clamped_by_two(*window, max_q, max_k)
    out, lse = compute_forward(query, key, value, documents, bounds, scale, None)
    return out, lse, torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64), torch.empty(0)


def aten_backward(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p,
                  is_causal, rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None):
    assert type(dropout_p) is float and dropout_p == 0.0 and is_causal is False
    assert rng_state.dtype == unused.dtype == torch.uint64
    documents = None if cum_seq_q is None else spans(cum_seq_q, cum_seq_k, max_q, max_k, query, key)
    assert documents or (max_q, max_k) == (query.shape[1], key.shape[1])
    window = (-1 if x is None else x for x in (window_size_left, window_size_right))
    bounds = clamped_by_two(*window, max_q, max_k)
    return compute_backward(grad_out, query, key, value, out, logsumexp, documents, bounds, scale, None)
# fmt: on


# What forward returns: version 2 before and since 2.7, version 3, version 4 before and since beta19.
_RANDOM, _NOTHING = torch.empty(2, dtype=torch.int64), torch.empty(0)


def _eight(a, out, lse):
    return out, a.q, a.k, a.v, out, lse, None, _RANDOM


def _four_of_two(a, out, lse):
    return out, lse, _NOTHING, _RANDOM


def _with_parts(a, out, lse):
    return out, lse, None, None


def _pair(a, out, lse):
    return out, lse


# What backward returns: gradients and what it needed for them, gradients, or what nobody asked for.
def _and_more(a):
    return a.dq, a.dk, a.dv, _NOTHING


def _gradients(a):
    return a.dq, a.dk, a.dv


def _other(a):
    return _NOTHING


# Rules, results forward and backward, whether they are custom operators, and the version that the package says.
BEHAVIOUR: dict[str, tuple[Rules, Callable, Callable, bool, str]] = {
    "2.6.3": (TWO, _eight, _and_more, False, "2.6.3"),
    "2.7.2.post1": (TWO, _four_of_two, _other, True, "2.7.2.post1"),
    "2.8.3": (TWO, _four_of_two, _other, True, "2.8.3"),
    "3-2.8.3": (THREE, _with_parts, _and_more, False, "3.0.0b1"),
    "3-2025-09": (THREE, _with_parts, _other, True, "3.0.0"),
    "4-beta4": (FOUR, _pair, _gradients, False, "4.0.0b4"),
    "4-beta10": (FOUR, _pair, _gradients, False, "4.0.0b10"),
    "4-beta24": (FOUR, _with_parts, _gradients, False, "4.0.0b24"),
    "4-beta26": (FOUR, _with_parts, _gradients, False, "4.0.0b26"),
    "kernels-community/flash-attn2": (TWO, _four_of_two, _other, True, "3"),
    "kernels-community/flash-attn3": (THREE, _with_parts, _other, True, "1"),
    "kernels-community/vllm-flash-attn3": (THREE, _with_parts, _and_more, False, "1"),
    "kernels-community/flash-attn4": (FOUR, _pair, _gradients, False, "4.0.0.beta8"),
}


def module(signatures: dict[str, str], rules: Rules, forward, backward, operators: bool) -> SimpleNamespace:
    """A module with functions of these signatures."""
    runs = functools.partial(_forward, rules, forward), functools.partial(_backward, rules, backward)
    functions = {
        name: StandIn(name, text, runs["bwd" in name or "backward" in name], operators)
        for name, text in signatures.items()
    }
    return SimpleNamespace(**functions)


MODULES = {name: module(SIGNATURES[name], *BEHAVIOUR[name][:4]) for name in SIGNATURES}
TWOS = ("2.6.3", "2.7.2.post1", "2.8.3")
PACKAGES = tuple(MODULES)
ADAPTERS = ("aten", *PACKAGES)
# Where soft-capping has no backward, or not that of packed calls.
UNCAPPED = ("aten", "4-beta4", "4-beta10", "kernels-community/flash-attn4")


# Major version -> the module of its functions, and the package as installers call it.
_NAMES = {
    "2": ("flash_attn.flash_attn_interface", "flash-attn"),
    "3": ("flash_attn_interface", "flash_attn_3"),
    "4": ("flash_attn.cute.interface", "flash-attn-4"),
    "k": ("kernels", "kernels"),
}


def _import_module(real, adapter: str, name: str) -> object:
    """What importing a module gives where this stand-in, and no other, is installed."""
    if name not in {module for module, _ in _NAMES.values()}:
        return real(name)
    if name != _NAMES[adapter[0]][0]:
        raise ModuleNotFoundError(f"No module named {name!r}")
    if name != "kernels":
        return MODULES[adapter]
    functions = {hub.REPOSITORIES[adapter].submodule: MODULES[adapter]}
    loaded = SimpleNamespace(**functions, __version__=BEHAVIOUR[adapter][4])
    return SimpleNamespace(get_kernel=functools.partial(_get_kernel, adapter, loaded))


def _version(real, adapter: str, name: str) -> str:
    if name not in {package for _, package in _NAMES.values()}:
        return real(name)
    if name != _NAMES[adapter[0]][1]:
        raise importlib.metadata.PackageNotFoundError(name)
    return "0.18.2" if name == "kernels" else BEHAVIOUR[adapter][4]


def _find_spec(real, adapter: str, name: str) -> object:
    return (adapter[0] == "3" or None) if name == "flash_attn_interface" else real(name)


def _get_kernel(adapter: str, loaded: object, repo_id, revision=None, version=None, backend=None, user_agent=None):
    """`kernels.get_kernel` (huggingface/kernels, kernels/src/kernels/load.py:47), of what is in the cache."""
    if (revision is None) == (version is None):
        raise ValueError("Either a revision or a version must be specified.")
    CALLS["loaded"] += 1
    if repo_id != adapter:
        raise FileNotFoundError(f"Cannot find {repo_id} in the cache, and the hub cannot be reached")
    return loaded


@contextlib.contextmanager
def installed(adapter: str) -> Iterator[None]:
    """As if the package of a stand-in, and no other, were installed."""

    searches = flash_attn_2.installed, flash_attn_3.installed, flash_attn_4.installed, hub.load
    for search in searches:
        search.cache_clear()
    with contextlib.ExitStack() as patches:
        for module, name, stand in (
            (importlib, "import_module", _import_module),
            (importlib.metadata, "version", _version),
            (importlib.util, "find_spec", _find_spec),
        ):
            instead = functools.partial(stand, getattr(module, name), adapter)
            patches.enter_context(mock.patch.object(module, name, instead))
        yield
    for search in searches:
        search.cache_clear()


def kernel_named(name: str) -> Kernel:
    """A kernel by its own name."""
    return hub.KERNELS[name] if name in hub.KERNELS else KERNELS[name]


@contextlib.contextmanager
def stand_in(adapter: str, large: int = 12, capability: tuple[int, int] = (9, 0)) -> Iterator[str]:
    """Puts a stand-in where the adapter looks, for tensors on a CPU in fp64; gives the kernel's name.

    Tiles from `large` queries on are dense calls.
    """
    # No Blackwell, no FlashAttention-4 of the first betas: their backward has no windows on Hopper.
    capability = (10, 0) if adapter == "4-beta4" else capability
    flash_varlen._grouped.cache_clear()
    with contextlib.ExitStack() as patches:

        def patch(module, name, value):
            patches.enter_context(mock.patch.object(module, name, value))

        patch(flash_varlen, "DEVICE", "cpu")
        patch(flash_varlen, "DTYPES", (torch.float64,))
        patch(flash_varlen, "LARGE", large)
        patch(flash_varlen, "capability", lambda device: capability)
        patch(cuda_cudnn, "_cudnn", lambda: None)  # builds for CUDA have it, and it would come first
        if adapter == "aten":
            patch(cuda_flash, "_forward", aten_forward)
            patch(cuda_flash, "_backward", aten_backward)
            patch(cuda_flash, "_is_built", lambda: True)
            yield cuda_flash.KERNEL.NAME
        else:
            patches.enter_context(installed(adapter))
            yield adapter if "/" in adapter else f"flash_attn_{adapter[0]}"
    flash_varlen._grouped.cache_clear()
