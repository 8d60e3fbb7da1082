"""Whole sequences from the shards of a batch, as one process would have them: the inputs of a comparison.

Tokens, labels and positions are gathered from all ranks. Positions that count from 0 on every rank, and labels that
were shifted after sharding, are replaced by those of whole sequences: a collator with this mistake is detected.

Shapes: B rows, S tokens of a whole row (padding of the layout removed), C tokens of this rank.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..hf.batch_metadata import IGNORE_INDEX, METADATA_KEY, ContextParallelMetadata
from ..hf.collate.collator import ContextParallelCollator
from ..hf.documents import shift_left
from ..parallel import all_gather, join


@dataclass(frozen=True)
class ComparedBatch:
    """One batch, sharded and whole.

    Attributes:
        sharded: the model's arguments with this rank's shards, [B, C].
        whole: the model's arguments with whole sequences, [B, S].
        positions_C: global positions of this rank's tokens.
        is_real_BC: whether a token of this rank is none of padding.
        rank_of_token: by global position, the rank that holds it.
        document_BS: by row and global position, the number of its document in the row.
        num_targets: of all ranks, or the sum of their weights.
    """

    sharded: dict[str, Any]
    whole: dict[str, Any]
    positions_C: Tensor
    is_real_BC: Tensor
    rank_of_token: tuple[int, ...]
    document_BS: Tensor
    num_targets: float

    @property
    def metadata(self) -> ContextParallelMetadata:
        metadata = self.sharded[METADATA_KEY]
        assert isinstance(metadata, ContextParallelMetadata)
        return metadata


def restore_batch(inputs: dict[str, Any], max_length: int | None, model: Any) -> ComparedBatch:
    """Return a batch whole and sharded. A collective call of the ranks that share it.

    Args:
        inputs: this rank's batch, from the collator.
        max_length: tokens of a row to keep; they are sharded anew. None: all, as they are sharded.
        model: for its config, by which rows are sharded.

    Raises:
        ValueError: if the batch has prefixes, which plain attention of one process does not compute.
    """
    metadata = inputs[METADATA_KEY]
    if metadata.sequence.prefixes is not None:
        raise ValueError(
            "prefix_lm batches cannot be verified: plain attention of one process has no prefixes. Verify the same "
            "rows without prefix_lm."
        )
    batch = _restore(inputs, metadata)
    if max_length is None or max_length >= batch.document_BS.shape[1]:
        return batch
    rows = [_cut_row(batch, row, max_length) for row in range(len(batch.document_BS))]
    shards = ContextParallelCollator(model.config)(rows)
    if not isinstance(shards[METADATA_KEY], ContextParallelMetadata):
        raise ValueError(shards[METADATA_KEY].message)
    device = inputs["input_ids"].device
    moved: dict[str, Any] = {key: x.to(device) if isinstance(x, Tensor) else x for key, x in shards.items()}
    return _restore(moved, moved[METADATA_KEY])


def _cut_row(batch: ComparedBatch, row: int, max_length: int) -> dict[str, list[Any]]:
    whole, num_tokens = batch.whole, batch.metadata.sequence.num_tokens
    length = max_length if num_tokens is None else min(max_length, num_tokens[row])
    keys = [key for key in ("input_ids", "labels", "position_ids", "shift_labels", "loss_weights") if key in whole]
    cut: dict[str, list[Any]] = {key: whole[key][row, :length].tolist() for key in keys}
    if batch.metadata.sequence.documents is None:
        del cut["position_ids"]
    cut["shift_labels"][-1] = IGNORE_INDEX  # the target of the last token is no longer there
    return cut


def _trusted(given: Tensor, derived: Tensor, has_mistake: Callable[[Tensor], bool]) -> Tensor:
    """Return the values of the batch, since a collator may choose them, or the derived ones if they have a mistake
    that a computation from shards makes."""
    return derived if has_mistake(given) else given


def _restore(inputs: dict[str, Any], metadata: ContextParallelMetadata) -> ComparedBatch:
    sequence, length, shard_length = metadata.sequence, metadata.unpadded_length, metadata.shard_length
    shards = [sequence.segments(rank) for rank in range(sequence.num_ranks)]

    def gather(key: str) -> Tensor:
        return join(all_gather(inputs[key].contiguous(), metadata.group), shards, 1)[:, :length]

    whole = {"input_ids": gather("input_ids"), "labels": gather("labels")}
    num_rows, device = whole["input_ids"].shape[0], whole["input_ids"].device
    documents = sequence.documents or ((0, length),) * num_rows
    position_BS = torch.zeros(num_rows, length, dtype=torch.long)
    document_BS = torch.zeros(num_rows, length, dtype=torch.long)
    for row, boundaries in enumerate(documents):
        for number, (start, stop) in enumerate(itertools.pairwise(boundaries)):
            stop = min(stop, length)
            position_BS[row, start:stop] = torch.arange(max(stop - start, 0))
            document_BS[row, start:stop] = number
    local_BS = join([torch.arange(shard_length)[None] for _ in shards], shards, 1)[:, :length].to(device)
    has_next_S = (local_BS[0, 1:] == local_BS[0, :-1] + 1).tolist()  # whether a rank holds the next token as well
    is_end_S = torch.tensor([*(not value for value in has_next_S), True], device=device)
    whole["position_ids"] = _trusted(
        gather("position_ids"), position_BS.to(device), lambda given: bool((given == local_BS).all())
    )
    shift_labels = shift_left(whole["labels"])
    whole["shift_labels"] = _trusted(
        gather("shift_labels"),
        shift_labels,
        lambda given: not bool((given != shift_labels)[:, ~is_end_S].any()),
    )
    if "loss_weights" in inputs:
        whole["loss_weights"] = gather("loss_weights")
    num_tokens = torch.tensor(sequence.num_tokens or (length,) * num_rows)
    is_real_BS = torch.arange(length) < num_tokens[:, None]
    if sequence.documents is None and not bool(is_real_BS.all()):
        whole["attention_mask"] = is_real_BS.long().to(device)
    positions_C = torch.cat([torch.as_tensor(list(segment.range)) for segment in shards[metadata.rank]])
    is_inside_C = positions_C < length
    is_real_BC = is_real_BS[:, positions_C.clamp(max=length - 1)] & is_inside_C
    rank_of_token = [0] * sequence.length
    for rank, segments in enumerate(shards):
        for segment in segments:
            for position in segment.range:
                rank_of_token[position] = rank
    is_target_BS = whole["shift_labels"] != IGNORE_INDEX
    return ComparedBatch(
        sharded=inputs,
        whole=whole,
        positions_C=positions_C,
        is_real_BC=is_real_BC,
        rank_of_token=tuple(rank_of_token[:length]),
        document_BS=document_BS,
        num_targets=float(is_target_BS.sum()),
    )
