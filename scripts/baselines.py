"""Implementations of causal attention on CPU processes behind one interface, for the benchmarks to compare.

`"ring"` is this package. `"sdpa"` and `"standard"` run the whole sequence in one process; `"standard"` is the textbook
form whose S x S scores exist in memory (with nothing besides, unlike `ring_hf.testing.dense_attention`). The others
share the sequence between processes as this package does:

    torch-ring             the ring inside PyTorch (torch.distributed.tensor.experimental, private functions), load
                           balanced, on the same CPU operator as ours
    ring-attention-pytorch PyPI, lucidrains; its PyTorch code, striped or contiguous
    axolotl-ringmaster     PyPI, `ring_p2p_attention`, contiguous; without flash-attn it materialises each block

Letters: B batch, H query heads, K key/value heads, C tokens of this process, D head dim. Tensors are BHCD.
"""

import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ring_hf.parallel import context_attention

Attend = Callable[[Tensor, Tensor, Tensor, dist.ProcessGroup | None, dict[str, Any]], Tensor]


@dataclass(frozen=True)
class Baseline:
    """One implementation.

    Attributes:
        attend: `attend(q, k, v, group, job)` returns out `[B, H, C, D]`.
        layout: of the tokens that a process holds, from the job; None if it holds all.
        package: from PyPI that it needs.
    """

    attend: Attend
    layout: Callable[[dict[str, Any]], str] | None = None
    package: str | None = None


def _sdpa(q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup | None, job: dict[str, Any]) -> Tensor:
    sizes = [b - a for a, b in itertools.pairwise(job.get("documents") or (0, q.shape[2]))]
    parts = zip(*(x.split(sizes, dim=2) for x in (q, k, v)), strict=True)
    outputs = [scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts]
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]


def _standard(q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup | None, job: dict[str, Any]) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
    return torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ v


def _ring(q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup | None, job: dict[str, Any]) -> Tensor:
    return context_attention(q, k, v, group=group, cu_seqlens=job.get("documents"), **job["settings"])


class _TorchRing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup) -> Tensor:
        module = importlib.import_module("torch.distributed.tensor.experimental._context_parallel._attention")
        ctx.module, ctx.group = module, group
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = module._templated_ring_attention(group, 2, operator, q, k, v, is_causal=True)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        arguments = (ctx.group, 2, operator, dout, "grad_out", q, k, v, out, lse)
        grads = ctx.module._templated_ring_attention_backward(*arguments, is_causal=True, dropout_p=0.0)
        return *(grad.to(q.dtype) for grad in grads[:3]), None


def _torch_ring(q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup | None, job: dict[str, Any]) -> Tensor:
    return _TorchRing.apply(q, k, v, group)  # type: ignore[no-any-return]


def _lucidrains(q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup | None, job: dict[str, Any]) -> Tensor:
    # Its query heads are ordered (group, key/value head), those of Transformers (key/value head, group).
    batch, heads, tokens, dim = q.shape
    kv_heads = k.shape[1]
    q = q.view(batch, kv_heads, heads // kv_heads, tokens, dim).transpose(1, 2).reshape(q.shape)
    function = importlib.import_module("ring_attention_pytorch.ring_flash_attention").ring_flash_attn
    tensors = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    out = function(*tensors, causal=True, ring_reduce_col=True, **job["settings"]).transpose(1, 2)
    out = out.reshape(batch, heads // kv_heads, kv_heads, tokens, dim).transpose(1, 2)
    return out.reshape(batch, heads, tokens, dim)


def _ringmaster(q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup | None, job: dict[str, Any]) -> Tensor:
    function = importlib.import_module("ringmaster.ring.p2p_attn").ring_p2p_attention
    return function(q, k, v, group=group, causal=True, scaling=None).transpose(1, 2)  # type: ignore[no-any-return]


BASELINES = {
    "sdpa": Baseline(_sdpa),
    "standard": Baseline(_standard),
    "ring": Baseline(_ring, lambda job: job["settings"]["layout"]),
    "torch-ring": Baseline(_torch_ring, lambda job: "zigzag"),
    "ring-attention-pytorch": Baseline(
        _lucidrains,
        lambda job: "striped" if job["settings"].get("striped_ring_attn") else "contiguous",
        "ring-attention-pytorch==0.5.20",
    ),
    "axolotl-ringmaster": Baseline(_ringmaster, lambda job: "contiguous", "axolotl-ringmaster==0.2.7"),
}
