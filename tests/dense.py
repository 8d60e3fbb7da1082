"""What every result is compared with: dense attention in fp64 under the dense boolean mask, by autograd."""

import torch

from ring_hf.geometry import Mask, WholeSequence


def dense_mask(sequence: WholeSequence, mask: Mask, num_rows: int) -> torch.Tensor:
    """`[num_rows, s, s]` booleans written straight from the definition, sharing nothing with the plan."""
    token = torch.arange(sequence.length)
    seen = torch.ones(num_rows, sequence.length, sequence.length, dtype=torch.bool)
    for row in range(num_rows):
        bounds = sequence.boundaries(row if sequence.num_rows else 0, mask.causal)
        document = torch.bucketize(token, torch.tensor(bounds), right=True)
        seen[row] &= document[:, None] == document[None, :]
    if mask.causal:
        seen &= token[None, :] <= token[:, None]
    if mask.window is not None:
        seen &= token[:, None] - token[None, :] < mask.window
    return seen


def dense_attention(
    q_BHSD: torch.Tensor, k_BKSD: torch.Tensor, v_BKSD: torch.Tensor, seen_BSS: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(out, lse)` in fp64; key/value heads serve neighbouring query heads, as Transformers repeats them."""
    groups = q_BHSD.shape[1] // k_BKSD.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (k_BKSD, v_BKSD))
    scores = (q_BHSD.double() @ k.transpose(-1, -2)) * scale
    scores = scores.masked_fill(~seen_BSS[:, None], -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v, scores.logsumexp(-1)


def with_gradients(attention, q, k, v, dout) -> tuple[torch.Tensor, ...]:
    """`(out, lse, dq, dk, dv)` of `attention(q, k, v) -> (out, lse)` for the output gradient `dout`."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))
