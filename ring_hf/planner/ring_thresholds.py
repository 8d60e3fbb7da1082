"""Fewest tokens a rank must hold for the exchange to hide behind compute, forward and backward, near and far.

A ring step computes `2 H (D + E) phi c^2` FLOPs while `e K (D + E) c` bytes travel (Ring Attention, Liu et al. 2023,
arXiv 2310.01889, section 3, whose case is H = K, phi = 1: `c >= F / B`). Backward it computes 2.5 times that, and fp32
gradients travel besides: `(e + 4) K (D + E) c` bytes. So

    c >= (e / 2 phi) (K / H) (F / B)        forward
    c >= ((e + 4) / 5 phi) (K / H) (F / B)  backward

with phi = 1/2 where causal work is dealt evenly (zigzag), 1 for a full mask. In a double ring a block has a whole
inner turn to reach the next node: its threshold is divided by the inner ring. Ulysses multiplies the tokens of a
place, not the ratio, unless key/value heads are copied.

Letters: c tokens of a rank, e bytes of an element, H and K heads, D and E head dims, F FLOP/s, B bytes/s one way.
"""

from dataclasses import dataclass

from ..geometry import chunk_heads, head_split
from .training_job import Job

MASKS = {"causal": 0.5, "full": 1.0}


def least_tokens(
    flops: float, bandwidth: float, grouping: float = 1.0, mask: str = "full", backward: bool = False, element: int = 2
) -> float:
    """The condition above; `grouping` is K / H."""
    moved, computed = (element + max(4, element), 5) if backward else (element, 2)
    return moved / (computed * MASKS[mask]) * grouping * flops / bandwidth


@dataclass(frozen=True)
class Threshold:
    """Tokens per rank from which on a link's exchange hides."""

    link: str
    forward: float
    backward: float


def thresholds(job: Job) -> tuple[Threshold, ...]:
    """For a job's heads and kernel rates: inside a node, across nodes, and across nodes with a double ring."""
    hardware, ulysses = job.hardware, job.ulysses
    share = max(head_split(job.model.heads, job.model.kv_heads, ulysses), key=lambda share: share.num_q)
    chunks = [chunk.share for chunk in chunk_heads(share, job.head_chunks)]
    grouping = max(len(chunk.kv) / chunk.num_q for chunk in chunks)
    inner = job.inner if job.inner > 1 else max(1, job.per_node // ulysses)
    links = (
        ("in a node", hardware.node_bandwidth, 1),
        ("across nodes", hardware.network_bandwidth, 1),
        (f"across nodes, double ring of {inner}", hardware.network_bandwidth, inner),
    )

    def tokens(flops: float, bandwidth: float, backward: bool) -> float:
        # A place of the ring holds the tokens of all its Ulysses ranks.
        return least_tokens(flops, bandwidth, grouping, "causal", backward) / ulysses

    return tuple(
        Threshold(
            name,
            tokens(hardware.flops, bandwidth, False) / turns,
            tokens(hardware.backward_flops, bandwidth, True) / turns,
        )
        for name, bandwidth, turns in links
        if turns > 1 or "double" not in name
    )
