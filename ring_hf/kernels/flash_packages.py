"""Kernels from packages of FlashAttention: an `ApiVariant` is a row of data that describes the API of some versions.

The low-level functions are called, because they return lse and take the global `out` and `lse` in backward; the
public ones do neither. Every argument is passed by keyword. Before the first call, the signatures of the installed
functions are compared with the arguments. Packages are imported when they are first asked for. The sources in which
each variant was read are listed in tests/kernels/README.md.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from types import ModuleType
from typing import Any

import torch

from . import flash_varlen
from .flash_varlen import FlashKernel, FlashLaunch, PaddedHeadDims, VarlenMetadata
from .indexing import StridedWindows


@dataclass(frozen=True, slots=True)
class ApiVariant:
    """Names, arguments and results of the functions of some versions.

    Args:
        forward: the functions for dense and for packed launches.
        backward: the same.
        window_args: the argument that takes both bounds, or the two that take one each.
        no_bound: the value of a bound that does not bind.
        lse_index: index of lse among the results of forward.
        lse_arg: the argument of backward that takes lse.
        no_softcap: the value of forward's `softcap` without soft-capping.
        forward_constants: arguments of forward that are always the same.
        backward_constants: arguments of backward that are always the same.
    """

    forward: tuple[str, str]
    backward: tuple[str, str]
    window_args: tuple[str, ...]
    no_bound: int | None = -1
    lse_index: int = 1
    lse_arg: str = "softmax_lse"
    no_softcap: float | None = 0.0
    forward_constants: Mapping[str, Any] = field(default_factory=dict)
    backward_constants: Mapping[str, Any] = field(default_factory=dict)

    @property
    def functions(self) -> tuple[str, ...]:
        """The names of all functions, each once."""
        return tuple(dict.fromkeys(self.forward + self.backward))


@dataclass(frozen=True, slots=True)
class Package:
    """An installed package: its name with the version for messages, the version, the API and the module with it."""

    name: str
    version: tuple[int, ...]
    variant: ApiVariant
    module: ModuleType


@dataclass(frozen=True, slots=True)
class Requirements:
    """The properties of a call and of its device that versions of a package support or not."""

    capability: tuple[int, int]
    head_dim: int
    value_dim: int
    softcap: float | None

    @property
    def max_head_dim(self) -> int:
        """The larger head dim."""
        return max(self.head_dim, self.value_dim)


LocatePackage = Callable[[], Package | str]
CheckLimits = Callable[[Package, Requirements], str | None]


def make_kernel(
    name: str,
    locate: LocatePackage,
    check_limits: CheckLimits,
    padded_head_dims: PaddedHeadDims = flash_varlen.shared_head_dim,
    split_tall_tiles: bool = False,
) -> FlashKernel:
    """Return the kernel of a package.

    Args:
        name: the name of the kernel.
        locate: returns the package, or the reason why there is none.
        check_limits: returns what the package lacks for these requirements, or None.
        padded_head_dims: see `FlashKernel`.
        split_tall_tiles: see `FlashKernel`.
    """
    return FlashKernel(
        name,
        partial(_why_unsupported, locate, check_limits),
        partial(_launch_forward, locate),
        partial(_launch_backward, locate),
        padded_head_dims,
        split_tall_tiles,
    )


def import_package(name: str, module: str) -> ModuleType | str:
    """Return a module of the installed package `name`, or the reason why it cannot be imported."""
    try:
        return importlib.import_module(module)
    # A package built for another PyTorch, or without its libraries, may raise anything; another kernel may work.
    except Exception as error:
        return f"{name} cannot be imported ({type(error).__name__}: {error})"


def match_variant(
    name: str, version: tuple[int, ...], module: ModuleType, variants: tuple[ApiVariant, ...], advice: str
) -> Package | str:
    """Return the package with the first variant that its functions have, or the differences to the nearest one.

    Args:
        name: the name with the version, for messages.
        version: the numbers of the version.
        module: the module of the functions.
        variants: the variants that versions of this package have.
        advice: what to install instead, for the message.
    """
    mismatches = [signature_mismatches(module, variant) for variant in variants]
    nearest = min(range(len(variants)), key=lambda index: len(mismatches[index]))
    if mismatches[nearest]:
        return f"{name} differs from the versions known here: {'; '.join(mismatches[nearest])}; {advice}"
    return Package(name, version, variants[nearest], module)


def signature_mismatches(module: ModuleType, variant: ApiVariant) -> list[str]:
    """List arguments we pass that the functions do not accept, and required arguments we do not pass."""
    passed: dict[str, set[str]] = {}
    tokens = StridedWindows(0, 1, 0, 1)
    for is_packed, varlen in enumerate((None, VarlenMetadata(torch.empty(0), torch.empty(0), 0, 0))):
        launch = FlashLaunch(tokens, tokens, None, None, varlen)
        forward_args, backward_args = (
            _forward_args(variant, launch, 1.0, None),
            _backward_args(variant, launch, 1.0, None),
        )
        passed[variant.forward[is_packed]] = {"q", "k", "v", *forward_args}
        passed[variant.backward[is_packed]] = {
            *("dout", "q", "k", "v", "out", variant.lse_arg, "dq", "dk", "dv"),
            *backward_args,
        }
    mismatches = []
    for name in variant.functions:
        function = getattr(module, name, None)
        if function is None:
            mismatches.append(f"there is no {name}")
            continue
        parameters = get_signature(function).parameters
        required = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
        if unknown := passed[name] - set(parameters):
            mismatches.append(f"{name} takes no {', '.join(sorted(unknown))}")
        if missing := required - passed[name]:
            mismatches.append(f"{name} requires {', '.join(sorted(missing))}")
    return mismatches


def get_signature(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a function, or of the function that a custom operator wraps."""
    return inspect.signature(getattr(function, "_init_fn", function))


def parse_version(version: str) -> tuple[int, ...]:
    """Return (2, 7, 4) for "2.7.4.post1", and (0, 0, 0) for text without three leading numbers."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    return tuple(map(int, match.groups())) if match else (0, 0, 0)


def _why_unsupported(
    locate: LocatePackage, check_limits: CheckLimits, q: torch.Tensor, v: torch.Tensor, softcap: float | None
) -> str | None:
    package = locate()
    if isinstance(package, str):
        return package
    if (reason := flash_varlen.why_unsupported(q, v)) is not None:
        return reason
    capability = flash_varlen.get_capability(q.device)
    assert capability is not None
    reason = check_limits(package, Requirements(capability, q.shape[-1], v.shape[-1], softcap))
    return f"{package.name} {reason}" if reason else None


def _locate_supported(locate: LocatePackage) -> Package:
    package = locate()
    assert not isinstance(package, str), package
    return package


def _launch_forward(
    locate: LocatePackage,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    launch: FlashLaunch,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    package = _locate_supported(locate)
    variant = package.variant
    function = getattr(package.module, variant.forward[launch.varlen is not None])
    results = function(q=q, k=k, v=v, **_forward_args(variant, launch, scale, softcap))
    return results[0], results[variant.lse_index]


def _launch_backward(
    locate: LocatePackage,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    launch: FlashLaunch,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    package = _locate_supported(locate)
    variant = package.variant
    function = getattr(package.module, variant.backward[launch.varlen is not None])
    # Some versions write the gradients to these tensors and do not return them.
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    tensors = {"dout": dout, "q": q, "k": k, "v": v, "out": out, variant.lse_arg: lse, "dq": dq, "dk": dk, "dv": dv}
    function(**tensors, **_backward_args(variant, launch, scale, softcap))
    return dq, dk, dv


def _forward_args(variant: ApiVariant, launch: FlashLaunch, scale: float, softcap: float | None) -> dict[str, Any]:
    arguments = _shared_args(variant, variant.forward, launch, scale)
    arguments["softcap"] = variant.no_softcap if softcap is None else softcap
    return arguments | dict(variant.forward_constants)


def _backward_args(variant: ApiVariant, launch: FlashLaunch, scale: float, softcap: float | None) -> dict[str, Any]:
    arguments = _shared_args(variant, variant.backward, launch, scale)
    arguments["softcap"] = 0.0 if softcap is None else softcap
    arguments["deterministic"] = torch.are_deterministic_algorithms_enabled()
    return arguments | dict(variant.backward_constants)


def _shared_args(variant: ApiVariant, functions: tuple[str, str], launch: FlashLaunch, scale: float) -> dict[str, Any]:
    """Return scale, window and the lengths of a packed launch.

    A dense launch passes None for the lengths if its function also computes packed ones.
    """
    bounds = tuple(variant.no_bound if bound is None else bound for bound in (launch.left, launch.right))
    arguments: dict[str, Any] = {"softmax_scale": scale}
    if len(variant.window_args) == 1:
        arguments[variant.window_args[0]] = bounds
    else:
        arguments |= dict(zip(variant.window_args, bounds, strict=True))
    if launch.varlen is not None:
        arguments |= {name: getattr(launch.varlen, name) for name in _VARLEN_ARGS}
    elif functions[0] == functions[1]:
        arguments |= dict.fromkeys(_VARLEN_ARGS)
    return arguments


_VARLEN_ARGS = tuple(member.name for member in fields(VarlenMetadata))
