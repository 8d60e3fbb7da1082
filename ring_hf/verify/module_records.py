"""The tensors of every module in a forward pass, small enough to keep, and how far another pass is from them.

A hook on every module projects each token's features to at most `NUM_FEATURES` numbers by random signs (Johnson and
Lindenstrauss 1984; with signs, Achlioptas 2003). The projection is linear and keeps norms to about a tenth, so the
difference of two projections is as large as that of the tensors: enough to decide which module differs first, at a
few hundred bytes per token and module. A pass of whole sequences keeps the tokens of this rank only.

Shapes: B rows, S tokens of a whole row, C tokens of this rank, F features of a token, K = min(F, NUM_FEATURES).
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..memory import applied_to

NUM_FEATURES = 64
MAX_TENSORS = 8  # of the inputs or outputs of a module


class RecordKey(NamedTuple):
    """A tensor of a forward pass.

    Attributes:
        module: its name; empty for the model itself.
        call: how many calls of this module came before.
        kind: "input" or "output".
        tensor: name of the argument, or position among the outputs.
    """

    module: str
    call: int
    kind: str
    tensor: str


@dataclass
class Comparison:
    """How far a pass is from the reference.

    Attributes:
        difference_BC: norm of the difference of each token of this rank.
        square_sum: sum over these tokens of the squared norms of the reference.
        num_tokens: tokens of the sum.
    """

    difference_BC: Tensor
    square_sum: float
    num_tokens: int


@dataclass
class ModuleRecords:
    """Hooks on all modules of a model, what they recorded of a reference, and the comparisons with it.

    Attributes:
        model: the Transformers model.
        positions_C: global positions of this rank's tokens, those of padding included.
        is_real_BC: whether a token of this rank is compared: padding is not.
        length: S.
        references: by tensor, in the order in which the modules ended: [B or 1, C, K].
        comparisons: by tensor, of the last pass that was compared.
        missing: tensors of the reference that the last pass did not have in the same shape.
    """

    model: nn.Module
    positions_C: Tensor
    is_real_BC: Tensor
    length: int
    references: dict[RecordKey, Tensor] = dataclasses.field(default_factory=dict)
    comparisons: dict[RecordKey, Comparison] = dataclasses.field(default_factory=dict)
    missing: list[RecordKey] = dataclasses.field(default_factory=list)
    is_active: bool = False
    _signs: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    _calls: dict[str, int] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def recording(self, is_whole: bool, is_reference: bool) -> Iterator[None]:
        """Record the forward pass inside until `is_active` is set to False: recomputed layers are not recorded.

        Args:
            is_whole: whether the pass has whole sequences.
            is_reference: whether to keep its tensors; otherwise they are compared with those that were kept.
        """
        handles, inputs_of = [], {}

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any], name: str) -> None:
            if self.is_active:
                call = self._calls[name] = self._calls.get(name, -1) + 1
                inputs_of[name, call] = self._project(_named_inputs(args, kwargs), is_whole)

        def after(module: nn.Module, args: tuple, output: Any, name: str) -> None:
            if self.is_active and name in self._calls:
                call = self._calls[name]
                outputs = self._project(_named_outputs(output), is_whole)
                for kind, tensors in (("input", inputs_of.pop((name, call), {})), ("output", outputs)):
                    for tensor, value in tensors.items():
                        self._keep(RecordKey(name, call, kind, tensor), value, is_reference)

        applied = applied_to(self.model)
        blocks = () if applied is None else tuple(f"{name}." for name in applied.feed_forward)
        for name, module in self.model.named_modules():
            if name.startswith(blocks):  # runs on a block of tokens at a time, and must not have hooks
                continue
            handles.append(module.register_forward_pre_hook(_bind(before, name), with_kwargs=True))
            handles.append(module.register_forward_hook(_bind(after, name)))
        self._calls, self.is_active = {}, True
        if not is_reference:
            self.comparisons, self.missing = {}, []
        try:
            yield
        finally:
            self.is_active = False
            for handle in handles:
                handle.remove()
        if not is_reference:
            self.missing = [key for key in self.references if key not in self.comparisons]

    def _keep(self, key: RecordKey, value: Tensor, is_reference: bool) -> None:
        if is_reference:
            self.references[key] = value
            return
        reference = self.references.get(key)
        if reference is None or reference.shape[1:] != value.shape[1:]:
            return
        difference_BC = (value - reference).norm(dim=-1).expand(self.is_real_BC.shape)
        norms_BC = reference.norm(dim=-1).expand(self.is_real_BC.shape)
        self.comparisons[key] = Comparison(
            difference_BC=torch.where(self.is_real_BC, difference_BC, 0.0),
            square_sum=float((norms_BC[self.is_real_BC].double() ** 2).sum()),
            num_tokens=int(self.is_real_BC.sum()),
        )

    @torch.no_grad()
    def _project(self, tensors: dict[str, Tensor], is_whole: bool) -> dict[str, Tensor]:
        num_rows = self.is_real_BC.shape[0]
        length = self.length if is_whole else len(self.positions_C)
        projected = {}
        for name, x in tensors.items():
            tokens = to_tokens(x.detach(), num_rows, length)
            if tokens is None:
                continue
            if is_whole:  # padding of the layout has no partner; it is not compared
                tokens = tokens[:, self.positions_C.clamp(max=self.length - 1).to(tokens.device)]
            dtype = torch.float64 if tokens.dtype in (torch.float64, torch.int64) else torch.float32
            tokens = tokens.to(dtype)
            if tokens.shape[-1] > NUM_FEATURES:
                tokens = tokens @ self._signs_for(tokens.shape[-1]).to(tokens)
            projected[name] = tokens.cpu()
        return projected

    def _signs_for(self, num_features: int) -> Tensor:
        if num_features not in self._signs:
            generator = torch.Generator().manual_seed(num_features)
            signs = torch.randint(0, 2, (num_features, NUM_FEATURES), generator=generator) * 2.0 - 1.0
            self._signs[num_features] = signs / NUM_FEATURES**0.5
        return self._signs[num_features]


def to_tokens(x: Tensor, num_rows: int, length: int) -> Tensor | None:
    """Return a tensor by tokens, `[B or 1, length, F]`, or None if it has no dim of tokens.

    Args:
        x: `[B, length, ...]`, `[B, H, length, D]`, `[B, D, length]`, `[B * length, F]`, or another shape.
    """
    if x.ndim >= 2 and x.shape[0] in (1, num_rows):
        dims = [1, 2, x.ndim - 1] if x.ndim > 2 else [1]
        for dim in dims:
            if x.shape[dim] == length:
                return x.movedim(dim, 1).reshape(x.shape[0], length, -1)
    if x.ndim >= 1 and x.shape[0] == num_rows * length:
        return x.reshape(num_rows, length, -1)
    if x.ndim == 1 and x.shape[0] == length:
        return x.reshape(1, length, 1)
    return None


def _bind(function: Any, name: str) -> Any:
    def hook(*args: Any) -> None:
        function(*args, name)

    return hook


def _named_inputs(args: tuple, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    named = {f"{n}": value for n, value in enumerate(args)} | kwargs
    return dict(_flatten(named))


def _named_outputs(output: Any) -> dict[str, Tensor]:
    if isinstance(output, Tensor):
        return {"": output}
    values = output if isinstance(output, dict) else dict(enumerate(output)) if isinstance(output, tuple) else {}
    return dict(_flatten({str(key): value for key, value in values.items()}))


def _flatten(values: dict[str, Any]) -> list[tuple[str, Tensor]]:
    flat: list[tuple[str, Tensor]] = []
    for name, value in values.items():
        if isinstance(value, Tensor) and value.dtype != torch.bool:
            flat.append((name, value))
        elif type(value) in (tuple, list):
            flat += [
                (f"{name}.{n}", x) for n, x in enumerate(value) if isinstance(x, Tensor) and x.dtype != torch.bool
            ]
    return flat[:MAX_TENSORS]
