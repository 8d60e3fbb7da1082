"""The probe: whether a module computes every token by itself, measured on the module and not read off its name.

A few tokens run through the model and the calls of modules are recorded. A module whose arguments and results have one
row per token is then called alone. It is token-wise if a row that is set to NaN, and a row that is replaced, change no
other row, and if fewer tokens give the same rows. The table of feed-forward classes (`mlp_classes.py`) is generated
with this probe; at runtime it is needed only for modules that the table cannot know.

Letters: B rows, S tokens of a row, T = B * S.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .sharded_weights import is_dtensor, is_released, without_hooks_of_fsdp

BATCH, LENGTH = 2, 11  # T = 22 is not the size of anything else
# Relative to the largest value; 5e-2 for other dtypes. Models in fp64 compute some things in fp32.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
_CHANGED_ROW = 5


@dataclass(frozen=True)
class TokenAxes:
    """The number of leading dims that hold tokens: 2 for [B, S, ...], 1 for [T, ...], 0 for an argument without any.

    Attributes:
        args: one entry for each positional argument.
        kwargs: names and leading dims of the keyword arguments that hold tokens.
        results: one entry for each result.
        is_tuple: whether the module returns a tuple.
    """

    args: tuple[int, ...]
    kwargs: tuple[tuple[str, int], ...]
    results: tuple[int, ...]
    is_tuple: bool


@dataclass(frozen=True)
class RecordedCall:
    """The first call of a module in a pass.

    Attributes:
        name: of the module in its model.
        axes: None if some argument or result has no row per token.
        same_width: whether the first result is as wide as the first argument.
        output: what the module returned.
        num_calls: in the whole pass.
    """

    name: str
    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    axes: TokenAxes | None
    same_width: bool
    output: Any = None
    num_calls: int = 1

    def first_tokens(self) -> Tensor:
        """Return the first floating-point argument, `[B, S, ...]` or `[T, ...]`."""
        arguments = (*self.args, *self.kwargs.values())
        return next(x for x in arguments if isinstance(x, Tensor) and x.is_floating_point())


@contextlib.contextmanager
def preserved_state(model: nn.Module) -> Iterator[None]:
    """Run in evaluation mode without gradients; restore the training modes and the CPU's random state afterwards.

    Raises:
        ValueError: if a module changed its weights, as some do when they are first evaluated.
    """
    training_modes = {module: module.training for module in model.modules()}
    weights_before = {name: (weight, _sample(weight).clone()) for name, weight in _whole_weights(model)}
    model.eval()
    for module in model.modules():
        if any(hasattr(p, "quant_state") for p in module._parameters.values()):
            # In evaluation on a CPU, bitsandbytes packs 4-bit weights into a form that cannot be trained through.
            module.training = True
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            yield
        finally:
            for module, mode in training_modes.items():
                module.training = mode
    for name, weight in _whole_weights(model):
        if name not in weights_before or not _is_same(*weights_before[name], weight):
            raise ValueError(
                f"A module changed {name} when it was tried in evaluation mode, so that it may not train as before. "
                "Leave memory.apply out, and load the model again."
            )


def _whole_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, p.detach()) for name, p in model.named_parameters() if not is_dtensor(p))


def _sample(weight: Tensor) -> Tensor:
    """Return some 64 elements: an alias of the whole weight would follow what is written into it."""
    return weight.reshape(-1)[:: max(1, weight.numel() // 64)]


def _is_same(before: Tensor, sample: Tensor, now: Tensor) -> bool:
    if before.data_ptr() == now.data_ptr():
        return before.shape == now.shape and torch.equal(_sample(now), sample)
    return before.shape == now.shape and torch.equal(before, now)  # moved: PEFT does, around a pass


@contextlib.contextmanager
def stand_in_weights(model: Any) -> Iterator[None]:
    """Give a model whose weights are not in this process random ones of the same shapes, for the time of the context.

    Its shards are elsewhere (ZeRO-3 and Transformers' FSDP2 load a model so), or its weights are zeros here (FSDP's
    cpu_ram_efficient_loading, on all ranks but the first). The operations of modules are tried, for which random
    weights serve. Parameters of one shape share one tensor, so that all layers take the memory of one.
    """
    embedding = model.get_input_embeddings().weight
    if not is_released(embedding) and not is_dtensor(embedding) and bool(embedding.detach().any()):
        yield
        return
    generator = torch.Generator().manual_seed(0)
    weights: dict[tuple[torch.Size, torch.dtype, torch.device], Tensor] = {}
    own = [(module, name, p) for module in model.modules() for name, p in module._parameters.items() if p is not None]
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_hooks_of_fsdp(model))
        for module, name, p in own:
            stack.callback(module._parameters.__setitem__, name, p)
            shape = torch.Size(getattr(p, "ds_shape", p.shape))
            key = shape, p.dtype, p.device
            if key not in weights:
                mean = 1.0 if len(shape) < 2 else 0.0
                weights[key] = mean + 0.05 * torch.randn(shape, generator=generator).to(p.device, p.dtype)
            module._parameters[name] = nn.Parameter(weights[key], requires_grad=p.requires_grad)
        yield


def values_above_zero(model: nn.Module, word: str) -> Iterator[str]:
    """Yield attributes of modules whose name holds `word` and whose value is above 0, for example `dropout`."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if word in key and isinstance(value, float) and value > 0:
                yield f"{name or type(module).__name__}.{key}={value}"
        if word == "drop" and isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            yield f"{name} (p={module.p})"


def tokens(model: Any) -> Tensor:
    """Return int64 token numbers `[B, S]` spread over the model's vocabulary, on its device."""
    weight = model.get_input_embeddings().weight
    size = weight.shape[0]
    numbers = torch.arange(BATCH * LENGTH, device=weight.device) * 7 % max(size - 3, 1) + min(3, size - 1)
    return numbers.view(BATCH, LENGTH)


def record_calls(model: Any, is_wanted: Callable[[nn.Module], bool]) -> list[RecordedCall]:
    """Run a pass of [B, S] tokens; return the first call of every module for which `is_wanted` holds.

    Raises:
        ValueError: if a module changed its weights.
    """
    calls: dict[nn.Module, RecordedCall] = {}
    names = {module: name for name, module in model.named_modules()}
    num_calls: Counter[nn.Module] = Counter()

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        num_calls[module] += 1
        if module not in calls:
            args, kwargs = torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
            axes, same_width = _token_axes(args, kwargs, output)
            calls[module] = RecordedCall(names[module], module, args, kwargs, axes, same_width, output)

    hooks = [module.register_forward_hook(record, with_kwargs=True) for module in model.modules() if is_wanted(module)]
    try:
        with preserved_state(model):
            model(input_ids=tokens(model), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [dataclasses.replace(call, num_calls=num_calls[module]) for module, call in calls.items()]


def _num_leading(x: Any) -> int:
    if not isinstance(x, Tensor) or x.ndim < 1:
        return 0
    if x.ndim >= 2 and tuple(x.shape[:2]) == (BATCH, LENGTH):
        return 2
    return 1 if x.shape[0] == BATCH * LENGTH else 0


def _token_axes(args: tuple, kwargs: dict[str, Any], output: Any) -> tuple[TokenAxes | None, bool]:
    results = output if isinstance(output, tuple) else (output,)
    axes = TokenAxes(
        tuple(map(_num_leading, args)),
        tuple((key, _num_leading(value)) for key, value in kwargs.items() if _num_leading(value)),
        tuple(map(_num_leading, results)),
        isinstance(output, tuple),
    )
    tensors = [x for x in (*args, *kwargs.values(), *results) if isinstance(x, Tensor) and x.numel() > 1]
    first = next((x for x in (*args, *kwargs.values()) if _num_leading(x) and x.is_floating_point()), None)
    if first is None or not all(axes.results) or not all(map(_num_leading, tensors)):
        return None, False
    return axes, isinstance(results[0], Tensor) and results[0].shape[-1] == first.shape[-1]


def flat(x: Tensor, num_leading: int) -> Tensor:
    """Return `[T, ...]` of `[B, S, ...]` (`num_leading` 2) or of `[T, ...]` (1)."""
    return x.flatten(0, 1) if num_leading == 2 else x


def is_token_wise(call: RecordedCall) -> bool:
    """Return whether no row of a module's results depends on another row of its arguments, by calling it."""
    if call.axes is None:
        return False
    whole = run(call, lambda x, num_leading: x)
    largest = max(float(x.abs().max()) for x in whole if x.is_floating_point())
    tolerance = max(largest, 1e-6) * TOLERANCE.get(whole[0].dtype, 5e-2)
    others = torch.ones(BATCH * LENGTH, dtype=torch.bool)
    others[_CHANGED_ROW] = False

    def close(results: tuple[Tensor, ...], expected: tuple[Tensor, ...], rows: Any) -> bool:
        pairs = zip(results, expected, strict=True)
        return all(bool(((a[rows] - b[rows]).abs() <= tolerance).all()) for a, b in pairs if a.is_floating_point())

    some = slice(3, 10)
    fewer = run(call, lambda x, num_leading: flat(x, num_leading)[some][None] if num_leading == 2 else x[some])
    return (
        close(run(call, _with_nan_row), whole, others)
        and close(run(call, _with_other_row), whole, others)
        and all(result.shape[0] == 7 for result in fewer)
        and close(fewer, tuple(x[some] for x in whole), slice(None))
    )


def _with_nan_row(x: Tensor, num_leading: int) -> Tensor:
    if not x.is_floating_point():
        return x
    x = x.clone()
    flat(x, num_leading)[_CHANGED_ROW] = torch.nan
    return x


def _with_other_row(x: Tensor, num_leading: int) -> Tensor:
    if not x.is_floating_point():
        return x
    x = x.clone()
    flat(x, num_leading)[_CHANGED_ROW] = -2 * flat(x, num_leading)[3]
    return x


def run(call: RecordedCall, change: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, ...]:
    """Call a module with changed arguments; return its results as rows `[T, ...]`.

    Args:
        call: its recorded arguments.
        change: takes a tensor of tokens and the number of its leading dims.
    """
    assert call.axes is not None
    args = [change(x, num) if num else x for x, num in zip(call.args, call.axes.args, strict=True)]
    changed = {key: change(call.kwargs[key], num) for key, num in call.axes.kwargs}
    with preserved_state(call.module):
        results = call.module(*args, **{**call.kwargs, **changed})
    results = results if isinstance(results, tuple) else (results,)
    return tuple(flat(x, num) for x, num in zip(results, call.axes.results, strict=True))


def is_affine(call: RecordedCall) -> bool:
    """Return whether a module is no more than a matrix, however it is made (LoRA): f(2x) - f(x) = f(x) - f(0)."""

    def scaled(factor: float) -> Tensor:
        return run(call, lambda x, num_leading: x * factor if x.is_floating_point() else x)[0]

    zero, once, twice = scaled(0), scaled(1), scaled(2)
    tolerance = float((once - zero).abs().max()) * TOLERANCE.get(once.dtype, 5e-2)
    return bool(((twice - once) - (once - zero)).abs().max() <= max(tolerance, 1e-30))
