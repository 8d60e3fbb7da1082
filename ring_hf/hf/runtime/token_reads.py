"""Does anything around the model look at the tokens of a shard, or at their positions?

A wrapper that searches for a marker in `input_ids`, or counts tokens, finds in a shard what it would not find in the
whole sequence. A trial step on a few tokens cannot prove it right: the marker need not be among them. So reading is an
error by itself. The model's own layers are not watched, nor is moving tensors or asking for their shape.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

WATCHED = ("input_ids", "position_ids")
# Functions that hand on the same values, and those that tell nothing of values.
MOVES = {"to", "cpu", "cuda", "contiguous", "detach", "clone", "pin_memory", "requires_grad_"}
METADATA = {
    *("__get__", "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "get_device"),
    *("__len__", "__hash__", "element_size", "is_floating_point", "is_complex", "data_ptr", "is_pinned"),
}


class TokenReads(TorchFunctionMode):
    """Within, notes the functions of PyTorch that read watched tensors while `inside_model` is False."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.inside_model = False
        self.functions: set[str] = set()
        self._watched = {id(inputs[key]): (key, inputs[key]) for key in WATCHED if key in inputs}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.inside_model:
            return result
        for argument in (*args, *(kwargs or {}).values()):
            key, tensor = self._watched.get(id(argument), ("", None))
            if tensor is None:
                continue
            name = getattr(func, "__name__", "")
            if name in MOVES and isinstance(result, Tensor):
                self._watched[id(result)] = key, result
            elif name not in METADATA:
                self.functions.add(f"{resolve_name(func) or name}({key})")
        return result

    def error(self) -> str | None:
        """Return the message if something was read."""
        if not self.functions:
            return None
        return (
            f"Something around the model looks at the tokens of a shard: {', '.join(sorted(self.functions))}. It "
            "would find something else in the whole sequence. Leave it out, or do it in the dataset or the inner "
            "collator, which see whole sequences."
        )
