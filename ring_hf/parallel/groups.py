"""Process groups by name, so that an operator (whose arguments are plain values) can find its ring again."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

_GROUPS: dict[str, ProcessGroup] = {}
_SUBGROUPS: dict[tuple[str, tuple[int, ...]], ProcessGroup] = {}


@torch.compiler.disable  # a compiled caller would replay the registration only after the operator has asked for it
def register_group(group: ProcessGroup | DeviceMesh) -> str:
    """Makes a process group (or a one-axis device mesh) known and returns the name to pass on. Idempotent."""
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f'A device mesh with axes {group.mesh_dim_names} is no ring. Pass one axis of it, such as mesh["cp"].'
            )
        group = group.get_group()
    _GROUPS[group.group_name] = group
    return group.group_name


def group_of(name: str) -> ProcessGroup:
    """The group registered as `name`. Raises `ValueError` if there is none in this process."""
    if name not in _GROUPS:
        raise ValueError(
            f"No process group is registered as {name!r}. Call ring_hf.parallel.register_group(group) first."
        )
    return _GROUPS[name]


def rank_in(name: str) -> int:
    """This process's rank inside a registered group."""
    return dist.get_rank(group_of(name))


def subgroup(group: ProcessGroup, ranks: Sequence[int]) -> ProcessGroup:
    """The group of some ranks of a group, for collectives; made when they first need it, by them alone.

    Its members must come here in the same order, which they do: they run the same layers.
    """
    if len(ranks) == dist.get_world_size(group):
        return group
    key = group.group_name, tuple(ranks)
    if key not in _SUBGROUPS:
        members = [dist.get_global_rank(group, rank) for rank in ranks]
        made = dist.new_group(members, use_local_synchronization=True)
        assert isinstance(made, ProcessGroup)
        _SUBGROUPS[key] = made
    return _SUBGROUPS[key]


def all_gather(x: torch.Tensor, name: str) -> list[torch.Tensor]:
    """`x` of every rank of a registered group, in rank order. Equal shapes everywhere; no gradient."""
    x = x.detach().contiguous()
    gathered = [torch.empty_like(x) for _ in range(dist.get_world_size(group_of(name)))]
    dist.all_gather(gathered, x, group=group_of(name))
    return gathered
