"""Every kernel that fits this device, through the plans of all ranks of a ring, against dense attention in fp64.

A row is one kernel in one dtype on one problem, forward and backward, its ranks emulated with all blocks resident. It
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

from ring_hf.geometry import LAYOUTS, AttentionSpec, Mask, RingOptions, ShardedSequence
from ring_hf.kernels import candidates
from ring_hf.parallel.emulation import Emulation, emulated_attention

NAMES = ("out", "lse", "dq", "dk", "dv")
FACTOR = 2.0  # half precision: times the error of one process
FULL_PRECISION = {"out": 2e-6, "lse": 2e-6, "dq": 1e-5, "dk": 1e-5, "dv": 1e-5}
HALF_LSE = 1e-3  # nobody else returns one to compare with; it is fp32 of scores that are sums of exact products
SMALLEST = 1e-14  # a bar is never less: one process may be exact
ROWS = 2


@dataclass(frozen=True)
class Problem:
    """What is computed; each of `ranks` ranks holds two chunks of `unit` tokens."""

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
TRANSPORTS = ("double_ring", "allgather", "direct")
# Tiles of 1,024 queries and more are calls of their own, and where 128 divides them, cuDNN's.
LARGE = (1024, 1031)


def problems(quick: bool, tiny: bool) -> list[Problem]:
    """Layouts x masks, head dims x head counts x masks, the other transports, soft-capping, large tiles."""
    layouts, masks = (("zigzag", "striped"), MASKS[:1] + MASKS[5:6]) if quick else (LAYOUTS, MASKS)
    found = [Problem(layout, mask) for layout, mask in itertools.product(layouts, masks)]
    pairs = list(zip(DIMS, itertools.cycle(HEADS))) if quick else list(itertools.product(DIMS, HEADS))
    few = ("causal",) if quick else ("causal", "documents window")
    found += [Problem("zigzag", mask, heads, dims) for (dims, heads), mask in itertools.product(pairs, few)]
    found += [Problem("contiguous", "documents window", transport=transport) for transport in TRANSPORTS]
    found += [Problem("zigzag", mask, softcap=20.0) for mask in few]
    found += [Problem("zigzag", "causal", (4, 2), unit=unit, ranks=2) for unit in LARGE]
    if not quick:
        long = Problem("zigzag", "causal", (4, 2), unit=LARGE[0], ranks=2)
        found += [replace(long, layout=layout, mask="documents") for layout in LAYOUTS]
        found += [replace(long, mask=mask) for mask in ("full", "window")]
        found += [replace(long, dims=dims) for dims in DIMS]
    found = [replace(one, unit=13) for one in found] if tiny else found
    return list(dict.fromkeys(found))


def dense_mask(problem: Problem, device: torch.device) -> torch.Tensor:
    """`[B, S, S]` booleans from the definition of the mask, sharing nothing with the plans."""
    token = torch.arange(problem.length, device=device)
    apart = token[:, None] - token[None, :]
    rules = problem.rules
    rows = []
    for row in range(ROWS):
        bounds = torch.tensor((problem.documents or ((0, problem.length),) * ROWS)[row], device=device)
        document = torch.bucketize(token, bounds, right=True)
        seen = document[:, None] == document[None, :]
        seen &= (apart >= 0) if rules.causal else torch.ones_like(seen)
        seen &= (apart < rules.window) if rules.window else torch.ones_like(seen)
        if rules.chunk:
            run = (token - bounds[document - 1]) // rules.chunk
            seen &= run[:, None] == run[None, :]
        rows.append(seen)
    return torch.stack(rows)


def inputs(problem: Problem, device: torch.device) -> list[torch.Tensor]:
    """q, k, v and the gradient of out, all of them bf16 numbers."""
    generator = torch.Generator().manual_seed(0)
    (num_heads, num_kv_heads), (dim, v_dim) = problem.heads, problem.dims
    shapes = (num_heads, dim), (num_kv_heads, dim), (num_kv_heads, v_dim), (num_heads, v_dim)
    made = (torch.randn(ROWS, heads, problem.length, width, generator=generator) for heads, width in shapes)
    return [x.bfloat16().to(device) for x in made]


Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def formula(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention as it is written down, in the dtype of its inputs (softmax in at least fp32)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)).masked_fill(~seen[:, None], -torch.inf)
    return scores.softmax(-1).to(q.dtype) @ v, scores.logsumexp(-1)


def sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float, softcap: float | None
) -> tuple[torch.Tensor, None]:
    """PyTorch's own."""
    return scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], scale=scale, enable_gqa=True), None


def eager(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """What Transformers computes where nothing else does."""
    return formula(*args, **kwargs)[0], None


def one_process(
    maths: dict[str, Any], tensors: list[torch.Tensor], dtype: torch.dtype, want: dict[str, torch.Tensor]
) -> dict[str, float]:
    """The errors that a user without ring_hf would have."""
    ways = (eager,) if maths["softcap"] else (eager, sdpa)
    found = [errors(results(functools.partial(way, **maths), tensors, dtype), want) for way in ways]
    return {name: max(each[name] for each in found) for name in found[0]}


def results(attention: Attention, tensors: list[torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Out, lse and gradients by name."""
    *leaves, dout = (x.to(dtype) for x in tensors)
    leaves = [x.requires_grad_() if x.is_leaf else x for x in (x.detach().clone() for x in leaves)]
    out, lse = attention(*leaves)
    grads = torch.autograd.grad(out, leaves, dout)
    found = {"out": out, **({} if lse is None else {"lse": lse}), **dict(zip(NAMES[2:], grads, strict=True))}
    return {name: x.detach() for name, x in found.items()}


def errors(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative RMS."""

    def rms(x: torch.Tensor) -> float:
        return x.double().square().mean().sqrt().item()

    return {name: rms(x.double() - want[name]) / rms(want[name]) for name, x in got.items()}


@dataclass
class Row:
    """One kernel on one problem."""

    kernel: str
    dtype: str
    problem: str
    errors: dict[str, float]
    one_process: dict[str, float]
    ratio: float | None  # the largest error over its bar
    exact: bool
    failure: str | None = None  # what the kernel raised instead of an answer


def judge(kernel: str, dtype: str, problem: Problem, found: dict[str, float], plain: dict[str, float]) -> Row:
    """A row with its verdict; NaN is never exact."""
    bars = {name: FACTOR * plain.get(name, HALF_LSE / FACTOR) for name in found}
    if dtype == "float32":
        bars = {name: max(FULL_PRECISION[name], FACTOR * plain.get(name, 0.0)) for name in found}
    ratios = [found[name] / max(bars[name], SMALLEST) for name in found]
    exact = all(ratio <= 1 for ratio in ratios)
    worst = max(ratios) if all(math.isfinite(ratio) for ratio in ratios) else None
    return Row(kernel, dtype, problem.describe(), found, plain, worst, exact)


def check(
    problem: Problem, device: torch.device, kernels: Sequence[str], dtypes: Sequence[str]
) -> Iterator[Row | str]:
    """The rows of a problem, and for a kernel that does not fit it, why, as `"kernel, dtype: reason"`.

    Args:
        kernels: names as in `ring_hf.kernels`; "auto" stands for all that need no download.
    """
    seen, tensors = dense_mask(problem, device), inputs(problem, device)
    scale = problem.dims[0] ** -0.5
    maths = {"seen": seen, "scale": scale, "softcap": problem.softcap}
    want = results(functools.partial(formula, **maths), tensors, torch.float64)
    sequence = ShardedSequence(problem.layout, problem.length, problem.ranks, problem.documents)
    inner = 2 if problem.transport == "double_ring" else 1
    for name in dtypes:
        dtype = getattr(torch, name)
        plain = one_process(maths, tensors, dtype, want)
        asked = (candidates(kernel, tensors[0].to(dtype), tensors[2].to(dtype), problem.softcap) for kernel in kernels)
        for kernel, reason in {name: why for found in asked for name, why in found.items()}.items():
            if reason is not None:
                yield f"{kernel}, {name}: {reason}"
                continue
            spec = AttentionSpec(**vars(problem.rules), scale=scale, softcap=problem.softcap)
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
    device: torch.device, quick: bool, tiny: bool, kernels: Sequence[str], progress: Callable[[str, int], None]
) -> dict[str, Any]:
    """The section: all rows, and which kernels were not tried and why."""
    todo = problems(quick, tiny)
    dtypes = ["bfloat16", "float32"] if device.type == "cpu" else ["bfloat16", "float16", "float32"]
    rows: list[Row] = []
    left_out: dict[str, int] = {}
    for problem in todo:
        progress(problem.describe(), len(todo))
        for found in check(problem, device, kernels, dtypes):
            if isinstance(found, Row):
                rows.append(found)
            else:
                left_out[found] = left_out.get(found, 0) + 1
    return {"ok": all(row.exact for row in rows), "rows": [asdict(row) for row in rows], "left_out": left_out}
