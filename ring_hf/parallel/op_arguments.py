"""Everything about one attention call that is not a tensor, and its text form: what an operator schema can carry."""

import functools
import json
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..geometry import Mask, ShardedSequence


@dataclass(frozen=True)
class Call:
    """The settings of one call of the operator; `transport` is resolved, `group` a registered name or empty."""

    sequence: ShardedSequence
    mask: Mask
    scale: float
    softcap: float | None
    group: str
    kernel: str
    transport: str
    inner: int
    overlap: bool
    head_chunks: int = 1


@torch.compiler.disable
@functools.lru_cache(maxsize=32)
def encode(call: Call) -> str:
    """The call as JSON, cached: a layer pays for a hash."""
    return json.dumps(asdict(call))


@functools.lru_cache(maxsize=32)
def decode(text: str) -> Call:
    """Inverse of `encode`, cached."""
    fields: dict[str, Any] = json.loads(text)
    sequence = {name: _tuples(value) for name, value in fields["sequence"].items()}
    return Call(**{**fields, "sequence": ShardedSequence(**sequence), "mask": Mask(**fields["mask"])})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
