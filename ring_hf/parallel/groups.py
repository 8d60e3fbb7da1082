"""Process groups by name, so that an operator (whose arguments are plain values) can find its group; and dedicated
groups, so that our exchanges never queue behind those of FSDP or Accelerate on the same group."""

import contextlib
import logging
import weakref
from collections.abc import Hashable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from .shutdown import register_shutdown

logger = logging.getLogger("ring_hf")

_GROUPS: dict[str, ProcessGroup] = {}
# By (name of the parent group, purpose, ranks): the parent and the dedicated group.
_DEDICATED: dict[tuple[str, str, tuple[int, ...]], tuple[ProcessGroup, ProcessGroup]] = {}
# By name of the group that was warmed up: that group, and the splits of its ranks.
_WARM: dict[str, tuple[ProcessGroup, set[Hashable]]] = {}
# Default groups under which a group was registered or made: they are destroyed when the process exits.
_DEFAULTS: weakref.WeakSet[ProcessGroup] = weakref.WeakSet()
_num_made = 0  # dedicated groups so far: the most that any process this one has met has made


@torch.compiler.disable  # a compiled caller would replay the registration only after the operator has asked for it
def register_group(group: ProcessGroup | DeviceMesh) -> str:
    """Register a process group (or a device mesh with one axis) and return its name. Idempotent.

    Raises:
        ValueError: for a mesh with several axes.
    """
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f'A device mesh with axes {group.mesh_dim_names} is no ring. Pass one axis of it, such as mesh["cp"].'
            )
        group = group.get_group()
    _GROUPS[group.group_name] = group
    _destroy_at_exit()
    return group.group_name


def _destroy_at_exit() -> None:
    if dist.group.WORLD is not None:
        _DEFAULTS.add(dist.group.WORLD)
        register_shutdown(end_groups)


def group_of(name: str) -> ProcessGroup:
    """Return the group registered as `name`.

    Raises:
        ValueError: if there is none in this process.
    """
    if name not in _GROUPS:
        raise ValueError(
            f"No process group is registered as {name!r}. Call ring_hf.parallel.register_group(group) first."
        )
    return _GROUPS[name]


def rank_in(name: str) -> int:
    """Return this process's rank in a registered group."""
    return dist.get_rank(group_of(name))


def dedicated_group(group: ProcessGroup, ranks: Sequence[int], purpose: str, device: torch.device) -> ProcessGroup:
    """Return a process group of some ranks of `group` that only this purpose uses; it is made by the first call.

    The first call is a collective call of `group`: all its ranks make the same calls in the same order, because they
    run the same layers. The new group has the timeout of `group`, is bound to the device, and has run its first
    collective, because the first call on an NCCL group must come from all of its members.
    """
    key = group.group_name, purpose, tuple(ranks)
    parent, dedicated = _DEDICATED.get(key, (None, None))
    if dedicated is None or parent is not group or not _alive(dedicated):
        if dedicated is not None:
            _WARM.pop(group.group_name, None)
        dedicated = _make(group, ranks, purpose, device)
        _DEDICATED[key] = group, dedicated
        _destroy_at_exit()
    return dedicated


def forget_group(group: ProcessGroup) -> None:
    """Destroy the dedicated groups of a registered group and forget its name. A collective call, before `group` ends.

    Not needed before `torch.distributed.destroy_process_group()`, which destroys all groups.
    """
    for key in [key for key, (parent, _) in _DEDICATED.items() if parent is group]:
        _, dedicated = _DEDICATED.pop(key)
        if _alive(dedicated):
            dist.destroy_process_group(dedicated)
    _WARM.pop(group.group_name, None)
    _GROUPS.pop(group.group_name, None)


def end_groups(failed: bool = False) -> list[ProcessGroup]:
    """Destroy the dedicated groups, the latest first, then the default group if it was used; forget all names.

    Not a collective call on gloo, whose destructor waits only for operations that this process has posted. Groups that
    were destroyed already are left alone, as is a default group under which none was registered or made. Called at
    exit (`shutdown.py`); after a failure it destroys nothing and returns the groups that must not be destructed.
    """
    world = dist.group.WORLD
    ending = [world] if world is not None and world in _DEFAULTS else []
    ending += [dedicated for _, dedicated in _DEDICATED.values()]
    if failed:
        every = distributed_c10d._world.pg_map if ending else ()
        return [group for group in every if _backends(group) == {"gloo"}]
    del world
    for known in (_DEDICATED, _WARM, _GROUPS):
        known.clear()
    while ending:
        group = ending.pop()
        if _alive(group):
            try:
                dist.destroy_process_group(group)
            except RuntimeError:
                logger.warning("The group %r did not end in order.", group.group_desc, exc_info=True)
        del group  # if this was the last reference, its threads are joined here
    return []


def _backends(group: ProcessGroup) -> set[str]:
    return {entry.rpartition(":")[2] for entry in dist.get_backend_config(group).split(",")}


def warmed_up_splits(group: ProcessGroup) -> set[Hashable]:
    """Return the splits of a group that `warm_up` has done; empty again once dedicated groups of it were destroyed."""
    known, splits = _WARM.get(group.group_name, (None, set()))
    if known is not group:
        splits = set()
        _WARM[group.group_name] = group, splits
    return splits


def _alive(group: ProcessGroup) -> bool:
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, ValueError):  # torch has forgotten it
        return False
    return True


def _make(group: ProcessGroup, ranks: Sequence[int], purpose: str, device: torch.device) -> ProcessGroup:
    members = [dist.get_global_rank(group, rank) for rank in ranks]
    local = len(members) < dist.get_world_size()
    settings: dict[str, Any] = {"timeout": _timeout(group, device), "use_local_synchronization": local}
    if device.type == "cuda":
        settings["device_id"] = device
    name = _unique_name(group, members, purpose)
    with _explicit_group_name(name), _without_bound_device() if local else contextlib.nullcontext():
        dedicated = dist.new_group(members, group_desc=f"ring_hf {purpose}", **settings)
    assert isinstance(dedicated, ProcessGroup)
    dist.all_reduce(torch.zeros(1, device=device), group=dedicated)
    return dedicated


def _unique_name(group: ProcessGroup, members: Sequence[int], purpose: str) -> str:
    """The same name on all of these ranks, which none of them has used before."""
    global _num_made
    counts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(counts, _num_made, group=group)
    _num_made = max(counts) + 1
    return f"ring_hf {purpose} {_num_made} of ranks {', '.join(map(str, members))}"


@contextlib.contextmanager
def _explicit_group_name(name: str) -> Iterator[None]:
    """Give the next group a name of our own.

    With `use_local_synchronization`, torch names a group after its ranks and the number of groups of this process.
    That number differs between processes that belong to different numbers of groups, which then wait for each other
    for ever; and it is reused after a group was destroyed, while the old one's addresses are still in the store.
    """
    original = distributed_c10d._process_group_name
    distributed_c10d._process_group_name = lambda ranks, use_hashed_name: name  # type: ignore
    try:
        yield
    finally:
        distributed_c10d._process_group_name = original


@contextlib.contextmanager
def _without_bound_device() -> Iterator[None]:
    """Unbind the default group from its device: otherwise torch makes a new group by splitting it, which is a
    collective call of all processes instead of the members (pytorch pull request 129965)."""
    world = dist.group.WORLD
    assert world is not None
    bound = world.bound_device_id
    world.bound_device_id = None
    try:
        yield
    finally:
        world.bound_device_id = bound


def _timeout(group: ProcessGroup, device: torch.device) -> timedelta | None:
    """The timeout of a group; None (torch's default) for a backend that does not expose it."""
    try:
        return group._get_backend(device).options._timeout
    except (AttributeError, RuntimeError):
        return None


def messages_group(group: ProcessGroup, device: torch.device) -> ProcessGroup:
    """Return a dedicated group of the same ranks for small messages.

    Where weights are sharded over the ranks that share a sequence, their group is the one on which FSDP and DeepSpeed
    gather weights and reduce gradients: messages on it would queue behind those.
    """
    return dedicated_group(group, range(dist.get_world_size(group)), "messages", device)


def all_gather(x: torch.Tensor, name: str) -> list[torch.Tensor]:
    """Return `x` of every rank of a registered group, in rank order. Equal shapes everywhere; no gradient."""
    own = _on_backend_device(x.detach().contiguous(), group_of(name))
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group_of(name)))]
    dist.all_gather(gathered, own, group=messages_group(group_of(name), own.device))
    return [of_rank.to(x.device) for of_rank in gathered]


def all_reduce(x: torch.Tensor, name: str) -> torch.Tensor:
    """Return the sum of `x` over the ranks of a registered group, the same bits on every rank; no gradient."""
    total = _on_backend_device(x.detach().clone().contiguous(), group_of(name))
    dist.all_reduce(total, group=messages_group(group_of(name), total.device))
    return total.to(x.device)


def broadcast(x: torch.Tensor, name: str, source: int) -> torch.Tensor:
    """Return the `x` of rank `source` of a registered group on all its ranks. Equal shapes everywhere; no gradient."""
    group = group_of(name)
    own = _on_backend_device(x.detach().clone().contiguous(), group)
    dist.broadcast(own, dist.get_global_rank(group, source), group=messages_group(group, own.device))
    return own.to(x.device)


def _on_backend_device(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """Return `x` on a device whose memory the group's backend can send: NCCL cannot send from a CPU, where offloading
    engines keep gradients."""
    kinds = {device.type for device in group._device_types}
    if x.device.type in kinds or not kinds:
        return x
    kind = min(kinds)
    return x.to(torch.device(kind, torch.accelerator.current_device_index()) if kind == "cuda" else kind)


def broadcast_object(value: Any) -> Any:
    """Return the (picklable) `value` of the first process on every process. A collective call of the default group."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
