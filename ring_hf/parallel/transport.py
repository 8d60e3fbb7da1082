"""Moving blocks around a ring: the only place with point-to-point communication.

Blocks go to the next rank and come from the previous one through `batch_isend_irecv`, the form that cannot deadlock on
NCCL and posts both directions at once on gloo, where a blocking send before the receive deadlocks. Keys/values and
their gradients carry tags of their own: gloo may swap two transfers of equal tag. Ranks are translated to global ones.
"""

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, Work

KEYS_AND_VALUES, GRADIENTS = 1, 2


class Ring:
    """Exchanges within one process group, `shift` ranks apart."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def post(self, send: torch.Tensor, receive: torch.Tensor, tag: int, shift: int = 1) -> "Exchange":
        """Starts sending to the rank `shift` ahead and receiving from the one `shift` behind."""
        assert shift % self.size, "an exchange with oneself: a ring of one never gets here"
        ahead, behind = (dist.get_global_rank(self.group, (self.rank + step) % self.size) for step in (shift, -shift))
        ops = [
            dist.P2POp(dist.isend, send, ahead, self.group, tag),
            dist.P2POp(dist.irecv, receive, behind, self.group, tag),
        ]
        return Exchange(dist.batch_isend_irecv(ops), send, receive)


class Exchange:
    """One exchange under way. Holds its buffers, so that neither is reused while bytes still move."""

    def __init__(self, works: list[Work], send: torch.Tensor, receive: torch.Tensor) -> None:
        self._works, self._receive = works, receive
        self._send: torch.Tensor | None = send

    def wait(self) -> torch.Tensor:
        """The received block. May be called again: a second wait on gloo's own work would wait for ever."""
        while self._works:
            self._works.pop().wait()
        self._send = None
        return self._receive


class Packed:
    """Two tensors in one flat buffer, so that one message moves both and their shapes may differ (MLA)."""

    def __init__(self, first: torch.Size, second: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self.shapes = first, second
        self.flat = torch.empty(first.numel() + second.numel(), dtype=dtype, device=device)
        self.first = self.flat[: first.numel()].view(first)
        self.second = self.flat[first.numel() :].view(second)

    @classmethod
    def of(cls, first: torch.Tensor, second: torch.Tensor, dtype: torch.dtype | None = None) -> "Packed":
        packed = cls(first.shape, second.shape, dtype or first.dtype, first.device)
        packed.first.copy_(first)
        packed.second.copy_(second)
        return packed

    def like(self) -> "Packed":
        return Packed(*self.shapes, self.flat.dtype, self.flat.device)
