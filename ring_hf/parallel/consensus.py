"""Errors that all ranks raise together.

A rank that raises alone leaves its peers waiting in the next exchange. So before the first one, every rank sends its
error, if it has one, and the values that must be equal everywhere; if there is an error or a difference, all ranks
raise the same exception.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from .groups import messages_group


def assert_equal_across_ranks(
    values: Mapping[str, Any], error: str | None = None, group: ProcessGroup | None = None
) -> None:
    """Compare `values` (small, picklable) over all ranks of `group` (default: all processes). A collective call.

    Raises:
        ValueError: the same on every rank, if any rank passed an `error`, or values are not equal everywhere.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        if error is not None:
            raise ValueError(error)
        return
    messages: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(messages, (error, dict(values)), group=group)
    ranks = range(len(messages))
    global_ranks = [rank if group is None else dist.get_global_rank(group, rank) for rank in ranks]
    errors: dict[str, list[int]] = {}
    for rank, (rank_error, _) in zip(global_ranks, messages, strict=True):
        if rank_error is not None:
            errors.setdefault(rank_error, []).append(rank)
    if errors:
        raise ValueError("; ".join(f"{_prefix(of, len(messages))}{text}" for text, of in errors.items()))
    for name in values:
        of_ranks = [rank_values.get(name) for _, rank_values in messages]
        if any(value != of_ranks[0] for value in of_ranks):
            listed = ", ".join(f"rank {rank}: {value}" for rank, value in zip(global_ranks, of_ranks, strict=True))
            raise ValueError(
                f"The ranks disagree about {name} ({listed}). They must all run the same model on the same batch."
            )


def _prefix(ranks: list[int], num_ranks: int) -> str:
    return "" if len(ranks) == num_ranks else f"rank {', '.join(map(str, ranks))}: "


def num_processes() -> int:
    """Return the number of processes of the run: 1 unless torch.distributed is initialized."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share_reason(reason: str | None) -> str | None:
    """Return the `reason` of the first process that has one, on every process. A collective call of all processes."""
    if num_processes() == 1:
        return reason
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    return next((text for text in reasons if text is not None), None)


def gather_numbers(numbers: Sequence[int], device: torch.device) -> list[list[int]]:
    """Return the `numbers` (64-bit integers, equally many everywhere) of all processes, in the order of their ranks.

    A collective call of the default group. On a GPU it waits for the device, since its caller acts on the result.
    """
    if num_processes() == 1:
        return [list(numbers)]
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    world = dist.group.WORLD
    assert world is not None
    dist.all_gather(gathered, own, group=messages_group(world, device))
    return torch.stack(gathered).tolist()
