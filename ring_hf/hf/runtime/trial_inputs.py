"""The few tokens of a trial step: the same two examples sharded by the collator, and whole as one process has them.

Tokens are the first ones of every shard of the first batch. Every one of them is its own label, but of each rank's
targets only some are kept, another number on each: what averages over shards instead of targets then shows.

Shapes: B rows, n tokens of an example, k of them on each rank.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ring_hf.parallel import all_gather

from .. import context as process
from ..attention.backend import MISSING_METADATA_ERROR
from ..batch_metadata import IGNORE_INDEX, METADATA_KEY, ContextParallelMetadata, InvalidBatch
from ..collate.collator import ContextParallelCollator
from ..documents import shift_left
from ..refusal import raise_on_all_ranks

TOKENS_PER_RANK = 12
# Tokens that the two examples are shorter than the shards together, so that padding has its part in the trial: that of
# a row in a batch, and that of the layout, which one process does not have.
SHORTER_BY = (1, 4)


@dataclass(frozen=True)
class TrialInputs:
    """Inputs of the model, and the number of targets in all of them."""

    sharded: dict[str, Any]
    whole: dict[str, Any]
    num_targets: int


def make_inputs(model: PreTrainedModel, inputs: dict[str, Any], context: process.ProcessContext) -> TrialInputs:
    """Return the inputs of a trial step for a batch of this rank. A collective call.

    Raises:
        ValueError: if the ranks do not hold shards of one batch (on every rank), or the tokens cannot be sharded.
    """
    batch = inputs.get(METADATA_KEY)
    is_sharded = isinstance(batch, ContextParallelMetadata)
    fingerprint = batch.fingerprint if isinstance(batch, ContextParallelMetadata) else None
    error = None if is_sharded else getattr(batch, "message", MISSING_METADATA_ERROR)
    raise_on_all_ranks(error, {"the batch (hash of its tokens, labels and documents)": fingerprint}, context)
    assert isinstance(batch, ContextParallelMetadata)
    tokens_Bk = inputs["input_ids"][:1, :TOKENS_PER_RANK]
    tokens_n = torch.cat(all_gather(tokens_Bk, context.group), 1)[0].cpu()
    weighted = "loss_weights" in inputs
    examples = [_make_example(x[n:], weighted) for x, n in zip((tokens_n, tokens_n.flip(0)), SHORTER_BY, strict=True)]
    is_packed = batch.sequence.documents is not None
    collate = ContextParallelCollator(model.config, packing=is_packed)
    if isinstance(refusal := collate(examples)[METADATA_KEY], InvalidBatch):
        raise ValueError(refusal.message)
    _thin_out_labels(examples, refusal, is_packed)
    sharded = collate(examples)
    sharded[METADATA_KEY] = replace(sharded[METADATA_KEY], kernel="auto")  # one for half precision would not take fp32
    with process.whole_sequences():
        whole = dict(collate(examples))
    whole["shift_labels"] = shift_left(whole["labels"])
    whole.setdefault("position_ids", torch.arange(whole["input_ids"].shape[1]).expand_as(whole["input_ids"]))
    return TrialInputs(
        _moved(sharded, tokens_Bk.device),
        _moved(whole, tokens_Bk.device),
        int((whole["shift_labels"] != IGNORE_INDEX).sum()),
    )


def _make_example(tokens_n: torch.Tensor, weighted: bool) -> dict[str, torch.Tensor]:
    example = {"input_ids": tokens_n, "labels": tokens_n.clone()}
    if weighted:
        example["loss_weights"] = 0.5 + torch.arange(len(tokens_n)) % 3 / 2
    return example


def _thin_out_labels(examples: list[dict[str, torch.Tensor]], batch: ContextParallelMetadata, is_packed: bool) -> None:
    """Keep 1, 3, 5, ... targets of ranks 0, 1, 2, ... in the first row and one more in the second."""
    owner = torch.empty(batch.sequence.length, dtype=torch.long)
    for rank in range(batch.sequence.num_ranks):
        for segment in batch.sequence.segments(rank):
            owner[segment.slice] = rank
    left = torch.zeros(0)
    first = 0
    for row, example in enumerate(examples):
        if row == 0 or not is_packed:
            left = 1 + row + 2 * torch.arange(batch.sequence.num_ranks) % (TOKENS_PER_RANK - 2)
        for token in range(1, len(example["labels"])):
            rank = int(owner[first + token - 1])  # whose query predicts it
            if left[rank] > 0:
                left[rank] -= 1
            else:
                example["labels"][token] = IGNORE_INDEX
        first += len(example["labels"]) if is_packed else 0


def _moved(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in inputs.items()}
