"""Attention on tiles with cuDNN's attention inside PyTorch, for the large tiles of Hopper and Blackwell.

cuDNN builds a graph for every shape and has no window. It therefore only computes tiles of at least
`flash_varlen.MIN_DENSE_QUERIES` queries that split into full rectangles and causal squares, which are most of the work
of a ring over long sequences; PyTorch's flash attention (`cuda_flash`) computes all other tiles of the same step. The
devices and versions are those for which PyTorch prefers cuDNN. Its defects so far, the memory layouts that its cached
graphs assume, schemas and sources: tests/kernels/README.md.

Letters: B batch, H query heads, K key/value heads, C queries, S keys, D and E head dims.
"""

import os

import torch

from ..geometry import Tile, split
from . import cuda_flash, flash_varlen
from .causal_blocks import CausalBlockKernel, pad_to_multiple
from .flash_varlen import format_version
from .merge import accumulate_dtype
from .routed import RoutedKernel

AVOID_RECOMPILE = "TORCH_CUDNN_SDPA_AVOID_RECOMPILE"  # environment variable of PyTorch
TOKEN_MULTIPLE = 128  # other lengths have had wrong results
_CAPABILITIES = ((9, 0), (10, 0), (10, 3))
_MIN_PYTORCH, _MIN_CUDNN = (2, 11), 91501
_MAX_ROWS_OR_HEADS = 65535
_MAX_HEAD_DIM = 128
_MLA_HEAD_DIMS = (192, 128)  # multi-head latent attention: the one pair with a larger head dim
_ATEN_FORWARD = torch.ops.aten._scaled_dot_product_cudnn_attention.default
_ATEN_BACKWARD = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default


def why_unsupported(q: torch.Tensor, v: torch.Tensor, softcap: float | None) -> str | None:
    """Return why this kernel does not support a call, or None; see `Kernel`."""
    if (reason := cuda_flash.why_unsupported(q, v, softcap)) is not None:
        return reason
    if (implementation := cuda_flash.activated_implementation()) is not None:
        return f"{implementation} was activated in PyTorch, which kernel='cuda_flash' runs"
    capability = flash_varlen.get_capability(q.device)
    if capability not in _CAPABILITIES:
        supported = ", ".join(map(format_version, _CAPABILITIES))
        return f"compute capability {format_version(capability or ())} is not one of {supported}"
    head_dims = flash_varlen.round_up_8(q.shape[-1]), flash_varlen.round_up_8(v.shape[-1])
    if max(head_dims) > _MAX_HEAD_DIM and head_dims != _MLA_HEAD_DIMS:
        return f"head dims {head_dims} are above {_MAX_HEAD_DIM} and not {_MLA_HEAD_DIMS}"
    if max(q.shape[:2]) > _MAX_ROWS_OR_HEADS:
        return f"{max(q.shape[:2])} rows or heads are more than {_MAX_ROWS_OR_HEADS}"
    if (version := _pytorch_version()) < _MIN_PYTORCH:
        first = format_version(_MIN_PYTORCH)
        return f"PyTorch {format_version(version)} is older than {first}, the first with a cuDNN that is new enough"
    if (cudnn := _cudnn_version()) is None:
        return "this build of PyTorch has no cuDNN"
    if cudnn < _MIN_CUDNN:
        return f"cuDNN {cudnn} is older than {_MIN_CUDNN} (9.15.1), the first that PyTorch prefers"
    return _why_disabled()


def _why_disabled() -> str | None:
    """Return the setting of the process that excludes cuDNN's attention, or None."""
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return "it is disabled by torch.backends.cuda.enable_cudnn_sdp(False)"
    if torch.are_deterministic_algorithms_enabled():
        return "it is not deterministic, which torch.use_deterministic_algorithms(True) requires"
    if os.environ.get(AVOID_RECOMPILE) == "1":
        return f"{AVOID_RECOMPILE}=1 gives lse another layout"
    return None


def _pytorch_version() -> tuple[int, int]:
    major, minor, *_ = torch.__version__.split(".")
    return int(major), int(minor)


def _cudnn_version() -> int | None:
    return torch.backends.cudnn.version()


def accepts(tile: Tile) -> bool:
    """Return whether a tile splits into large full rectangles and causal squares of `TOKEN_MULTIPLE` tokens only."""
    return tile.num_q >= flash_varlen.MIN_DENSE_QUERIES and all(
        (block.kind == "full" or (block.kind == "causal" and block.num_q == block.num_k))
        and block.count == 1
        and block.num_q >= flash_varlen.MIN_DENSE_QUERIES
        and block.num_q % TOKEN_MULTIPLE == block.num_k % TOKEN_MULTIPLE == 0
        for block in split(tile.num_q, tile.num_k, tile.lo, tile.hi)
    )


def _forward_block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = _to_dense_rows(q), _to_dense_rows(k), _to_dense_rows(v)
    out, lse, *_ = _ATEN_FORWARD(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out, lse.squeeze(-1)


def _backward_block(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dout, q, k, v, out = map(_to_dense_rows, (dout, q, k, v, out))
    lse_BHC1 = lse.to(accumulate_dtype(q.dtype)).contiguous().view(-1).view(*lse.shape, 1)
    # The state of dropout's random numbers, which are not read without dropout.
    seed, offset = (torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2))
    attn_bias, cum_seq_q, cum_seq_k = None, None, None
    lengths = cum_seq_q, cum_seq_k, q.shape[2], k.shape[2]
    return _ATEN_BACKWARD(dout, q, k, v, out, lse_BHC1, seed, offset, attn_bias, *lengths, 0.0, causal, scale=scale)


def _to_dense_rows(x_BHSD: torch.Tensor) -> torch.Tensor:
    """Return `x` in BSHD in memory, with the strides that PyTorch derives for results from q, also if a dim is 1."""
    rows, heads, length, dim = x_BHSD.shape
    flat = x_BHSD.transpose(1, 2).contiguous().view(-1)
    return flat.view(rows, 1, length, dim) if heads == 1 else flat.view(rows, length, heads, dim).transpose(1, 2)


def _prepare(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(pad_to_multiple(x, 8) for x in tensors)


BLOCK_KERNEL = CausalBlockKernel("cudnn", why_unsupported, _forward_block, _backward_block, _prepare)
KERNEL = RoutedKernel("cuda_cudnn", why_unsupported, accepts, BLOCK_KERNEL, cuda_flash.KERNEL)
