"""What ranks tell each other does not queue behind an engine, and finds a device that the backend takes it from."""

from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist

from ring_hf.parallel import all_gather, all_reduce, gather_numbers, groups, register_group
from tests.support.harness import run_distributed


def _tell(rank, world_size):
    world = dist.group.WORLD
    name = register_group(world)
    x = torch.tensor([rank + 1.0])
    all_reduce(x, name)  # makes the group
    used = []
    kept = {call: getattr(dist, call) for call in ("all_gather", "all_reduce")}

    def spy(call):
        return lambda *args, group=None, **kwargs: used.append(group) or kept[call](*args, group=group, **kwargs)

    with mock.patch.multiple(dist, **{call: spy(call) for call in kept}):
        gathered = [float(y) for y in all_gather(x, name)]
        total = float(all_reduce(x, name))
        numbers = gather_numbers([rank, 7], torch.device("cpu"))
    assert gathered == [1.0, 2.0] and total == 3.0 and numbers == [[0, 7], [1, 7]]
    assert len(used) == 3 and len(set(used)) == 1
    assert used[0] not in (None, world) and used[0].group_desc == "ring_hf messages"


def test_messages_have_a_group_of_their_own():
    run_distributed(2, _tell)


def test_a_tensor_goes_where_the_backend_can_send_it_from():
    x = torch.ones(3)
    assert (
        groups._on_backend_device(x, SimpleNamespace(_device_types=[torch.device("cpu"), torch.device("cuda")])) is x
    )
    assert groups._on_backend_device(x, SimpleNamespace(_device_types=[torch.device("meta")])).device.type == "meta"
