"""Process groups by name, so that an operator (whose arguments are plain values) can find its ring again; and groups
of our own, so that exchanges never wait in the queue of a group on which FSDP or Accelerate post theirs."""

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
# By name of the group they were made for, purpose, ranks: that group and ours.
_OWN: dict[tuple[str, str, tuple[int, ...]], tuple[ProcessGroup, ProcessGroup]] = {}
# By name of the group that was warmed up: that group, and how its ranks were split.
_WARM: dict[str, tuple[ProcessGroup, set[Hashable]]] = {}
# Default groups during whose life a group was registered or made: those that end with the process.
_DEFAULTS: weakref.WeakSet[ProcessGroup] = weakref.WeakSet()
_made = 0  # groups of ours so far, in the process of those it has met that has made most


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
    _end_at_exit()
    return group.group_name


def _end_at_exit() -> None:
    if dist.group.WORLD is not None:
        _DEFAULTS.add(dist.group.WORLD)
        register_shutdown(end_groups)


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


def dedicated_group(group: ProcessGroup, ranks: Sequence[int], purpose: str, device: torch.device) -> ProcessGroup:
    """A process group of ours for some ranks of a group, on which nobody else posts anything; made when first needed.

    A collective call of `group` then: all its ranks come here in the same order, as they run the same layers. It has
    the timeout of `group`, is bound to the device, and has done its first collective, as the first call on an NCCL
    group must come from all of its members.
    """
    key = group.group_name, purpose, tuple(ranks)
    parent, made = _OWN.get(key, (None, None))
    if made is None or parent is not group or not _alive(made):
        if made is not None:
            _WARM.pop(group.group_name, None)
        made = _make(group, ranks, purpose, device)
        _OWN[key] = group, made
        _end_at_exit()
    return made


def forget_group(group: ProcessGroup) -> None:
    """Destroys what was made for a registered group, and forgets its name. A collective call, before its own end.

    `torch.distributed.destroy_process_group()` ends everything, ours too: then there is nothing to do here.
    """
    for key in [key for key, (parent, _) in _OWN.items() if parent is group]:
        _, made = _OWN.pop(key)
        if _alive(made):
            dist.destroy_process_group(made)
    _WARM.pop(group.group_name, None)
    _GROUPS.pop(group.group_name, None)


def end_groups(failed: bool = False) -> list[ProcessGroup]:
    """Destroy our groups, the latest first, then the default group if we have used it; forget all names.

    Not a collective call on gloo, whose destructor waits only for what this process itself has posted. Groups that
    were destroyed already, and a default group under which none was registered or made, are left alone. Called at exit
    (`shutdown.py`); after a failure it destroys nothing and returns the groups that must not be destructed.
    """
    world = dist.group.WORLD
    ending = [world] if world is not None and world in _DEFAULTS else []
    ending += [made for _, made in _OWN.values()]
    if failed:
        every = distributed_c10d._world.pg_map if ending else ()
        return [group for group in every if _backends(group) == {"gloo"}]
    del world
    for known in (_OWN, _WARM, _GROUPS):
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
    """For `warm_up` to look into and add to; empty again once groups of ours for this group have ended."""
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
    name = _new_name(group, members, purpose)
    with _named(name), _no_split() if local else contextlib.nullcontext():
        made = dist.new_group(members, group_desc=f"ring_hf {purpose}", **settings)
    assert isinstance(made, ProcessGroup)
    dist.all_reduce(torch.zeros(1, device=device), group=made)
    return made


def _new_name(group: ProcessGroup, members: Sequence[int], purpose: str) -> str:
    """A name that none of these ranks has used before, and that all of them find."""
    global _made
    counts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(counts, _made, group=group)
    _made = max(counts) + 1
    return f"ring_hf {purpose} {_made} of ranks {', '.join(map(str, members))}"


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """A group that only its members make would be named by torch after its ranks and how many groups the process has.

    That count differs between processes that belong to different numbers of groups, which then wait for each other
    for ever; and it comes back when a group ends, with the addresses of the old one still in the store.
    """
    torchs = distributed_c10d._process_group_name
    distributed_c10d._process_group_name = lambda ranks, use_hashed_name: name  # type: ignore
    try:
        yield
    finally:
        distributed_c10d._process_group_name = torchs


@contextlib.contextmanager
def _no_split() -> Iterator[None]:
    """Bound to a device, the default group would be split, for which all processes must come, not the members alone
    (pytorch pull request 129965)."""
    world = dist.group.WORLD
    assert world is not None
    bound = world.bound_device_id
    world.bound_device_id = None
    try:
        yield
    finally:
        world.bound_device_id = bound


def _timeout(group: ProcessGroup, device: torch.device) -> timedelta | None:
    """That of a group; None (torch's default) for a backend that does not say."""
    try:
        return group._get_backend(device).options._timeout
    except (AttributeError, RuntimeError):
        return None


def messages_group(group: ProcessGroup, device: torch.device) -> ProcessGroup:
    """Return a group of ours of the same ranks, for what they tell each other.

    Where weights are sharded over the ranks that share a sequence, their group is the one on which FSDP and DeepSpeed
    gather weights and reduce gradients: messages would wait for those.
    """
    return dedicated_group(group, range(dist.get_world_size(group)), "messages", device)


def all_gather(x: torch.Tensor, name: str) -> list[torch.Tensor]:
    """`x` of every rank of a registered group, in rank order. Equal shapes everywhere; no gradient."""
    mine = _reachable(x.detach().contiguous(), group_of(name))
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group_of(name)))]
    dist.all_gather(gathered, mine, group=messages_group(group_of(name), mine.device))
    return [theirs.to(x.device) for theirs in gathered]


def all_reduce(x: torch.Tensor, name: str) -> torch.Tensor:
    """Return the sum of `x` over the ranks of a registered group, the same bits on every rank; no gradient."""
    total = _reachable(x.detach().clone().contiguous(), group_of(name))
    dist.all_reduce(total, group=messages_group(group_of(name), total.device))
    return total.to(x.device)


def _reachable(x: torch.Tensor, group: ProcessGroup) -> torch.Tensor:
    """`x` where the backend of a group can send it from: NCCL takes nothing from a CPU, where an offloading engine
    has gradients."""
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
