"""Steps of small models with and without memory options, in fp64, and counters of operators and bytes."""

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ring_hf.memory.selective_checkpoint import name_of
from ring_hf.verify.model_families import SIZES, tiny

LENGTHS = (40, 33)


def ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **_):
    """Transformers' loss, but for its `logits.float()`, which would hide differences below fp32."""
    if shift_labels is None:
        shift_labels = pad(labels, (0, 1), value=ignore_index)[..., 1:]
    how = {"ignore_index": ignore_index, "reduction": "mean" if num_items_in_batch is None else "sum"}
    loss = cross_entropy(logits.view(-1, vocab_size), shift_labels.reshape(-1), **how)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def batch(num_rows: int = 2, length: int = 40, seed: int = 0) -> dict[str, Tensor]:
    """Return random tokens [num_rows, length]; the first row has a prompt without labels."""
    tokens = torch.randint(3, SIZES["vocab_size"], (num_rows, length), generator=torch.Generator().manual_seed(seed))
    labels = tokens.clone()
    labels[0, :9] = -100
    return {"input_ids": tokens, "labels": labels}


def model_of(name: str, attention: str = "ring_zigzag", **more: Any) -> Any:
    """Return a small model of a family of `ring_hf/verify/model_families.py`, in fp64, in training mode."""
    model = tiny(name, attention, **more).train()
    model.loss_function = ForCausalLMLoss
    return model


def step(model: Any, inputs: dict[str, Any], count: int | None = 71, **more: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and the gradients by name of one step."""
    model.zero_grad()
    count_of = {} if count is None else {"num_items_in_batch": count}
    output = model(**inputs, **count_of, use_cache=False, **more)
    output.loss.backward()
    return output.loss.detach(), gradients(model)


def gradients(model: Any) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def relative_difference(actual: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> float:
    """Return the largest difference of losses and gradients, relative to the largest entry of each (NaN: infinity)."""
    assert set(actual[1]) == set(expected[1])
    pairs = [(actual[0], expected[0]), *((actual[1][name], expected[1][name]) for name in expected[1])]
    worst = 0.0
    for a, b in pairs:
        ratio = ((a - b).abs().max() / b.abs().max().clamp_min(1e-4)).item()
        worst = max(worst, ratio if ratio == ratio else float("inf"))
    return worst


class CountOperators(TorchDispatchMode):
    """Counts the calls of each operator, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[name_of(func)] += 1
        return func(*args, **(kwargs or {}))


class PeakBytes(TorchDispatchMode):
    """Tracks the peak bytes of live tensor storages that operators made; parameters are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def _gone(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        old = {x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is not None and storage not in self._known and storage not in old:
                self._known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result
