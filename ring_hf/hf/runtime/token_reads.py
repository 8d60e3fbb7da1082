"""Detect code around the model that reads the tokens of a shard or their positions.

A wrapper that searches for a marker in `input_ids`, or counts tokens, gets another result on a shard than on the whole
sequence. A trial step on a few tokens cannot prove it exact, because the marker may not be among them. So reading is
an error by itself. The layers of the model may read, and any code may move a tensor or ask for its shape.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

WATCHED_INPUTS = ("input_ids", "position_ids")
# Functions that return the same values, whose result is watched as well; and functions that depend on no value.
COPIES = {"to", "cpu", "cuda", "contiguous", "detach", "clone", "pin_memory", "requires_grad_"}
METADATA = {
    *("__get__", "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "get_device"),
    *("__len__", "__hash__", "element_size", "is_floating_point", "is_complex", "data_ptr", "is_pinned"),
}


class TokenReadRecorder(TorchFunctionMode):
    """Context that records which PyTorch functions read watched inputs while `inside_model` is False.

    Attributes:
        inside_model: whether the model's forward pass runs, whose reads are not recorded.
        functions: names of the functions that read, each with the input that it read.
    """

    def __init__(self, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.inside_model = False
        self.functions: set[str] = set()
        self._watched = {id(inputs[key]): (key, inputs[key]) for key in WATCHED_INPUTS if key in inputs}

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
            if name in COPIES and isinstance(result, Tensor):
                self._watched[id(result)] = key, result
            elif name not in METADATA:
                self.functions.add(f"{resolve_name(func) or name}({key})")
        return result

    def check(self) -> str | None:
        """Return an error message if something was read, else None."""
        if not self.functions:
            return None
        return (
            f"Code around the model reads the tokens of a shard: {', '.join(sorted(self.functions))}. The whole "
            "sequence may give another result. Remove this code, or move it to the dataset or the inner collator, "
            "which see whole sequences."
        )
