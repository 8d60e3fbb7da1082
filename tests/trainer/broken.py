"""Deliberately broken collators. Each mistake must show in the losses, or the comparisons prove nothing."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

Collate = Callable[[list], dict[str, Any]]


def shift_per_shard(collate: Collate) -> Collate:
    """Cut labels before they are shifted: the model shifts them inside each shard, which loses some targets and adds
    wrong ones."""

    def broken(features: list) -> dict[str, Any]:
        batch = collate(features)
        del batch["shift_labels"]
        return batch

    return broken


def local_positions(collate: Collate) -> Collate:
    """Count positions from the start of the shard."""

    def broken(features: list) -> dict[str, Any]:
        batch = collate(features)
        positions = batch["position_ids"]
        return {**batch, "position_ids": torch.arange(positions.shape[1]).expand_as(positions)}

    return broken


def no_documents(collate: Collate) -> Collate:
    """Let packed documents attend to each other."""
    return lambda features: _replace_sequence(collate(features), documents=None)


def no_prefixes(collate: Collate) -> Collate:
    """Attend causally within prefixes."""
    return lambda features: _replace_sequence(collate(features), prefixes=None)


def _replace_sequence(batch: dict[str, Any], **changes: Any) -> dict[str, Any]:
    metadata = batch["context_parallel"]
    sequence = replace(metadata.sequence, **changes)
    return {**batch, "context_parallel": replace(metadata, sequence=sequence)}


BROKEN: dict[str, Callable[[Collate], Collate]] = {
    "shift-per-shard": shift_per_shard,
    "local-positions": local_positions,
    "no-documents": no_documents,
    "no-prefixes": no_prefixes,
}
