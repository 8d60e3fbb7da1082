"""Deliberately broken collators: each mistake must show in the losses, or the comparisons would prove nothing."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

Collate = Callable[[list], dict[str, Any]]


def shift_per_shard(collate: Collate) -> Collate:
    """Labels cut unshifted: the model shifts them inside each shard, and every shard loses targets and gets wrong
    ones."""

    def broken(features: list) -> dict[str, Any]:
        batch = collate(features)
        del batch["shift_labels"]
        return batch

    return broken


def local_positions(collate: Collate) -> Collate:
    """Positions that count inside the shard."""

    def broken(features: list) -> dict[str, Any]:
        batch = collate(features)
        positions = batch["position_ids"]
        return {**batch, "position_ids": torch.arange(positions.shape[1]).expand_as(positions)}

    return broken


def no_documents(collate: Collate) -> Collate:
    """Packed documents that see each other."""
    return lambda features: _described(collate(features), documents=None)


def no_prefixes(collate: Collate) -> Collate:
    """Prefixes that see only what came before."""
    return lambda features: _described(collate(features), prefixes=None)


def _described(batch: dict[str, Any], **changes: Any) -> dict[str, Any]:
    description = batch["context_parallel"]
    sequence = replace(description.sequence, **changes)
    return {**batch, "context_parallel": replace(description, sequence=sequence)}


BROKEN: dict[str, Callable[[Collate], Collate]] = {
    "shift-per-shard": shift_per_shard,
    "local-positions": local_positions,
    "no-documents": no_documents,
    "no-prefixes": no_prefixes,
}
