"""What every result is compared with: dense attention in fp64 under the dense boolean mask, by autograd."""

import torch

from ring_hf.geometry import Mask, ShardedSequence


def dense_mask(sequence: ShardedSequence, mask: Mask, num_rows: int) -> torch.Tensor:
    """`[num_rows, s, s]` booleans written straight from the definition, sharing nothing with the plan."""
    token = torch.arange(sequence.length)
    seen = torch.ones(num_rows, sequence.length, sequence.length, dtype=torch.bool)
    for row in range(num_rows):
        described = row if sequence.num_rows else 0
        bounds = torch.tensor(sequence.boundaries(described, mask.causal))
        document = torch.bucketize(token, bounds, right=True)
        end = (sequence.num_tokens[described] or sequence.length) if sequence.num_tokens else sequence.length
        if mask.causal:
            seen[row] &= token[None, :] <= token[:, None]
        if sequence.prefixes is not None:
            starts = (0,) if sequence.documents is None else sequence.documents[described][:-1]
            for start, prefix in zip(starts, sequence.prefixes[described], strict=True):
                inside = (token >= start) & (token < start + prefix) & (token < end)
                seen[row] |= inside[:, None] & inside[None, :]
        seen[row] &= document[:, None] == document[None, :]
        if mask.chunk is not None:
            chunk = (token - bounds[document - 1]) // mask.chunk
            seen[row] &= chunk[:, None] == chunk[None, :]
    if mask.window is not None:
        seen &= token[:, None] - token[None, :] < mask.window
    return seen


def dense_attention(
    q_BHSD: torch.Tensor,
    k_BKSD: torch.Tensor,
    v_BKSD: torch.Tensor,
    sinks_H: torch.Tensor | None = None,
    *,
    seen_BSS: torch.Tensor,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(out, lse)` in fp64; key/value heads serve neighbouring query heads, as Transformers repeats them."""
    groups = q_BHSD.shape[1] // k_BKSD.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (k_BKSD, v_BKSD))
    scores = (q_BHSD.double() @ k.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen_BSS[:, None], -torch.inf)
    if sinks_H is not None:
        # A column more, whose value is zero.
        column = sinks_H.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
        v = torch.cat([v, torch.zeros_like(v[:, :, :1])], dim=2)
    return scores.softmax(-1).nan_to_num(0.0) @ v, scores.logsumexp(-1)


def with_gradients(attention, *tensors, dout) -> tuple[torch.Tensor, ...]:
    """`(out, lse, *gradients)` of `attention(*tensors) -> (out, lse)` for the output gradient `dout`."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out, lse = attention(*leaves)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))
