"""Everything about one attention call that is not a tensor, and its text form: what an operator schema can carry."""

import functools
import json
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..geometry import AttentionSpec, RingOptions, ShardedSequence


@dataclass(frozen=True)
class AttentionOpArgs:
    """The arguments of one call of the operator.

    Attributes:
        sequence: the whole batch as all ranks see it.
        spec: the maths; `scale` is a number here.
        options: the algorithm; `transport` is resolved here.
        group: the registered name of the group that shares the sequence; empty with one rank.
    """

    sequence: ShardedSequence
    spec: AttentionSpec
    options: RingOptions
    group: str


@torch.compiler.disable
@functools.lru_cache(maxsize=32)
def to_json(args: AttentionOpArgs) -> str:
    """Return the arguments as JSON. Cached, so that a layer pays for a hash only."""
    return json.dumps(asdict(args))


@functools.lru_cache(maxsize=32)
def from_json(text: str) -> AttentionOpArgs:
    """Return the arguments that `to_json` wrote. Cached."""
    fields: dict[str, Any] = json.loads(text)
    sequence = {name: _tuples(value) for name, value in fields["sequence"].items()}
    spec, options = AttentionSpec(**fields["spec"]), RingOptions(**fields["options"])
    return AttentionOpArgs(ShardedSequence(**sequence), spec, options, fields["group"])


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
