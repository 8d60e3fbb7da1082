"""Moving bytes between the ranks of a ring: the only place that calls `torch.distributed` for attention.

Messages go through `batch_isend_irecv`, the form that cannot deadlock on NCCL and posts both directions at once on
gloo, where a blocking send before the receive deadlocks. Keys/values and their gradients carry tags of their own: gloo
may swap two transfers of equal tag. Ranks are translated to global ones.
"""

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, Work

from .groups import subgroup

KEYS_AND_VALUES, GRADIENTS = 1, 2
# Renamed in torch 2.13, where the old names warn.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Ring:
    """The ranks that exchange keys and values with this one: all of `group`, or every `ulysses`-th of it."""

    def __init__(self, group: ProcessGroup, ulysses: int = 1) -> None:
        self._group = group
        self.rank, part = divmod(dist.get_rank(group), ulysses)
        self.size = dist.get_world_size(group) // ulysses
        self._ranks = [place * ulysses + part for place in range(self.size)]

    def post(
        self, send: torch.Tensor | None, to: int, receive: torch.Tensor | None, source: int, tag: int
    ) -> "Exchange":
        """Starts sending to the rank `to` and receiving from the rank `source` of this ring; None: nothing to move."""
        assert self.rank not in (to, source), "an exchange with oneself: a ring of one never gets here"
        ops = [
            dist.P2POp(op, x, dist.get_global_rank(self._group, self._ranks[peer]), self._group, tag)
            for op, x, peer in ((dist.isend, send, to), (dist.irecv, receive, source))
            if x is not None
        ]
        return Exchange(dist.batch_isend_irecv(ops) if ops else [], send, receive)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """`[ring size, *x.shape]`: `x` of every rank."""
        gathered = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        _all_gather(gathered, x.contiguous(), group=subgroup(self._group, self._ranks))
        return gathered.unflatten(0, (self.size, -1))

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks of their `x[rank]`, for `x [ring size, ...]`."""
        summed = torch.empty_like(x[0])
        _reduce_scatter(summed, x.contiguous().flatten(0, 1), group=subgroup(self._group, self._ranks))
        return summed


class Exchange:
    """One exchange under way. Holds its buffers, so that neither is reused while bytes still move."""

    def __init__(self, works: list[Work], send: torch.Tensor | None, receive: torch.Tensor | None) -> None:
        self._works, self._send, self._receive = works, send, receive

    def wait(self) -> torch.Tensor:
        """The received block. May be called again: a second wait on gloo's own work would wait for ever."""
        while self._works:
            self._works.pop().wait()
        self._send = None
        return self._receive  # type: ignore[return-value]


class Packed:
    """Two tensors in one flat buffer, so that one message moves both and their shapes may differ (MLA)."""

    def __init__(self, first: torch.Size, second: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self.shapes = first, second
        self.flat = torch.empty(first.numel() + second.numel(), dtype=dtype, device=device)
        self.first = self.flat[: first.numel()].view(first)
        self.second = self.flat[first.numel() :].view(second)

    @classmethod
    def of(cls, first: torch.Tensor, second: torch.Tensor) -> "Packed":
        """A packed copy of two tensors."""
        packed = cls(first.shape, second.shape, first.dtype, first.device)
        packed.first.copy_(first)
        packed.second.copy_(second)
        return packed

    @classmethod
    def like(cls, first: torch.Tensor, second: torch.Tensor, length: int, dtype: torch.dtype) -> "Packed":
        """Uninitialised room for two tensors of those shapes, but `length` tokens long."""
        of_first, of_second = (torch.Size((*x.shape[:2], length, x.shape[3])) for x in (first, second))
        return cls(of_first, of_second, dtype, first.device)
