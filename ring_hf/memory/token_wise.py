"""What a model really calls: one forward pass of a few tokens, watched, and proofs on what was seen.

Which modules are feed-forward layers is not read off class names. A few tokens run through the real model; a module
whose arguments and results have one row per token is then tried by itself. It treats tokens one by one if a row that
is made NaN, and a row that is made another one, change no other row, and if it gives the same rows for fewer tokens.

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
# Of the largest value; others 5e-2. Models in fp64 compute some things in fp32.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}


@dataclass(frozen=True)
class TokenAxes:
    """Which arguments of a module hold one row per token, and how: leading dims 2 for [B, S, ...], 1 for [T, ...]."""

    args: tuple[int, ...]
    kwargs: tuple[tuple[str, int], ...]
    results: tuple[int, ...]
    is_tuple: bool


@dataclass(frozen=True)
class RecordedCall:
    """One call."""

    name: str
    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    rows: TokenAxes | None
    same_width: bool
    num_calls: int = 1  # in the whole pass


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards everything is as before, the CPU's random numbers too.

    Raises:
        ValueError: if a module changed its weights, as some do when they are first evaluated.
    """
    modes = {module: module.training for module in model.modules()}
    weights = {name: (weight, _sample(weight).clone()) for name, weight in _whole_weights(model)}
    model.eval()
    for module in model.modules():
        if any(hasattr(p, "quant_state") for p in module._parameters.values()):
            # In evaluation on a CPU, bitsandbytes packs 4-bit weights into a form that cannot be trained through.
            module.training = True
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
    for name, weight in _whole_weights(model):
        if name not in weights or not _is_same(*weights[name], weight):
            raise ValueError(
                f"A module changed {name} when it was tried in evaluation mode, so that it may not train as before. "
                "Leave memory.apply out, and load the model anew."
            )


def _whole_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, p.detach()) for name, p in model.named_parameters() if not is_dtensor(p))


def _sample(weight: Tensor) -> Tensor:
    """Some 64 elements: an alias of a weight would follow what is written into it."""
    return weight.reshape(-1)[:: max(1, weight.numel() // 64)]


def _is_same(before: Tensor, sample: Tensor, now: Tensor) -> bool:
    if before.data_ptr() == now.data_ptr():
        return before.shape == now.shape and torch.equal(_sample(now), sample)
    return before.shape == now.shape and torch.equal(before, now)  # moved: PEFT does, around a pass


@contextlib.contextmanager
def stand_in_weights(model: Any) -> Iterator[None]:
    """Within, a model whose weights are not in this process has random ones of the same shapes.

    Their parts are elsewhere (ZeRO-3 and Transformers' FSDP2 load a model so), or they are zeros here (FSDP's
    cpu_ram_efficient_loading, on all ranks but the first). What is proven are the operations of modules, for which
    random weights serve. Parameters of one shape share one tensor, so that all layers take the memory of one.
    """
    embedding = model.get_input_embeddings().weight
    if not is_released(embedding) and not is_dtensor(embedding) and bool(embedding.detach().any()):
        yield
        return
    generator = torch.Generator().manual_seed(0)
    drawn: dict[tuple[torch.Size, torch.dtype, torch.device], Tensor] = {}
    own = [(module, name, p) for module in model.modules() for name, p in module._parameters.items() if p is not None]
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_hooks_of_fsdp(model))
        for module, name, p in own:
            stack.callback(module._parameters.__setitem__, name, p)
            shape = torch.Size(getattr(p, "ds_shape", p.shape))
            key = shape, p.dtype, p.device
            if key not in drawn:
                mean = 1.0 if len(shape) < 2 else 0.0
                drawn[key] = mean + 0.05 * torch.randn(shape, generator=generator).to(p.device, p.dtype)
            module._parameters[name] = nn.Parameter(drawn[key], requires_grad=p.requires_grad)
        yield


def values_above_zero(model: nn.Module, word: str) -> Iterator[str]:
    """Attributes of modules whose name holds `word` and whose value is above 0, for example `dropout`."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if word in key and isinstance(value, float) and value > 0:
                yield f"{name or type(module).__name__}.{key}={value}"
        if word == "drop" and isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            yield f"{name} (p={module.p})"


def tokens(model: Any) -> Tensor:
    """[B, S] token numbers that the model knows, spread over them."""
    size = model.get_input_embeddings().weight.shape[0]
    device = model.get_input_embeddings().weight.device
    return (torch.arange(BATCH * LENGTH, device=device) * 7 % max(size - 3, 1) + min(3, size - 1)).view(BATCH, LENGTH)


def watch(model: Any, wanted: Callable[[nn.Module], bool]) -> list[RecordedCall]:
    """The first call of every module that is wanted, in a pass of [B, S] tokens."""
    seen: dict[nn.Module, RecordedCall] = {}
    names = {module: name for name, module in model.named_modules()}
    num_calls: Counter[nn.Module] = Counter()

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        num_calls[module] += 1
        if module not in seen:
            args, kwargs = torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
            rows, same_width = _rows(args, kwargs, output)
            seen[module] = RecordedCall(names[module], module, args, kwargs, rows, same_width)

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in model.modules() if wanted(module)]
    try:
        with undisturbed(model):
            model(input_ids=tokens(model), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [dataclasses.replace(call, num_calls=num_calls[module]) for module, call in seen.items()]


def _lead(x: Any) -> int:
    if not isinstance(x, Tensor) or x.ndim < 1:
        return 0
    if x.ndim >= 2 and tuple(x.shape[:2]) == (BATCH, LENGTH):
        return 2
    return 1 if x.shape[0] == BATCH * LENGTH else 0


def _rows(args: tuple, kwargs: dict[str, Any], output: Any) -> tuple[TokenAxes | None, bool]:
    results = output if isinstance(output, tuple) else (output,)
    rows = TokenAxes(
        tuple(map(_lead, args)),
        tuple((key, _lead(value)) for key, value in kwargs.items() if _lead(value)),
        tuple(map(_lead, results)),
        isinstance(output, tuple),
    )
    every = [x for x in (*args, *kwargs.values(), *results) if isinstance(x, Tensor) and x.numel() > 1]
    first = next((x for x in (*args, *kwargs.values()) if _lead(x) and x.is_floating_point()), None)
    if first is None or not all(rows.results) or not all(map(_lead, every)):
        return None, False
    return rows, isinstance(results[0], Tensor) and results[0].shape[-1] == first.shape[-1]


def flat(x: Tensor, lead: int) -> Tensor:
    return x.flatten(0, 1) if lead == 2 else x


def treats_tokens_alone(seen: RecordedCall) -> bool:
    """Whether no row of the results depends on another row of the arguments, tried on the real module."""
    rows, module = seen.rows, seen.module
    if rows is None:
        return False
    plain = call(module, seen, lambda x, lead: x)
    largest = max(float(x.abs().max()) for x in plain if x.is_floating_point())
    bar = max(largest, 1e-6) * TOLERANCE.get(plain[0].dtype, 5e-2)
    others = torch.ones(BATCH * LENGTH, dtype=torch.bool)
    others[5] = False

    def same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], which: Any) -> bool:
        pairs = zip(found, wanted, strict=True)
        return all(bool(((a[which] - b[which]).abs() <= bar).all()) for a, b in pairs if a.is_floating_point())

    def poisoned(value: float) -> Callable[[Tensor, int], Tensor]:
        def change(x: Tensor, lead: int) -> Tensor:
            if not x.is_floating_point():
                return x
            x = x.clone()
            flat(x, lead)[5] = value if value != value else -2 * flat(x, lead)[3]
            return x

        return change

    few = slice(3, 10)
    cut = call(module, seen, lambda x, lead: flat(x, lead)[few][None] if lead == 2 else x[few])
    return (
        same(call(module, seen, poisoned(torch.nan)), plain, others)
        and same(call(module, seen, poisoned(0.0)), plain, others)
        and all(part.shape[0] == 7 for part in cut)
        and same(cut, tuple(x[few] for x in plain), slice(None))
    )


def call(module: nn.Module, seen: RecordedCall, change: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, ...]:
    """The results for changed arguments, as rows."""
    assert seen.rows is not None
    args = [change(x, lead) if lead else x for x, lead in zip(seen.args, seen.rows.args, strict=True)]
    changed = {key: change(seen.kwargs[key], lead) for key, lead in seen.rows.kwargs}
    with undisturbed(module):
        results = module(*args, **{**seen.kwargs, **changed})
    results = results if isinstance(results, tuple) else (results,)
    return tuple(flat(x, lead) for x, lead in zip(results, seen.rows.results, strict=True))


def is_affine(seen: RecordedCall) -> bool:
    """Whether the module is no more than a matrix, however it is made (LoRA): f(2x) - f(x) = f(x) - f(0)."""

    def times(factor: float) -> Tensor:
        return call(seen.module, seen, lambda x, lead: x * factor if x.is_floating_point() else x)[0]

    zero, one, two = times(0), times(1), times(2)
    bar = float((one - zero).abs().max()) * TOLERANCE.get(one.dtype, 5e-2)
    return bool(((two - one) - (one - zero)).abs().max() <= max(bar, 1e-30))
