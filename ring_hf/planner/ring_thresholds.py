"""The fewest tokens per rank with which compute hides the communication of a ring, per pass and kind of link.

A ring step computes `2 H (D + E) phi c^2` FLOPs while `e K (D + E) c` bytes are sent (Ring Attention, Liu et al. 2023,
arXiv 2310.01889, section 3, for H = K and phi = 1: `c >= F / B`). The backward computes 2.5 times that and also sends
fp32 gradients: `(e + 4) K (D + E) c` bytes. So

    c >= (e / 2 phi) (K / H) (F / B)        forward
    c >= ((e + 4) / 5 phi) (K / H) (F / B)  backward

with phi = 1/2 where causal work is evenly balanced (zigzag), 1 for a full mask. In a double ring a block has a whole
inner turn to reach the next node: its threshold is divided by the size of the inner ring. Ulysses multiplies the
tokens of a ring rank, not the ratio, unless key/value heads are copied.

Letters: c tokens of a rank, e bytes of an element, H and K heads, D and E head dims, F FLOP/s, B bytes/s one way.
"""

from dataclasses import dataclass

from ..geometry import chunk_heads, head_split
from .training_job import TrainingJob

MASKS = {"causal": 0.5, "full": 1.0}


def min_tokens_to_overlap(
    flops: float, bandwidth: float, grouping: float = 1.0, mask: str = "full", backward: bool = False, element: int = 2
) -> float:
    """Return the threshold c of the formulas above.

    Args:
        flops: FLOP/s of the kernel in this pass.
        bandwidth: bytes/s of a link, one way.
        grouping: K / H.
        mask: a key of `MASKS`.
        element: bytes of an element.
    """
    sent, computed = (element + max(4, element), 5) if backward else (element, 2)
    return sent / (computed * MASKS[mask]) * grouping * flops / bandwidth


@dataclass(frozen=True)
class OverlapThreshold:
    """Tokens per rank from which compute hides the communication over a kind of link, in each pass."""

    link: str
    forward: float
    backward: float


def estimate_thresholds(job: TrainingJob) -> tuple[OverlapThreshold, ...]:
    """Return the thresholds of a job: inside a node, across nodes, and across nodes with a double ring."""
    hardware, ulysses = job.hardware, job.ulysses
    busiest = max(head_split(job.model.heads, job.model.kv_heads, ulysses), key=lambda share: share.num_q)
    chunks = [chunk.share for chunk in chunk_heads(busiest, job.head_chunks)]
    grouping = max(len(chunk.kv) / chunk.num_q for chunk in chunks)

    def threshold(link: str, bandwidth: float, inner: int = 1) -> OverlapThreshold:
        # A rank of the ring has the tokens of all its Ulysses ranks.
        forward = min_tokens_to_overlap(hardware.flops, bandwidth, grouping, "causal") / ulysses / inner
        backward = (
            min_tokens_to_overlap(hardware.backward_flops, bandwidth, grouping, "causal", True) / ulysses / inner
        )
        return OverlapThreshold(link, forward, backward)

    thresholds = [
        threshold("in a node", hardware.node_bandwidth),
        threshold("across nodes", hardware.network_bandwidth),
    ]
    inner = job.inner if job.inner > 1 else max(1, job.per_node // ulysses)
    if inner > 1:
        thresholds.append(threshold(f"across nodes, double ring of {inner}", hardware.network_bandwidth, inner))
    return tuple(thresholds)
