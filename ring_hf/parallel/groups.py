"""Process groups by name, so that an operator (whose arguments are plain values) can find its ring again."""

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

_GROUPS: dict[str, ProcessGroup] = {}


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
