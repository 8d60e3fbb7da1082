"""Attention on tiles with cuDNN's attention inside PyTorch, for the large tiles of Hopper and Blackwell.

cuDNN builds a graph for every shape and knows no window. It is therefore given only tiles of at least
`flash_varlen.LARGE` queries that split into full rectangles and causal squares, which are most of the work of a ring
over long sequences; PyTorch's flash attention (`cuda_flash`) takes all other tiles of the same step.

When it may be chosen follows what went wrong with it (threads of pytorch/pytorch unless named):

- After NaN and errors it became an option in 2.5.1 (138522), and the default again on 9.0 and 10.x with cuDNN from
  9.15.1 on, which mends lengths that 128 does not divide (169849; sdp_utils.cpp, check_prefer_cudnn_attention). The
  same devices and versions are asked for here. PyTorch bundles such a cuDNN from 2.11 on (huggingface/transformers,
  48163); in older ones lse had three dims.
- Beside a mask tensor, padded keys overflow in backward (196678): there is no mask tensor here, and still only lengths
  that 128 divides are given to it.
- One query gives wrong results on 10.x (193893, 194927) or NaN (NVIDIA/cudnn-frontend, 1072): tiles are larger.
- Backward caches its graph by the shapes and strides of q, k and v alone (aten/src/ATen/native/cudnn/MHA.cpp) and
  takes for granted those of `out`, `dout`, lse and all gradients: every tensor is given dense in BSHD, lse as the
  `[B, H, C, 1]` that forward returns.
- It is not deterministic, and `torch.backends.cuda.enable_cudnn_sdp(False)`, the advice of those threads, is heeded.

Its causal mask is aligned at the top left, its lse is in natural logarithms, and fewer key/value than query heads are
its own business. Tensors without elements would come back unwritten; there are none.

Schemas as of PyTorch 2.13, compared with the installed ones by the tests:

    _scaled_dot_product_cudnn_attention(query, key, value, attn_bias?, compute_log_sumexp, dropout_p, is_causal,
        return_debug_mask, *, scale) -> output, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, philox_seed,
        philox_offset, debug_attn_mask
    _scaled_dot_product_cudnn_attention_backward(grad_out, query, key, value, out, logsumexp, philox_seed,
        philox_offset, attn_bias, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, *, scale) -> dq, dk, dv

Letters: B batch, H query heads, K key/value heads, C queries, S keys, D and E head dims.
"""

import os

import torch

from ..geometry import Tile, split
from . import cuda_flash, flash_varlen
from .causal_blocks import CausalBlockKernel, padded
from .flash_varlen import dotted
from .merge import accumulate_dtype
from .routed import RoutedKernel

UNIT = 128  # tokens
_DEVICES = ((9, 0), (10, 0), (10, 3))
_PYTORCH, _CUDNN = (2, 11), 91501
_MOST_ROWS = 65535
_WIDEST, _LATENT = 128, (192, 128)
_forward = torch.ops.aten._scaled_dot_product_cudnn_attention.default
_backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default


def why_unsupported(q: torch.Tensor, v: torch.Tensor, softcap: float | None) -> str | None:
    """Why this kernel cannot serve such tensors, or None."""
    if (reason := cuda_flash.why_unsupported(q, v, softcap)) is not None:
        return reason
    if (active := cuda_flash.activated()) is not None:
        return f"{active} was activated in PyTorch, which kernel='cuda_flash' runs"
    if (found := flash_varlen.capability(q.device)) not in _DEVICES:
        return f"compute capability {dotted(found or ())} is not one of {', '.join(map(dotted, _DEVICES))}"
    dims = tuple(-(-x.shape[-1] // 8) * 8 for x in (q, v))
    if max(dims) > _WIDEST and dims != _LATENT:
        return f"head dims {dims} are above {_WIDEST} and not {_LATENT}"
    if max(q.shape[:2]) > _MOST_ROWS:
        return f"{max(q.shape[:2])} rows or heads are more than {_MOST_ROWS}"
    if (version := _pytorch()) < _PYTORCH:
        return f"PyTorch {dotted(version)} is older than {dotted(_PYTORCH)}, the first with a cuDNN that is new enough"
    if (cudnn := _cudnn()) is None:
        return "this build of PyTorch has no cuDNN"
    if cudnn < _CUDNN:
        return f"cuDNN {cudnn} is older than {_CUDNN} (9.15.1), from which on PyTorch trusts it"
    return _refused()


def _refused() -> str | None:
    """What the user asked of PyTorch that cuDNN's attention is against, or None."""
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return "it is switched off by torch.backends.cuda.enable_cudnn_sdp(False)"
    if torch.are_deterministic_algorithms_enabled():
        return "it is not deterministic, which torch.use_deterministic_algorithms(True) asks for"
    if os.environ.get("TORCH_CUDNN_SDPA_AVOID_RECOMPILE") == "1":
        return "TORCH_CUDNN_SDPA_AVOID_RECOMPILE=1 gives lse another layout"
    return None


def _pytorch() -> tuple[int, int]:
    major, minor, *_ = torch.__version__.split(".")
    return int(major), int(minor)


def _cudnn() -> int | None:
    return torch.backends.cudnn.version()


def takes(tile: Tile) -> bool:
    """Whether a tile splits into nothing but large full rectangles and causal squares of whole units."""
    return tile.num_q >= flash_varlen.LARGE and all(
        (piece.kind == "full" or (piece.kind == "causal" and piece.num_q == piece.num_k))
        and piece.count == 1
        and piece.num_q >= flash_varlen.LARGE
        and piece.num_q % UNIT == piece.num_k % UNIT == 0
        for piece in split(tile.num_q, tile.num_k, tile.lo, tile.hi)
    )


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = _forward(_dense(q), _dense(k), _dense(v), None, True, 0.0, causal, False, scale=scale)
    return out, lse.squeeze(-1)


def _differentiate(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dout, q, k, v, out = map(_dense, (dout, q, k, v, out))
    stats = lse.to(accumulate_dtype(q.dtype)).contiguous().view(-1).view(*lse.shape, 1)
    # Where dropout's random numbers would begin: without dropout nobody reads it.
    seed, offset = (torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2))
    no_bias, no_documents = None, (None, None, q.shape[2], k.shape[2])
    return _backward(dout, q, k, v, out, stats, seed, offset, no_bias, *no_documents, 0.0, causal, scale=scale)


def _dense(x_BHSD: torch.Tensor) -> torch.Tensor:
    """BSHD in memory, with the strides that PyTorch derives for results from those of q, also where a dim is 1."""
    rows, heads, length, width = x_BHSD.shape
    flat = x_BHSD.transpose(1, 2).contiguous().view(-1)
    return flat.view(rows, 1, length, width) if heads == 1 else flat.view(rows, length, heads, width).transpose(1, 2)


def _prepare(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(padded(x, 8) for x in tensors)


PIECES = CausalBlockKernel("cudnn", why_unsupported, _attend, _differentiate, _prepare)
KERNEL = RoutedKernel("cuda_cudnn", why_unsupported, takes, PIECES, cuda_flash.KERNEL)
