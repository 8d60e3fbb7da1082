"""What usually causes a difference between a model on shards and on whole sequences, by the tokens that differ.

The first module that differs and its tokens are measured; the cause is a conclusion from them:

    two passes of one process differ as well            a random state
    exactly the tokens whose local index is not their   positions counted on each rank, or attention within a shard:
      position                                            the former if attention went around the ring
    a few tokens after the start of each chunk          a convolution, or another look at neighbours
    all tokens                                          a mean over tokens
    only documents after the first                      the mask of documents
    no token, the loss only                             labels, or the number of targets
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .batch_restoration import ComparedBatch

MAX_RANGES = 4  # of token positions in a text
MAX_KERNEL = 8  # tokens after the start of a chunk that a convolution changes

RANDOM = (
    "dropout, noise or another random state: two passes of one process differ as well, and every rank draws numbers "
    "of its own. Set the probabilities to 0"
)
POSITIONS = (
    "positions are not sharded: RoPE or position embeddings count from 0 on every rank. Use the position_ids of the "
    "batch, and pass them on"
)
LOCAL_ATTENTION = (
    "the layer attends to the tokens of its own rank only. Compute attention through Transformers' attention "
    "interface (ALL_ATTENTION_FUNCTIONS), with the keyword arguments that the layer gets"
)
NEIGHBOURS = "the layer looks at neighbouring tokens (a convolution, a shift), which may be on another rank"
RECURRENCE = "the layer carries a state along the sequence, which does not travel between ranks"
MEAN = "a mean, sum or norm over the tokens of a rank: it needs those of all ranks"
DOCUMENTS = (
    "the mask of packed documents was dropped: tokens attend to earlier documents, or not to their own on other ranks"
)
MASK = "a mask or window was dropped or changed on the path to attention"
LABELS = (
    "labels are shifted on every rank by itself: the last token of each chunk gets no target, or a wrong one. Use the "
    "shift_labels of the batch"
)
COUNT = (
    "the count of targets: the loss of a rank is a mean over its own targets. Divide the sum over shift_labels by "
    "num_items_in_batch"
)
MISSING_FACTOR = "the loss of a rank lacks a factor: the engine averages over ranks, so each needs ranks * sum / count"
OTHER_LOSS = "the loss is computed from values of one rank outside of its targets (an auxiliary term, a penalty)"
LOST_GRADIENT = (
    "the forward pass agrees, so a gradient is lost or counted twice on its way back: detach() or no_grad, a "
    "collective without a backward pass, a hook or a parameter that is used outside of the model"
)
BATCH_POSITIONS = "the collator counts positions from 0 on every rank. Use ring_hf.ContextParallelCollator"
BATCH_LABELS = "the collator shifts labels after it has cut the sequence. Shift them first"


@dataclass(frozen=True)
class Evidence:
    """What is known about the first difference.

    Attributes:
        names: names and classes of the module and of the one inside whose tensor differs, and the tensor's.
        differs_BS: which tokens differ.
        called_ring: whether the module, or one inside, called the ring's attention.
        is_random: whether two passes of one process differ, too.
    """

    names: tuple[str, ...]
    differs_BS: Tensor
    called_ring: bool
    is_random: bool


def find_causes(evidence: Evidence, batch: ComparedBatch) -> tuple[str, ...]:
    """Return what usually causes a difference in the forward pass, the likeliest first."""
    text = " ".join(evidence.names).lower()
    if evidence.is_random:
        return (RANDOM,)
    if "shift_labels" in text or "labels" in text.split():
        return (BATCH_LABELS,)
    is_real_BS = _real_tokens(batch)
    differs_BS = evidence.differs_BS & is_real_BS
    are_moved = bool((differs_BS == (_moved_tokens(batch) & is_real_BS)).all())
    if re.search(r"rotary|rope|position|wpe", text):
        return (POSITIONS,)
    if re.search(r"conv", text) or _follows_chunk_starts(differs_BS, batch):
        return (NEIGHBOURS, RECURRENCE)
    if re.search(r"mamba|recurrent|\brnn|gru|lstm|ssm|delta", text):
        return (RECURRENCE, NEIGHBOURS)
    if bool((differs_BS == is_real_BS).all()):
        return (MEAN, MASK)
    if evidence.called_ring:
        is_later_BS = batch.document_BS > 0
        if bool(is_later_BS.any()) and not bool((differs_BS & ~is_later_BS).any()):
            return (DOCUMENTS, MASK)
        return (POSITIONS, MASK) if are_moved else (MASK, POSITIONS)
    return (LOCAL_ATTENTION, POSITIONS, MEAN) if are_moved or "att" in text else (MEAN, LOCAL_ATTENTION, RECURRENCE)


def describe_tokens(differs_BS: Tensor, batch: ComparedBatch) -> str:
    """Return positions that differ in words: ranges, and how many of each rank."""
    positions = differs_BS.any(0).nonzero().flatten().tolist()
    if not positions:
        return "none"
    ranges = _ranges(positions)
    shown = ", ".join(f"{a}..{b}" if b > a else f"{a}" for a, b in ranges[:MAX_RANGES])
    more = f" and {len(ranges) - MAX_RANGES} more ranges" if len(ranges) > MAX_RANGES else ""
    ranks = torch.tensor(batch.rank_of_token)
    is_real_S = _real_tokens(batch).any(0)
    parts = []
    for rank in range(int(ranks.max()) + 1):
        held_S = (ranks == rank) & is_real_S
        num_held, num_differing = int(held_S.sum()), int((differs_BS.any(0) & held_S).sum())
        share = "all" if num_held == num_differing else "none" if not num_differing else f"{num_differing}"
        parts.append(f"{share} of the {num_held} of rank {rank}")
    return f"{shown}{more} ({', '.join(parts)})"


def _ranges(positions: Sequence[int]) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for position in positions:
        if ranges and position == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], position)
        else:
            ranges.append((position, position))
    return ranges


def _real_tokens(batch: ComparedBatch) -> Tensor:
    num_rows, length = batch.document_BS.shape
    num_tokens = torch.tensor(batch.metadata.sequence.num_tokens or (length,) * num_rows)
    return torch.arange(length) < num_tokens[:, None]


def _moved_tokens(batch: ComparedBatch) -> Tensor:
    """Return which tokens a rank would give another position if it counted from 0."""
    local = [0] * len(batch.rank_of_token)
    counts: dict[int, int] = {}
    for position, rank in enumerate(batch.rank_of_token):
        local[position] = counts.get(rank, 0)
        counts[rank] = local[position] + 1
    return torch.tensor(local) != batch.whole["position_ids"].cpu()


def _follows_chunk_starts(differs_BS: Tensor, batch: ComparedBatch) -> bool:
    """Return whether only the first tokens of chunks differ, in chunks that are longer."""
    ranks = batch.rank_of_token
    starts = [n for n in range(1, len(ranks)) if ranks[n] != ranks[n - 1]]
    near = torch.zeros(len(ranks), dtype=torch.bool)
    for start in starts:
        near[start : start + MAX_KERNEL] = True
    return bool(starts) and bool(differs_BS.any()) and not bool(near.all()) and not bool((differs_BS & ~near).any())
