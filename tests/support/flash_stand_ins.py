"""Stand-ins for FlashAttention's packages and PyTorch's CUDA flash attention: their calls and results, on a CPU.

Each stand-in takes the arguments of its version (`flash_stand_ins_signatures.py`), returns as many results, and is
installed under the name of the real one. Their computations are in `flash_stand_ins_maths.py`.
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
    selection,
)
from tests.support.flash_stand_ins_maths import (
    CALLS,
    Bounds,
    clamp_window_2,
    clamp_window_3,
    clamp_window_4,
    compute_backward,
    compute_forward,
    document_slices,
    supports_head_dims_2,
    supports_head_dims_3,
    supports_head_dims_4,
)
from tests.support.flash_stand_ins_signatures import SIGNATURES


@dataclass(frozen=True)
class Rules:
    """Behaviour that all versions of a package share.

    Args:
        clamp_window: `(left, right, longest queries, longest keys)` -> the window that is computed.
        supports_head_dims: `(head dim, value dim)` -> whether there is a kernel for them.
        empty_row_lse: lse of a row without visible keys.
        reads_raw_lse: backward reads lse through a raw pointer.
        lse_arg: the argument of backward that takes lse.
        no_softcap: values of forward's `softcap` that mean none.
    """

    clamp_window: Callable[..., Bounds]
    supports_head_dims: Callable[[int, int], bool]
    empty_row_lse: float
    reads_raw_lse: bool
    lse_arg: str
    no_softcap: tuple[float | None, ...]


RULES_2 = Rules(clamp_window_2, supports_head_dims_2, math.inf, True, "softmax_lse", (0.0,))
RULES_3 = Rules(clamp_window_3, supports_head_dims_3, -math.inf, True, "softmax_lse", (0.0,))
RULES_4 = Rules(clamp_window_4, supports_head_dims_4, -math.inf, False, "lse", (0.0, None))
_VARLEN_ARGS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_USED_ARGS = {
    *("dout", "q", "k", "v", "out", "lse", "softmax_lse", "dq", "dk", "dv", "return_lse", "deterministic"),
    *("softmax_scale", "softcap", "window_size", "window_size_left", "window_size_right", *_VARLEN_ARGS),
}


class StandIn:
    """A function with the parameters in `text`. As a custom operator it hides them behind `_init_fn`, like real ones.

    `compute` gets all arguments as one namespace. Unused arguments must have their default or a neutral value.
    """

    def __init__(self, name: str, text: str, compute: Callable[[SimpleNamespace], object], operator: bool) -> None:
        signature = inspect.signature(eval(f"lambda {text}: None"))

        def function(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            for name, value in bound.arguments.items():
                if name not in _USED_ARGS and value != signature.parameters[name].default:
                    assert value is None or value is False or (type(value) is float and value == 0.0), name
            return compute(SimpleNamespace(**bound.arguments))

        function.__signature__ = signature
        function.__name__ = name
        self.call = function
        if operator:
            self._init_fn = function
        else:
            self.__signature__ = signature

    def __call__(self, *args, **kwargs):
        return self.call(*args, **kwargs)


def _parse_args(args: SimpleNamespace, rules: Rules) -> tuple[list[tuple[slice, slice]] | None, Bounds, float]:
    """Return the documents, the window and the scale of a call."""
    scale = args.q.shape[-1] ** -0.5 if args.softmax_scale is None else args.softmax_scale
    assert type(scale) is float
    lengths = [getattr(args, name, None) for name in _VARLEN_ARGS]
    if lengths[0] is None:
        assert lengths == [None] * 4
    documents = None if lengths[0] is None else document_slices(*lengths, args.q, args.k)
    max_q, max_k = lengths[2:] if documents else (args.q.shape[1], args.k.shape[1])
    window = args.window_size if hasattr(args, "window_size") else (args.window_size_left, args.window_size_right)
    assert all((bound is None and rules is RULES_4) or type(bound) is int for bound in window)
    return documents, rules.clamp_window(*window, max_q, max_k), scale


def _forward(rules: Rules, make_results: Callable[..., tuple], args: SimpleNamespace) -> tuple:
    documents, bounds, scale = _parse_args(args, rules)
    softcap = None if args.softcap in rules.no_softcap else args.softcap
    assert softcap is None or type(softcap) is float
    out, lse = compute_forward(
        args.q, args.k, args.v, documents, bounds, scale, softcap, rules.supports_head_dims, rules.empty_row_lse
    )
    return make_results(args, out, lse if getattr(args, "return_lse", True) else None)


def _backward(rules: Rules, make_results: Callable[..., object], args: SimpleNamespace) -> object:
    documents, bounds, scale = _parse_args(args, rules)
    assert type(args.softcap) is float and type(args.deterministic) is bool
    grads = compute_backward(
        args.dout,
        args.q,
        args.k,
        args.v,
        args.out,
        getattr(args, rules.lse_arg),
        documents,
        bounds,
        scale,
        args.softcap or None,
        rules.supports_head_dims,
        rules.reads_raw_lse,
    )
    CALLS["deterministic"] += args.deterministic
    for target, grad in zip((args.dq, args.dk, args.dv), grads, strict=True):
        if target is not None:
            assert target.shape == grad.shape
            target.copy_(grad)
    return make_results(args)


# PyTorch 2.13.
# fmt: off
def aten_forward(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *,
                 scale=None, window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None,
                 block_table=None, num_splits=None):
    assert type(dropout_p) is float and dropout_p == 0.0 and is_causal is False and return_debug_mask is False
    assert all(x is None for x in (alibi_slopes, seqused_k, block_table, num_splits))
    documents = None if cum_seq_q is None else document_slices(cum_seq_q, cum_seq_k, max_q, max_k, query, key)
    assert documents or (max_q, max_k) == (query.shape[1], key.shape[1])
    window = (-1 if x is None else x for x in (window_size_left, window_size_right))
    bounds = clamp_window_2(*window, max_q, max_k)
    out, lse = compute_forward(query, key, value, documents, bounds, scale, None)
    return out, lse, torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64), torch.empty(0)


def aten_backward(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p,
                  is_causal, rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None):
    assert type(dropout_p) is float and dropout_p == 0.0 and is_causal is False
    assert rng_state.dtype == unused.dtype == torch.uint64
    documents = None if cum_seq_q is None else document_slices(cum_seq_q, cum_seq_k, max_q, max_k, query, key)
    assert documents or (max_q, max_k) == (query.shape[1], key.shape[1])
    window = (-1 if x is None else x for x in (window_size_left, window_size_right))
    bounds = clamp_window_2(*window, max_q, max_k)
    return compute_backward(grad_out, query, key, value, out, logsumexp, documents, bounds, scale, None)
# fmt: on


_RNG_STATE = torch.empty(2, dtype=torch.int64)
_EMPTY = torch.empty(0)


# The results of forward: version 2 before and since 2.7, version 3 and version 4 since beta19, version 4 before.
def _eight_results(args, out, lse):
    return out, args.q, args.k, args.v, out, lse, None, _RNG_STATE


def _four_results_with_rng_state(args, out, lse):
    return out, lse, _EMPTY, _RNG_STATE


def _four_results(args, out, lse):
    return out, lse, None, None


def _two_results(args, out, lse):
    return out, lse


# The results of backward: gradients and more, gradients, or no gradients.
def _gradients_and_more(args):
    return args.dq, args.dk, args.dv, _EMPTY


def _gradients(args):
    return args.dq, args.dk, args.dv


def _no_gradients(args):
    return _EMPTY


@dataclass(frozen=True)
class Behaviour:
    """Rules of a version, the results of its functions, whether they are custom operators, and its version number."""

    rules: Rules
    forward_results: Callable[..., tuple]
    backward_results: Callable[..., object]
    operators: bool
    version: str


BEHAVIOUR: dict[str, Behaviour] = {
    "2.6.3": Behaviour(RULES_2, _eight_results, _gradients_and_more, False, "2.6.3"),
    "2.7.2.post1": Behaviour(RULES_2, _four_results_with_rng_state, _no_gradients, True, "2.7.2.post1"),
    "2.8.3": Behaviour(RULES_2, _four_results_with_rng_state, _no_gradients, True, "2.8.3"),
    "3-2.8.3": Behaviour(RULES_3, _four_results, _gradients_and_more, False, "3.0.0b1"),
    "3-2025-09": Behaviour(RULES_3, _four_results, _no_gradients, True, "3.0.0"),
    "4-beta4": Behaviour(RULES_4, _two_results, _gradients, False, "4.0.0b4"),
    "4-beta10": Behaviour(RULES_4, _two_results, _gradients, False, "4.0.0b10"),
    "4-beta24": Behaviour(RULES_4, _four_results, _gradients, False, "4.0.0b24"),
    "4-beta26": Behaviour(RULES_4, _four_results, _gradients, False, "4.0.0b26"),
    "kernels-community/flash-attn2": Behaviour(RULES_2, _four_results_with_rng_state, _no_gradients, True, "3"),
    "kernels-community/flash-attn3": Behaviour(RULES_3, _four_results, _no_gradients, True, "1"),
    "kernels-community/vllm-flash-attn3": Behaviour(RULES_3, _four_results, _gradients_and_more, False, "1"),
    "kernels-community/flash-attn4": Behaviour(RULES_4, _two_results, _gradients, False, "4.0.0.beta8"),
}


def make_module(signatures: dict[str, str], behaviour: Behaviour) -> SimpleNamespace:
    """Return a module with functions of these signatures."""
    forward = functools.partial(_forward, behaviour.rules, behaviour.forward_results)
    backward = functools.partial(_backward, behaviour.rules, behaviour.backward_results)
    functions = {
        name: StandIn(name, text, backward if "bwd" in name or "backward" in name else forward, behaviour.operators)
        for name, text in signatures.items()
    }
    return SimpleNamespace(**functions)


MODULES = {name: make_module(signatures, BEHAVIOUR[name]) for name, signatures in SIGNATURES.items()}
PACKAGES = tuple(MODULES)
ADAPTERS = ("aten", *PACKAGES)
# Adapters without soft-capping in backward, or without it in packed calls.
ADAPTERS_WITHOUT_SOFTCAP = ("aten", "4-beta4", "4-beta10", "kernels-community/flash-attn4")


# Major version (or k, the hub) -> the module of its functions, and the name of the package for installers.
_NAMES = {
    "2": ("flash_attn.flash_attn_interface", "flash-attn"),
    "3": ("flash_attn_interface", "flash_attn_3"),
    "4": ("flash_attn.cute.interface", "flash-attn-4"),
    "k": ("kernels", "kernels"),
}


def _import_module(real, adapter: str, name: str) -> object:
    """Import a module where this stand-in, and no other, is installed."""
    if name not in {module for module, _ in _NAMES.values()}:
        return real(name)
    if name != _NAMES[adapter[0]][0]:
        raise ModuleNotFoundError(f"No module named {name!r}")
    if name != "kernels":
        return MODULES[adapter]
    functions = {hub.REPOSITORIES[adapter].submodule: MODULES[adapter]}
    loaded = SimpleNamespace(**functions, __version__=BEHAVIOUR[adapter].version)
    return SimpleNamespace(get_kernel=functools.partial(_get_kernel, adapter, loaded))


def _version(real, adapter: str, name: str) -> str:
    if name not in {package for _, package in _NAMES.values()}:
        return real(name)
    if name != _NAMES[adapter[0]][1]:
        raise importlib.metadata.PackageNotFoundError(name)
    return "0.18.2" if name == "kernels" else BEHAVIOUR[adapter].version


def _find_spec(real, adapter: str, name: str) -> object:
    return (adapter[0] == "3" or None) if name == "flash_attn_interface" else real(name)


def _get_kernel(adapter: str, loaded: object, repo_id, revision=None, version=None, backend=None, user_agent=None):
    """`kernels.get_kernel` (huggingface/kernels, kernels/src/kernels/load.py:47) with one kernel in the cache."""
    if (revision is None) == (version is None):
        raise ValueError("Either a revision or a version must be specified.")
    CALLS["loaded"] += 1
    if repo_id != adapter:
        raise FileNotFoundError(f"Cannot find {repo_id} in the cache, and the hub cannot be reached")
    return loaded


def _clear_caches() -> None:
    """Clear everything that depends on installed packages, devices or `MIN_DENSE_QUERIES`."""
    for locate in (flash_attn_2.locate_package, flash_attn_3.locate_package, flash_attn_4.locate_package, hub.load):
        locate.cache_clear()
    flash_varlen._group_tiles.cache_clear()
    selection.clear_cache()


@contextlib.contextmanager
def installed(adapter: str) -> Iterator[None]:
    """Replace Python's imports so that the package of this stand-in, and no other, is installed."""
    _clear_caches()
    with contextlib.ExitStack() as patches:
        patches.callback(_clear_caches)
        for module, name, stand_in in (
            (importlib, "import_module", _import_module),
            (importlib.metadata, "version", _version),
            (importlib.util, "find_spec", _find_spec),
        ):
            replacement = functools.partial(stand_in, getattr(module, name), adapter)
            patches.enter_context(mock.patch.object(module, name, replacement))
        yield


def kernel_named(name: str) -> Kernel:
    """Return a kernel by its own name."""
    return hub.KERNELS[name] if name in hub.KERNELS else KERNELS[name]


@contextlib.contextmanager
def stand_in(adapter: str, large: int = 12, capability: tuple[int, int] = (9, 0)) -> Iterator[str]:
    """Install a stand-in for tensors on a CPU in fp64, and yield the name of its kernel.

    Tiles of at least `large` queries are dense launches.
    """
    # FlashAttention-4 of the first betas has no windows in backward on Hopper.
    capability = (10, 0) if adapter == "4-beta4" else capability
    _clear_caches()
    with contextlib.ExitStack() as patches:
        patches.callback(_clear_caches)

        def patch(module, name, value):
            patches.enter_context(mock.patch.object(module, name, value))

        patch(flash_varlen, "DEVICE_TYPE", "cpu")
        patch(flash_varlen, "DTYPES", (torch.float64,))
        patch(flash_varlen, "MIN_DENSE_QUERIES", large)
        patch(flash_varlen, "get_capability", lambda device: capability)
        patch(cuda_cudnn, "_cudnn_version", lambda: None)  # builds for CUDA have it, and it would be preferred
        if adapter == "aten":
            patch(cuda_flash, "_ATEN_FORWARD", aten_forward)
            patch(cuda_flash, "_ATEN_BACKWARD", aten_backward)
            patch(cuda_flash, "_is_built", lambda: True)
            yield cuda_flash.KERNEL.NAME
        else:
            patches.enter_context(installed(adapter))
            yield adapter if "/" in adapter else f"flash_attn_{adapter[0]}"
