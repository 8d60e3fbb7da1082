"""Attention on tiles with the flash-attn package, version 2 (CUDA; soft-capping too).

Its low-level functions are called, which return lse and take the global `out` and `lse` in backward; the public ones
do neither. They were read in Dao-AILab/flash-attention, file flash_attn/flash_attn_interface.py, at every tag below:

    v2.6.2, v2.6.3      lines 48, 70, 118, 168    `window_size=(left, right)`; forward returns 8, lse sixth
    v2.7.0 to v2.7.2    lines 77, 143, 236, 328   `window_size_left`, `_right`; forward returns 4, lse second;
                                                  gradients only go into dq, dk, dv; custom operators
    v2.7.3 to v2.8.3    lines 77, 143, 238, 330   as before, more defaults at the end; from here on for Blackwell

2.6.0 and 2.6.1 take a softcap that their backward ignores. All arguments go by keyword. The package is imported here
alone, when it is first asked for; `flash_calls` says how tiles become calls.

Letters: B batch, H query heads, K key/value heads, C queries of the shard, S keys of the block, D and E head dims.
"""

import functools
import importlib
import importlib.metadata
import inspect
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from . import flash_calls
from .flash_calls import FlashKernel, KernelCall


@dataclass(frozen=True, slots=True)
class Form:
    """How the calls of some versions differ."""

    windows: tuple[str, ...]  # the arguments that hold the window
    lse: int  # its place among the results of forward
    newest: tuple[int, int]  # compute capability


# From this version on; the last until `_UNREAD`.
FORMS: dict[tuple[int, int, int], Form] = {
    (2, 6, 2): Form(("window_size",), 5, (9, 0)),
    (2, 7, 0): Form(("window_size_left", "window_size_right"), 1, (9, 0)),
    (2, 7, 3): Form(("window_size_left", "window_size_right"), 1, (99, 0)),
}
_UNREAD = (2, 9, 0)
_FORWARD = ("q", "k", "v", "dropout_p", "softmax_scale", "causal", "softcap", "alibi_slopes", "return_softmax")
_GRADIENTS = ("dout", "out", "softmax_lse", "dq", "dk", "dv", "deterministic")
_BACKWARD = (*_FORWARD[:-1], *_GRADIENTS)
_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
ARGUMENTS = {
    "_flash_attn_forward": _FORWARD,
    "_flash_attn_varlen_forward": _FORWARD + _LENGTHS,
    "_flash_attn_backward": _BACKWARD,
    "_flash_attn_varlen_backward": _BACKWARD + _LENGTHS,
}


def unfit(q: torch.Tensor, v: torch.Tensor, softcap: float | None) -> str | None:
    """Why this kernel cannot serve such tensors, or None."""
    found = installed()
    if isinstance(found, str):
        return found
    if (reason := flash_calls.unfit(q, v)) is not None:
        return reason
    version, form, _ = found
    have = flash_calls.capability(q.device)
    if have is not None and have > form.newest:
        return f"flash-attn {version} is not for compute capability {have[0]}.{have[1]}; 2.7.3 and later are"
    return None


@functools.lru_cache(maxsize=1)
def installed() -> tuple[str, Form, ModuleType] | str:
    """The version, its form and the module of the functions; or why there is none."""
    try:
        version = importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return "the package flash-attn is not installed"
    form = form_of(version)
    if form is None:
        return (
            f"flash-attn {version} is not one whose functions are known here; install flash-attn>=2.6.2,<2.9 "
            "(2.6.0 and 2.6.1 ignore soft-capping in backward)"
        )
    try:
        module = importlib.import_module("flash_attn.flash_attn_interface")
    except (ImportError, OSError) as error:  # built for another PyTorch, or no CUDA libraries
        return f"flash-attn {version} cannot be imported ({error})"
    differences = compare(module, form)
    return (
        f"flash-attn {version} differs from what was read: {'; '.join(differences)}"
        if differences
        else (
            version,
            form,
            module,
        )
    )


def form_of(version: str) -> Form | None:
    """The form of a version such as "2.7.4.post1", None if it is not known."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    numbers = tuple(map(int, found.groups())) if found else (0, 0, 0)
    fitting = [form for since, form in FORMS.items() if since <= numbers < _UNREAD]
    return fitting[-1] if fitting else None


def compare(module: ModuleType, form: Form) -> list[str]:
    """What the functions of a module lack of the arguments that are passed here, or want beside them."""
    found = []
    for name, arguments in ARGUMENTS.items():
        function = getattr(module, name, None)
        if function is None:
            found.append(f"there is no {name}")
            continue
        # A custom operator hides the signature of the function it was made of.
        parameters = inspect.signature(getattr(function, "_init_fn", function)).parameters
        passed = {*arguments, *form.windows}
        needed = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
        if lacking := passed - set(parameters):
            found.append(f"{name} takes no {', '.join(sorted(lacking))}")
        if missing := needed - passed:
            found.append(f"{name} wants {', '.join(sorted(missing))}")
    return found


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: KernelCall, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    form, module = _form_and_module()
    function = module._flash_attn_varlen_forward if call.documents else module._flash_attn_forward
    results = function(q=q, k=k, v=v, **_maths(call, form, scale, softcap), return_softmax=False)
    return results[0], results[form.lse]


def _differentiate(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: KernelCall,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    form, module = _form_and_module()
    function = module._flash_attn_varlen_backward if call.documents else module._flash_attn_backward
    # Since 2.7 gradients that nobody made room for are lost.
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    tensors = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse, "dq": dq, "dk": dk, "dv": dv}
    deterministic = torch.are_deterministic_algorithms_enabled()
    function(**tensors, **_maths(call, form, scale, softcap), deterministic=deterministic)
    return dq, dk, dv


def _form_and_module() -> tuple[Form, ModuleType]:
    found = installed()
    if isinstance(found, str):
        raise RuntimeError(f'kernel="flash_attn_2": {found}.')
    return found[1:]


def _maths(call: KernelCall, form: Form, scale: float, softcap: float | None) -> dict[str, Any]:
    """The arguments that all four functions share, and a packed call's lengths."""
    bounds = tuple(-1 if bound is None else bound for bound in (call.left, call.right))
    arguments: dict[str, Any] = {"dropout_p": 0.0, "alibi_slopes": None, "softmax_scale": scale, "causal": False}
    arguments["softcap"] = 0.0 if softcap is None else softcap
    arguments |= {form.windows[0]: bounds} if len(form.windows) == 1 else dict(zip(form.windows, bounds, strict=True))
    if call.documents:
        documents = call.documents
        lengths = documents.cu_q, documents.cu_k, documents.max_q, documents.max_k
        arguments |= dict(zip(_LENGTHS, lengths, strict=True))
    return arguments


KERNEL = FlashKernel("flash_attn_2", unfit, _attend, _differentiate)
