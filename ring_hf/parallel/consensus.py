"""All ranks refuse together.

A rank that raises alone leaves its peers waiting in the next exchange. So before the first one, every rank says what
it found wrong and what it is about to run; if anything is wrong or differs, all raise the same error.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from .groups import messages_group


def agree(facts: Mapping[str, Any], error: str | None = None, group: ProcessGroup | None = None) -> None:
    """Compares `facts` (small, picklable) over all ranks of `group` (default: all processes). A collective call.

    Raises:
        ValueError: the same on every rank, if any rank passed an `error`, or the facts are not equal everywhere.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        if error is not None:
            raise ValueError(error)
        return
    said: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(said, (error, dict(facts)), group=group)
    names = [dist.get_global_rank(group, rank) if group is not None else rank for rank in range(len(said))]
    errors: dict[str, list[int]] = {}
    for rank, (found, _) in zip(names, said, strict=True):
        if found is not None:
            errors.setdefault(found, []).append(rank)
    if errors:
        raise ValueError("; ".join(f"{_ranks(ranks, len(said))}{found}" for found, ranks in errors.items()))
    for key in facts:
        values = [their.get(key) for _, their in said]
        if any(value != values[0] for value in values):
            listed = ", ".join(f"rank {rank}: {value}" for rank, value in zip(names, values, strict=True))
            raise ValueError(
                f"The ranks disagree about {key} ({listed}). They must all run the same model on the same batch."
            )


def _ranks(ranks: list[int], total: int) -> str:
    return "" if len(ranks) == total else f"rank {', '.join(map(str, ranks))}: "


def num_processes() -> int:
    """Return the number of processes of the run: 1 unless torch.distributed is initialized."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_numbers(numbers: Sequence[int], device: torch.device) -> list[list[int]]:
    """Return the `numbers` (64-bit integers, equally many everywhere) of all processes, in the order of their ranks.

    A collective call of the default group. On a GPU it waits for what the device computes, since its caller acts on
    the result.
    """
    if num_processes() == 1:
        return [list(numbers)]
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    world = dist.group.WORLD
    assert world is not None
    dist.all_gather(gathered, mine, group=messages_group(world, device))
    return torch.stack(gathered).tolist()
