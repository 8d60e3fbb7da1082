"""Kernels from packages of FlashAttention: how a version spells its calls is a `ApiVariant`, a row of data.

The low-level functions are called, which return lse and take the global `out` and `lse` in backward; the public ones
do neither. Every argument goes by keyword, and before anything is called the signatures found are compared with what
will be passed. Packages are imported when they are first asked for. Where each form was read stands beside it
(`Provenance`), and in one list in tests/kernels/README.md.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch

from . import flash_varlen
from .flash_varlen import Documents, FlashKernel, FlashLaunch, Widths
from .indexing import StridedWindows


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a form was read: tags of a repository, a file, and the line of each function in the order of the form."""

    tags: str
    lines: tuple[int, ...]
    repository: str = "Dao-AILab/flash-attention"
    file: str = "flash_attn/flash_attn_interface.py"


@dataclass(frozen=True, slots=True)
class ApiVariant:
    """How the calls of some versions are spelled."""

    forward: tuple[str, str]  # the functions for dense and for packed calls
    backward: tuple[str, str]
    windows: tuple[str, ...]  # the argument that holds both bounds, or those that hold one each
    read: tuple[Provenance, ...]
    unbounded: int | None = -1  # a window's side without bound
    lse_at: int = 1  # its place among the results of forward
    lse: str = "softmax_lse"  # its name among the arguments of backward
    uncapped: float | None = 0.0  # forward's softcap if there is none
    forward_always: Mapping[str, Any] = field(default_factory=dict)
    backward_always: Mapping[str, Any] = field(default_factory=dict)

    @property
    def functions(self) -> tuple[str, ...]:
        """Every function once."""
        return tuple(dict.fromkeys(self.forward + self.backward))


@dataclass(frozen=True, slots=True)
class Package:
    """What was found: a name with its version for messages, the numbers of the version, its form and functions."""

    name: str
    version: tuple[int, ...]
    form: ApiVariant
    functions: ModuleType


@dataclass(frozen=True, slots=True)
class Requirements:
    """What a package is asked for."""

    capability: tuple[int, int]
    head_dim: int
    value_dim: int
    softcap: float | None

    @property
    def widest(self) -> int:
        """The larger head dim."""
        return max(self.head_dim, self.value_dim)


Find = Callable[[], Package | str]
Limits = Callable[[Package, Requirements], str | None]


def kernel(
    name: str,
    find: Find,
    limits: Limits,
    widths: Widths = flash_varlen.one_width,
    cuts_rows: bool = False,
) -> FlashKernel:
    """The kernel of the package that `find()` gives, if not the reason why there is none.

    `limits(package, wanted)` is what this package cannot do, or None.
    """
    return FlashKernel(
        name,
        partial(_why_unsupported, find, limits),
        partial(_attend, find),
        partial(_differentiate, find),
        widths,
        cuts_rows,
    )


def imported(name: str, module: str) -> ModuleType | str:
    """A module of an installed package, or why it cannot be imported."""
    try:
        return importlib.import_module(module)
    # Whatever a package raises that was built for another PyTorch, or misses its libraries: another kernel may do.
    except Exception as error:
        return f"{name} cannot be imported ({type(error).__name__}: {error})"


def fitting(
    name: str, version: tuple[int, ...], functions: ModuleType, forms: tuple[ApiVariant, ...], instead: str
) -> Package | str:
    """The package with the first of the forms that its functions have, or what the nearest lacks and what to do."""
    found = [(compare(functions, form), form) for form in forms]
    differences, form = min(found, key=lambda item: len(item[0]))
    if differences:
        return f"{name} differs from what was read: {'; '.join(differences)}; {instead}"
    return Package(name, version, form, functions)


def compare(functions: ModuleType, form: ApiVariant) -> list[str]:
    """What the functions of a module lack of the arguments that are passed here, or want beside them."""
    found = []
    passed: dict[str, set[str]] = {}
    for packed in (False, True):
        call = FlashLaunch(
            StridedWindows(0, 1, 0, 1), StridedWindows(0, 1, 0, 1), None, None, _NO_DOCUMENTS if packed else None
        )
        passed[form.forward[packed]] = {"q", "k", "v", *_forward_arguments(form, call, 1.0, None)}
        passed[form.backward[packed]] = {
            *("dout", "q", "k", "v", "out", form.lse, "dq", "dk", "dv"),
            *_backward_arguments(form, call, 1.0, None),
        }
    for name in form.functions:
        function = getattr(functions, name, None)
        if function is None:
            found.append(f"there is no {name}")
            continue
        parameters = signature(function).parameters
        needed = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
        if lacking := passed[name] - set(parameters):
            found.append(f"{name} takes no {', '.join(sorted(lacking))}")
        if missing := needed - passed[name]:
            found.append(f"{name} wants {', '.join(sorted(missing))}")
    return found


def signature(function: Callable[..., Any]) -> inspect.Signature:
    """Of a function, or of the function that a custom operator was made of and hides."""
    return inspect.signature(getattr(function, "_init_fn", function))


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version such as "2.7.4.post1", (0, 0, 0) if there are none."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    return tuple(map(int, found.groups())) if found else (0, 0, 0)


def _why_unsupported(
    find: Find, limits: Limits, q: torch.Tensor, v: torch.Tensor, softcap: float | None
) -> str | None:
    """Why this kernel cannot serve such tensors, or None."""
    found = find()
    if isinstance(found, str):
        return found
    if (reason := flash_varlen.why_unsupported(q, v)) is not None:
        return reason
    capability = flash_varlen.capability(q.device)
    assert capability is not None
    reason = limits(found, Requirements(capability, q.shape[-1], v.shape[-1], softcap))
    return f"{found.name} {reason}" if reason else None


def _found(find: Find) -> Package:
    found = find()
    assert not isinstance(found, str), found
    return found


def _attend(
    find: Find,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: FlashLaunch,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    package = _found(find)
    function = getattr(package.functions, package.form.forward[call.documents is not None])
    results = function(q=q, k=k, v=v, **_forward_arguments(package.form, call, scale, softcap))
    return results[0], results[package.form.lse_at]


def _differentiate(
    find: Find,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: FlashLaunch,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    package = _found(find)
    function = getattr(package.functions, package.form.backward[call.documents is not None])
    # Some versions return no gradients: those that nobody made room for are lost.
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    tensors = {"dout": dout, "q": q, "k": k, "v": v, "out": out, package.form.lse: lse, "dq": dq, "dk": dk, "dv": dv}
    function(**tensors, **_backward_arguments(package.form, call, scale, softcap))
    return dq, dk, dv


def _forward_arguments(form: ApiVariant, call: FlashLaunch, scale: float, softcap: float | None) -> dict[str, Any]:
    capped = {"softcap": form.uncapped if softcap is None else softcap}
    return _shared_arguments(form, form.forward, call, scale) | capped | dict(form.forward_always)


def _backward_arguments(form: ApiVariant, call: FlashLaunch, scale: float, softcap: float | None) -> dict[str, Any]:
    capped = {"softcap": 0.0 if softcap is None else softcap}
    deterministic = {"deterministic": torch.are_deterministic_algorithms_enabled()}
    return _shared_arguments(form, form.backward, call, scale) | capped | deterministic | dict(form.backward_always)


def _shared_arguments(form: ApiVariant, functions: tuple[str, str], call: FlashLaunch, scale: float) -> dict[str, Any]:
    """Scale and window, and the lengths of a packed call; None in their place where one function serves both."""
    bounds = tuple(form.unbounded if bound is None else bound for bound in (call.left, call.right))
    arguments: dict[str, Any] = {"softmax_scale": scale}
    arguments |= {form.windows[0]: bounds} if len(form.windows) == 1 else dict(zip(form.windows, bounds, strict=True))
    if (documents := call.documents) is not None:
        lengths: tuple[Any, ...] = documents.cu_q, documents.cu_k, documents.max_q, documents.max_k
        arguments |= dict(zip(_LENGTHS, lengths, strict=True))
    elif functions[0] == functions[1]:
        arguments |= dict.fromkeys(_LENGTHS)
    return arguments


_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_NO_DOCUMENTS = Documents(torch.empty(0), torch.empty(0), 0, 0)
