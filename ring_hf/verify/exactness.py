"""Every kernel that fits this device, through the plans of all ranks of a ring, against dense attention in fp64.

A row is one kernel in one dtype on one problem, forward and backward; the ranks are emulated, all blocks resident. It
holds the relative RMS error of out, lse, dq, dk and dv against fp64, and that of attention in one process in the same
dtype: the larger of PyTorch's scaled_dot_product_attention (which has no soft-cap) and Transformers' "eager" formula.
The inputs are rounded to bf16 first, so that all dtypes have one truth. The bar is the repository's: half precision at
most twice the error of one process; fp32 2e-6 forward and 1e-5 for gradients, or twice that of one process if more.

Letters: B batch, H query heads, K key/value heads, S tokens, D and E head dims.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..geometry import LAYOUTS, TRANSPORTS, AttentionSpec, Mask, RingOptions, ShardedSequence
from ..kernels import candidates
from ..testing import dense_attention, dense_mask
from .ring_emulation import Emulation, emulated_attention

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
Results = dict[str, torch.Tensor]
NAMES = ("out", "lse", "dq", "dk", "dv")
FACTOR = 2.0  # half precision: allowed error over that of one process
FULL_PRECISION = {"out": 2e-6, "lse": 2e-6, "dq": 1e-5, "dk": 1e-5, "dv": 1e-5}
HALF_LSE = 1e-3  # no other implementation returns one; it is fp32 of scores that are sums of exact products
SMALLEST = 1e-14  # of any bar: one process may be exact
ROWS = 2


@dataclass(frozen=True)
class Problem:
    """One attention problem; each of `ranks` ranks holds two chunks of `unit` tokens."""

    layout: str = "zigzag"
    mask: str = "causal"
    heads: tuple[int, int] = (8, 2)
    dims: tuple[int, int] = (128, 128)
    transport: str = "ring"
    softcap: float | None = None
    unit: int = 131  # odd: nothing is a multiple of a kernel's tile
    ranks: int = 4

    @property
    def length(self) -> int:
        return 2 * self.ranks * self.unit

    @property
    def scale(self) -> float:
        return float(self.dims[0] ** -0.5)

    @property
    def documents(self) -> tuple[tuple[int, ...], ...] | None:
        """Boundaries of packed documents, different in each row, one document of a single token."""
        if "documents" not in self.mask:
            return None
        s = self.length
        return (0, s // 9, s // 9 + 1, s // 2 + 3, s), (0, 2 * s // 3 - 1, s)

    @property
    def rules(self) -> Mask:
        window = self.length // 5 if "window" in self.mask else None
        chunk = self.length // 3 if "chunk" in self.mask else None
        return Mask("full" not in self.mask, window, chunk)

    def describe(self) -> str:
        dims = f"{self.dims[0]}" if self.dims[0] == self.dims[1] else f"{self.dims[0]}/{self.dims[1]}"
        parts = [self.layout, self.transport, self.mask, f"{self.heads[0]}/{self.heads[1]} heads x {dims}"]
        parts += [f"softcap {self.softcap:g}"] if self.softcap else []
        return ", ".join([*parts, f"{self.length:,} tokens over {self.ranks} ranks"])


MASKS = ("causal", "full", "window", "chunk", "documents", "documents window", "documents full")
HEADS = ((4, 4), (8, 2), (6, 1))
DIMS = ((64, 64), (128, 128), (192, 128), (256, 256))
# A tile of 1,024 queries or more is a kernel call of its own; cuDNN takes those that 128 divides.
LARGE = (1024, 1031)


def problems(quick: bool, tiny: bool) -> list[Problem]:
    """Return layouts x masks, head dims x head counts x masks, the other transports, soft-capping, large tiles."""
    layouts, masks = (("zigzag", "striped"), MASKS[:1] + MASKS[5:6]) if quick else (LAYOUTS, MASKS)
    selection = [Problem(layout, mask) for layout, mask in itertools.product(layouts, masks)]
    pairs = list(zip(DIMS, itertools.cycle(HEADS))) if quick else list(itertools.product(DIMS, HEADS))
    few_masks = ("causal",) if quick else ("causal", "documents window")
    selection += [Problem("zigzag", mask, heads, dims) for (dims, heads), mask in itertools.product(pairs, few_masks)]
    selection += [Problem("contiguous", "documents window", transport=transport) for transport in TRANSPORTS[1:]]
    selection += [Problem("zigzag", mask, softcap=20.0) for mask in few_masks]
    selection += [Problem("zigzag", "causal", (4, 2), unit=unit, ranks=2) for unit in LARGE]
    if not quick:
        long = Problem("zigzag", "causal", (4, 2), unit=LARGE[0], ranks=2)
        selection += [replace(long, layout=layout, mask="documents") for layout in LAYOUTS]
        selection += [replace(long, mask=mask) for mask in ("full", "window")]
        selection += [replace(long, dims=dims) for dims in DIMS]
    if tiny:
        selection = [replace(problem, unit=13) for problem in selection]
    return list(dict.fromkeys(selection))


def inputs(problem: Problem, device: torch.device) -> list[torch.Tensor]:
    """Return q `[B, H, S, D]`, k `[B, K, S, D]`, v `[B, K, S, E]` and the gradient of out `[B, H, S, E]` in bf16."""
    generator = torch.Generator().manual_seed(0)
    (num_heads, num_kv_heads), (dim, v_dim) = problem.heads, problem.dims
    shapes = (num_heads, dim), (num_kv_heads, dim), (num_kv_heads, v_dim), (num_heads, v_dim)
    tensors = (torch.randn(ROWS, heads, problem.length, width, generator=generator) for heads, width in shapes)
    return [x.bfloat16().to(device) for x in tensors]


def single_process_errors(
    problem: Problem, visible_BSS: torch.Tensor, tensors: list[torch.Tensor], dtype: torch.dtype, want: Results
) -> dict[str, float]:
    """Return the errors that a user without ring_hf would have: the larger of "eager" and `sdpa`, by name."""

    def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, None]:
        softcap, scale = problem.softcap, problem.scale
        return dense_attention(q, k, v, visible_BSS=visible_BSS, scale=scale, softcap=softcap, dtype=dtype)[0], None

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, None]:
        mask = visible_BSS[:, None]
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=problem.scale, enable_gqa=True), None

    attentions = (eager, sdpa) if problem.softcap is None else (eager,)
    all_errors = [errors(results(attention, tensors, dtype), want) for attention in attentions]
    return {name: max(each[name] for each in all_errors) for name in all_errors[0]}


def results(attention: Attention, tensors: list[torch.Tensor], dtype: torch.dtype) -> Results:
    """Return out, lse (if the attention returns one) and gradients by name, computed in `dtype`.

    Args:
        tensors: q, k, v and the gradient of out, see `inputs`.
    """
    *qkv, dout = (x.to(dtype) for x in tensors)
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    out, lse = attention(*leaves)
    grads = torch.autograd.grad(out, leaves, dout)
    by_name = {"out": out, **({} if lse is None else {"lse": lse}), **dict(zip(NAMES[2:], grads, strict=True))}
    return {name: x.detach() for name, x in by_name.items()}


def errors(got: Results, want: Results) -> dict[str, float]:
    """Return the relative RMS error of each tensor of `got`."""

    def rms(x: torch.Tensor) -> float:
        return x.double().square().mean().sqrt().item()

    return {name: rms(x.double() - want[name]) / rms(want[name]) for name, x in got.items()}


@dataclass
class Row:
    """One kernel on one problem.

    Attributes:
        errors: relative RMS against fp64, by tensor.
        one_process: the same of attention in one process.
        ratio: the largest error over its bar; None if it is not finite.
        failure: the exception that the kernel raised instead of an answer.
    """

    kernel: str
    dtype: str
    problem: str
    errors: dict[str, float]
    one_process: dict[str, float]
    ratio: float | None
    exact: bool
    failure: str | None = None


def judge(kernel: str, dtype: str, problem: Problem, kernel_errors: dict[str, float], plain: dict[str, float]) -> Row:
    """Return a row with its verdict; NaN is never exact.

    Args:
        plain: errors of one process, by name.
    """
    bars = {name: FACTOR * plain.get(name, HALF_LSE / FACTOR) for name in kernel_errors}
    if dtype == "float32":
        bars = {name: max(FULL_PRECISION[name], FACTOR * plain.get(name, 0.0)) for name in kernel_errors}
    ratios = [kernel_errors[name] / max(bars[name], SMALLEST) for name in kernel_errors]
    exact = all(ratio <= 1 for ratio in ratios)
    worst = max(ratios) if all(math.isfinite(ratio) for ratio in ratios) else None
    return Row(kernel, dtype, problem.describe(), kernel_errors, plain, worst, exact)


def check(
    problem: Problem, device: torch.device, kernels: Sequence[str], dtypes: Sequence[str]
) -> Iterator[Row | str]:
    """Yield the rows of a problem, and for each kernel that does not fit it `"kernel, dtype: reason"`.

    Args:
        kernels: names as in `ring_hf.kernels`; "auto" stands for all that need no download.
    """
    sequence = ShardedSequence(problem.layout, problem.length, problem.ranks, problem.documents)
    tensors, visible_BSS = inputs(problem, device), dense_mask(sequence, problem.rules, ROWS, device)
    exact = functools.partial(dense_attention, visible_BSS=visible_BSS, scale=problem.scale, softcap=problem.softcap)
    want = results(exact, tensors, torch.float64)
    inner = 2 if problem.transport == "double_ring" else 1
    for name in dtypes:
        dtype = getattr(torch, name)
        plain = single_process_errors(problem, visible_BSS, tensors, dtype, want)
        reasons: dict[str, str | None] = {}
        for kernel in kernels:
            reasons |= candidates(kernel, tensors[0].to(dtype), tensors[2].to(dtype), problem.softcap)
        for kernel, reason in reasons.items():
            if reason is not None:
                yield f"{kernel}, {name}: {reason}"
                continue
            spec = AttentionSpec(**vars(problem.rules), scale=problem.scale, softcap=problem.softcap)
            emulation = Emulation(sequence, spec, RingOptions(problem.transport, inner, kernel=kernel))
            attention = functools.partial(emulated_attention, emulation=emulation)
            try:
                got = results(attention, tensors, dtype)
            except Exception as error:  # whatever a kernel raises is a result of this check
                failure = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                yield Row(kernel, name, problem.describe(), {}, plain, None, False, failure)
            else:
                yield judge(kernel, name, problem, errors(got, want), plain)


def run(
    device: torch.device,
    quick: bool,
    tiny: bool,
    kernels: Sequence[str],
    report_progress: Callable[[str, int], None],
) -> dict[str, Any]:
    """Return the section: its verdict, all rows, and how often which kernel was left out and why."""
    selection = problems(quick, tiny)
    dtypes = ["bfloat16", "float32"] if device.type == "cpu" else ["bfloat16", "float16", "float32"]
    rows: list[Row] = []
    left_out: dict[str, int] = {}
    for problem in selection:
        report_progress(problem.describe(), len(selection))
        for outcome in check(problem, device, kernels, dtypes):
            if isinstance(outcome, Row):
                rows.append(outcome)
            else:
                left_out[outcome] = left_out.get(outcome, 0) + 1
    return {"ok": all(row.exact for row in rows), "rows": [asdict(row) for row in rows], "left_out": left_out}
