"""The inputs of a trial step: the same two examples, sharded by the collator and whole as in one process.

The examples hold the first tokens of every shard of the first batch, and each token is its own label. Only some
targets are kept, a different number on each rank, so that a loss that averages over shards instead of targets shows.

Shapes: B rows, n tokens of an example, k of them on each rank.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ring_hf.parallel import all_gather

from .. import context as process
from ..attention.shard_errors import MISSING_METADATA
from ..batch_metadata import IGNORE_INDEX, METADATA_KEY, ContextParallelMetadata, InvalidBatch
from ..collate.collator import ContextParallelCollator
from ..documents import shift_left
from ..refusal import raise_on_all_ranks

TOKENS_PER_RANK = 12
# The two examples are this many tokens shorter than all shards together, so that the trial includes the padding of a
# row in a batch, and that of the layout, which one process does not have.
NUM_REMOVED_TOKENS = (1, 4)


@dataclass(frozen=True)
class TrialInputs:
    """Inputs of the model for a trial step.

    Attributes:
        sharded: this rank's shard, with tensors of shape [B, k].
        whole: the whole sequences, with tensors of shape [B, n].
        num_targets: targets of the whole batch, over all ranks.
    """

    sharded: dict[str, Any]
    whole: dict[str, Any]
    num_targets: int


def make_trial_inputs(model: PreTrainedModel, inputs: dict[str, Any], context: process.ProcessContext) -> TrialInputs:
    """Return the inputs of a trial step. A collective call.

    Args:
        inputs: the first batch of this rank: its metadata, and tensors of shape [B, k or more].

    Raises:
        ValueError: on every rank, if the ranks do not hold shards of one batch, or the tokens cannot be sharded.
    """
    batch = inputs.get(METADATA_KEY)
    is_sharded = isinstance(batch, ContextParallelMetadata)
    fingerprint = batch.fingerprint if isinstance(batch, ContextParallelMetadata) else None
    error = None if is_sharded else getattr(batch, "message", MISSING_METADATA)
    raise_on_all_ranks(error, {"the batch (hash of its tokens, labels and documents)": fingerprint}, context)
    assert isinstance(batch, ContextParallelMetadata)
    tokens_Bk = inputs["input_ids"][:1, :TOKENS_PER_RANK]
    tokens_n = torch.cat(all_gather(tokens_Bk, context.group), 1)[0].cpu()
    has_weights = "loss_weights" in inputs
    examples = [
        _make_example(tokens_n[NUM_REMOVED_TOKENS[0] :], has_weights),
        _make_example(tokens_n.flip(0)[NUM_REMOVED_TOKENS[1] :], has_weights),
    ]
    is_packed = batch.sequence.documents is not None
    collate = ContextParallelCollator(model.config, packing=is_packed)
    metadata = collate(examples)[METADATA_KEY]
    if isinstance(metadata, InvalidBatch):
        raise ValueError(metadata.message)
    _mask_targets_unevenly(examples, metadata, is_packed)
    sharded = collate(examples)
    # The kernel of the batch may support half precision only.
    metadata = sharded[METADATA_KEY]
    sharded[METADATA_KEY] = replace(metadata, options=replace(metadata.options, kernel="auto"))
    with process.whole_sequences():
        whole = dict(collate(examples))
    whole["shift_labels"] = shift_left(whole["labels"])
    whole.setdefault("position_ids", torch.arange(whole["input_ids"].shape[1]).expand_as(whole["input_ids"]))
    return TrialInputs(
        sharded=_to_device(sharded, tokens_Bk.device),
        whole=_to_device(whole, tokens_Bk.device),
        num_targets=int((whole["shift_labels"] != IGNORE_INDEX).sum()),
    )


def _make_example(tokens_n: torch.Tensor, has_weights: bool) -> dict[str, torch.Tensor]:
    example = {"input_ids": tokens_n, "labels": tokens_n.clone()}
    if has_weights:
        example["loss_weights"] = 0.5 + torch.arange(len(tokens_n)) % 3 / 2
    return example


def _mask_targets_unevenly(
    examples: list[dict[str, torch.Tensor]], batch: ContextParallelMetadata, is_packed: bool
) -> None:
    """Keep 1, 3, 5, ... targets of ranks 0, 1, 2, ... in the first row and one more in the second."""
    sequence = batch.sequence
    rank_of_token = torch.empty(sequence.length, dtype=torch.long)
    for rank in range(sequence.num_ranks):
        for segment in sequence.segments(rank):
            rank_of_token[segment.slice] = rank
    num_left = torch.zeros(0)  # targets to keep, by rank
    start_index = 0  # of the example in its row
    for index, example in enumerate(examples):
        if index == 0 or not is_packed:
            num_left = 1 + index + 2 * torch.arange(sequence.num_ranks) % (TOKENS_PER_RANK - 2)
        for token in range(1, len(example["labels"])):
            rank = int(rank_of_token[start_index + token - 1])  # the token before predicts this target
            if num_left[rank] > 0:
                num_left[rank] -= 1
            else:
                example["labels"][token] = IGNORE_INDEX
        start_index += len(example["labels"]) if is_packed else 0


def _to_device(inputs: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in inputs.items()}
