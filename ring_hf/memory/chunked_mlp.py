"""Feed-forward modules over blocks of tokens: their forward is replaced on the instance, and calls itself per block.

Which modules those are, `mlp_lookup.py` says.

Letters: B rows, S tokens of a row, T = B * S.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .chunked import in_blocks
from .mlp_classes import MlpSpec
from .mlp_lookup import DROPOUT_ERROR, Mlp, argument_names, num_weights
from .sharded_weights import gather_as_unit, refuse_shards
from .token_wise import RecordedCall, flat, record_calls, values_above_zero

SETTINGS = "_ring_hf_ffn"
SMALLEST = 1024  # tokens of an automatic block: below, matrices are too small to be fast


def automatic_blocks(model: Any, mlps: list[Mlp]) -> dict[str, int]:
    """Return the tokens of a block for each module, by name, from one pass of a few tokens through the model."""
    modules = {mlp.module for mlp in mlps}
    calls = record_calls(model, modules.__contains__)
    return dict.fromkeys((mlp.name for mlp in mlps), SMALLEST) | {call.name: automatic_block(call) for call in calls}


def automatic_block(call: RecordedCall) -> int:
    """Return the number of tokens whose activations are about as large as the weights of a module.

    Smaller blocks would not lower the peak, but cost time. (ALST's tiled MLP, arXiv 2506.13996, takes one tile per
    hidden size tokens, which is the same for a dense layer.)
    """
    num_saved: list[int] = []
    weights = {w.untyped_storage().data_ptr() for w in call.module.parameters()}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            num_saved.append(x.numel())
        return x

    leaves, kwargs = torch.utils._pytree.tree_map_only(
        Tensor,
        lambda x: x.detach().requires_grad_() if x.is_floating_point() else x,
        (call.args, call.kwargs),
    )
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call.module(*leaves, **kwargs)
    assert call.axes is not None
    num_leading = next(num for num in (*call.axes.args, *dict(call.axes.kwargs).values()) if num)
    per_token = max(sum(num_saved) // flat(call.first_tokens(), num_leading).shape[0], 1)
    return max(SMALLEST, num_weights(call.module) // per_token)


def wrap(mlp: Mlp, block: int) -> None:
    """Compute a module over blocks from now on.

    Its forward stays an attribute of the instance alone, so that checkpoints, names and copies of the model are as
    before.

    Args:
        block: tokens at a time.
    """
    mlp.module.__dict__[SETTINGS] = (mlp.spec, argument_names(mlp.module), block)
    if mlp.spec.is_called_once:  # ZeRO-3 reduces the gradients of a leaf after its first backward pass
        gather_as_unit(mlp.module)
    mlp.module.forward = MethodType(_forward, mlp.module)
    mlp.module.register_forward_pre_hook(refuse_changed)


def refuse_changed(module: nn.Module, args: tuple) -> None:
    """Raise if a module was changed after `wrap`, as Liger (its forward) and PEFT (its insides) do. A hook.

    Raises:
        ValueError: if its forward was replaced, or if something inside drops values or changes for one pass only.
    """
    name = type(module).__name__
    if getattr(module.forward, "__func__", None) is not _forward:
        raise ValueError(
            f"The forward pass of {name} was replaced since memory.apply, so that ffn_block would be ignored. Leave "
            "the replacement (such as use_liger_kernel) out, or set ffn_block=None."
        )
    dropout = next(values_above_zero(module, "drop"), None) if module.training else None
    if dropout is not None:
        raise ValueError(DROPOUT_ERROR.format(f"{name}.{dropout}"))
    for inner in module.modules():
        if is_parametrized(inner) or (inner is not module and inner._forward_pre_hooks_with_kwargs):
            raise ValueError(
                f"{type(inner).__name__} in {name} is changed for this pass alone (a parametrization or a hook, as "
                "PEFT sets for target_parameters, alora_invocation_tokens and adapter_names), which the backward pass "
                "in blocks would not see. Call memory.apply after get_peft_model for target_parameters, or set "
                "ffn_block=None."
            )


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    spec: MlpSpec
    spec, names, block = self.__dict__[SETTINGS]
    own_forward = type(self).forward
    given = _by_key(args, kwargs)
    num_leading = _leading_dims(spec, names, given)
    tensors = [flat(given[key], num) for key, num in num_leading.items()]
    num_tokens = {x.shape[0] for x in tensors}
    if len(num_tokens) != 1 or max(num_tokens) <= block:
        return own_forward(self, *args, **kwargs)

    refuse_shards(self)
    # Not the tensors themselves: the graph keeps this function, and would keep them alive.
    others = {key: None if key in num_leading else value for key, value in given.items()}
    num_args = len(args)
    result_leading: list[int] = []

    def compute_block(*blocks: Tensor) -> tuple[Tensor, ...]:
        pairs = zip(num_leading.items(), blocks, strict=True)
        values = others | {key: x[None] if num == 2 else x for (key, num), x in pairs}
        keywords = {key: value for key, value in values.items() if isinstance(key, str)}
        results = own_forward(self, *(values[n] for n in range(num_args)), **keywords)
        results = results if spec.returns_tuple else (results,)
        result_leading[:] = [x.ndim - num for x, num in zip(results, spec.result_dims, strict=True)]
        return tuple(flat(x, num) for x, num in zip(results, result_leading, strict=True))

    trained = [p for p in self.parameters() if p.requires_grad]
    flat_results = in_blocks(compute_block, tensors, trained, block)
    batch_shape = next((given[key].shape[:2] for key, num in num_leading.items() if num == 2), None)
    results = tuple(
        x.unflatten(0, batch_shape) if num == 2 and batch_shape is not None else x
        for x, num in zip(flat_results, result_leading, strict=True)
    )
    return results if spec.returns_tuple else results[0]


def _by_key(args: tuple, kwargs: dict[str, Any]) -> dict[int | str, Any]:
    """Return the arguments of a call by their position, and by name those that are given so."""
    keys: list[int | str] = [*range(len(args)), *kwargs]
    return dict(zip(keys, (*args, *kwargs.values()), strict=True))


def _leading_dims(spec: MlpSpec, names: list[str], given: dict[int | str, Any]) -> dict[int | str, int]:
    """Return how many leading dims of each argument hold tokens (1 or 2); empty if the call is an unusual one."""
    num_leading: dict[int | str, int] = {}
    for key, value in given.items():
        name = key if isinstance(key, str) else names[key] if key < len(names) else ""
        if isinstance(value, Tensor) and name in spec.token_dims:
            num_leading[key] = value.ndim - spec.token_dims[name]
        elif isinstance(value, Tensor) and value.numel() > 1:
            return {}
    return num_leading if set(num_leading.values()) <= {1, 2} else {}
