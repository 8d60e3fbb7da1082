"""The truth that results are compared with, and how: dense attention under a dense boolean mask, by autograd.

Used by tests, `ring_hf.verify` and the benchmarks; no production code imports it. The mask is written from its
definition and shares nothing with the plans; `ring_hf/kernels/reference.py`, which is itself under test, shares
nothing with this file.

Letters: B batch, H query heads, K key/value heads, S tokens of the sequence, D and E head dims.
"""

import functools
from collections.abc import Callable

import torch

from .geometry import Mask, ShardedSequence
from .parallel import buffers


def dense_mask(
    sequence: ShardedSequence, mask: Mask, num_rows: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Return booleans `[num_rows, S, S]`, True where a query (second axis) sees a key (third axis)."""
    token = torch.arange(sequence.length, device=device)
    visible = torch.ones(num_rows, sequence.length, sequence.length, dtype=torch.bool, device=device)
    for row in range(num_rows):
        described_row = row if sequence.num_rows else 0
        bounds = torch.tensor(sequence.boundaries(described_row, mask.causal), device=device)
        document = torch.bucketize(token, bounds, right=True)
        end = (sequence.num_tokens[described_row] or sequence.length) if sequence.num_tokens else sequence.length
        if mask.causal:
            visible[row] &= token[None, :] <= token[:, None]
        if sequence.prefixes is not None:
            starts = (0,) if sequence.documents is None else sequence.documents[described_row][:-1]
            for start, prefix in zip(starts, sequence.prefixes[described_row], strict=True):
                inside = (token >= start) & (token < start + prefix) & (token < end)
                visible[row] |= inside[:, None] & inside[None, :]
        visible[row] &= document[:, None] == document[None, :]
        if mask.chunk is not None:
            chunk = (token - bounds[document - 1]) // mask.chunk
            visible[row] &= chunk[:, None] == chunk[None, :]
    if mask.window is not None:
        visible &= token[:, None] - token[None, :] < mask.window
    return visible


def dense_attention(
    q_BHSD: torch.Tensor,
    k_BKSD: torch.Tensor,
    v_BKSE: torch.Tensor,
    sinks_H: torch.Tensor | None = None,
    *,
    visible_BSS: torch.Tensor,
    scale: float,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `(out [B, H, S, E], lse [B, H, S])`: softmax attention as the textbook writes it.

    Key/value heads serve neighbouring query heads, as Transformers repeats them. A query that sees no key gets zeros.

    Args:
        dtype: of the products and of `out`; the softmax and `lse` are in at least fp32.
    """
    groups = q_BHSD.shape[1] // k_BKSD.shape[1]
    k, v = (x.to(dtype).repeat_interleave(groups, 1) for x in (k_BKSD, v_BKSE))
    scores = (q_BHSD.to(dtype) @ k.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.to(torch.promote_types(dtype, torch.float32)).masked_fill(~visible_BSS[:, None], -torch.inf)
    if sinks_H is not None:
        # One more column of scores, whose value is zero.
        column = sinks_H.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
        v = torch.cat([v, torch.zeros_like(v[:, :, :1])], dim=2)
    return scores.softmax(-1).nan_to_num(0.0).to(dtype) @ v, scores.logsumexp(-1)


def forward_backward(
    attention: Callable[..., tuple[torch.Tensor, torch.Tensor]], *tensors: torch.Tensor, dout: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return `(out, lse, *gradients)` of `attention(*tensors) -> (out, lse)`, a gradient for each of `tensors`.

    Args:
        dout: gradient of `out`, in its shape.
    """
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out, lse = attention(*leaves)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))


def rms_ratio(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the root mean square of the difference over that of `want`, both in fp64."""
    got, want = got.double(), want.double()
    scale = want.square().mean().sqrt().item()
    difference = (got - want).square().mean().sqrt().item()
    return difference / scale if scale else difference


def assert_close(
    name: str, got: torch.Tensor, want: torch.Tensor, rms: float | None = None, max_abs: float | None = None
) -> float:
    """Print how far `got` is from `want` (tensors of one shape) and return the relative RMS.

    Raises:
        AssertionError: if the relative RMS is above `rms` or the largest difference above `max_abs`.
    """
    assert rms is not None or max_abs is not None, "nothing to compare with"
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    ratio = rms_ratio(got, want)
    largest = (got.double() - want.double()).abs().max().item() if got.numel() else 0.0
    print(f"{name}: max diff {largest:.3e}, rms ratio {ratio:.3e}")
    # Written so that NaN fails.
    assert rms is None or ratio <= rms, f"{name}: rms ratio {ratio:.3e} is above {rms:.1e} (max diff {largest:.3e})"
    assert max_abs is None or largest <= max_abs, f"{name}: max diff {largest:.3e} is above {max_abs:.1e}"
    return ratio


def poison_empty() -> None:
    """Fill `torch.empty`, `empty_like`, `Tensor.new_empty` and the buffers of exchanges with NaN from now on.

    A buffer that is read before it was written then shows up in every result.
    """
    with torch.device("meta"):
        torch.empty(0)  # torch now remembers the true functions as those that a device context redirects

    def poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make_poisoned(*args: object, **kwargs: object) -> torch.Tensor:
            x = make(*args, **kwargs)
            if x.is_floating_point() and x.device.type == "cpu":
                x.detach().fill_(torch.nan)  # torch 2.9 makes an empty leaf with gradients for checkpoints
            return x

        return make_poisoned

    torch.empty = poison(torch.empty)
    torch.empty_like = poison(torch.empty_like)
    torch.Tensor.new_empty = poison(torch.Tensor.new_empty)  # type: ignore[method-assign]
    acquire = buffers.Pool.acquire

    @functools.wraps(acquire)
    def acquire_poisoned(*args: object) -> buffers.Buffer:
        buffer = acquire(*args)  # type: ignore[arg-type]
        if buffer.flat.is_floating_point():
            buffer.flat.fill_(torch.nan)
        return buffer

    buffers.Pool.acquire = acquire_poisoned  # type: ignore[method-assign, assignment]
