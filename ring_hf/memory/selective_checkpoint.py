"""Which results of a decoder layer are kept for its backward pass, while all else is recomputed: those of attention.

Selective activation checkpointing: PyTorch recomputes a checkpointed layer with the results of chosen operators put
in place. Chosen are attention over a shared sequence, the exchanges of Ulysses, and the attention operators of PyTorch
and flash-attn, so that the lever works in one process too. Attention that is made of matrix products ("eager", and
PyTorch's fallback) is no operator, and refused when it runs.

PyTorch's own `create_selective_checkpoint_contexts` does the same, but keeps what it saves to itself: its policies for
host memory act only when a model is compiled. Hence the two modes below, and the test that compares them with it.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SAVED = {
    "ring_hf::ring_attention",
    "ring_hf::all_to_all",
    "ring_hf::chunked_ulysses",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::fwd",
    "flash_attn_3::_flash_attn_forward",
}


def name_of(func: Any) -> str:
    return func.name().split(".")[0] if isinstance(func, torch._ops.OpOverload) else ""


class SavedResults:
    """What one layer's forward pass saved, by operator and call. `keep` turns a tensor into what brings it back."""

    def __init__(self, keep: Callable[[Tensor], Callable[[], Tensor]]) -> None:
        self._keep = keep
        self._results: dict[str, list[Any]] = defaultdict(list)

    def put(self, name: str, result: Any) -> None:
        # Detached: the tensor itself is about to get the graph that leads back here.
        self._results[name].append(torch.utils._pytree.tree_map_only(Tensor, lambda x: self._keep(x.detach()), result))

    def take(self, name: str, number: int) -> Any:
        saved = self._results[name][number]
        if saved is None:
            raise ValueError(
                f"The result of {name} was used already: a step with saved attention (memory.apply) has one backward "
                'pass. Do not use retain_graph=True, or set attention="recompute".'
            )
        self._results[name][number] = None
        return torch.utils._pytree.tree_map(lambda x: x() if callable(x) else x, saved)

    def __len__(self) -> int:
        return sum(map(len, self._results.values()))


class CachingMode(TorchDispatchMode):
    """Around a layer's forward pass."""

    def __init__(self, shelf: SavedResults) -> None:
        super().__init__()
        self.shelf = shelf

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = name_of(func)
        if name in SAVED:
            _refuse_dropout(func, args, kwargs or {})
            self.shelf.put(name, result)
        return result


def _refuse_dropout(func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """An operator that draws random numbers and is not run again would leave others to what is recomputed after it."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    dropout = given.get("dropout_p", given.get("p_dropout", 0.0))
    if dropout:
        raise ValueError(
            f"attention='save' with attention dropout {dropout}: the random numbers it draws would be missing when "
            'the rest of the layer is recomputed. Set the dropout of attention to 0, or attention="recompute".'
        )


class CachedMode(TorchDispatchMode):
    """Around its recomputation: the same calls in the same order."""

    def __init__(self, shelf: SavedResults) -> None:
        super().__init__()
        self.shelf = shelf
        self._calls: dict[str, int] = defaultdict(int)

    def __enter__(self) -> Any:
        self._calls.clear()
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name = name_of(func)
        if name not in SAVED:
            return func(*args, **(kwargs or {}))
        self._calls[name] += 1
        return self.shelf.take(name, self._calls[name] - 1)


def resident(x: Tensor) -> Callable[[], Tensor]:
    """Kept where it is."""
    version = x._version

    def back() -> Tensor:
        refuse_change_in_place(x, version)
        return x

    return back


def refuse_change_in_place(x: Tensor, version: int) -> None:
    """What was saved is a part of the result now, and would make another one of what is recomputed."""
    if x._version != version:
        raise ValueError(
            "A tensor was changed in place after it was saved for the backward pass (memory.apply). Set "
            'attention="recompute" and offload=None, or change a copy.'
        )
