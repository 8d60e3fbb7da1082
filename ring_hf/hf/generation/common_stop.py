"""The end of `generate` over a shared cache: all ranks stop after the same token.

Ranks choose the same tokens from the same logits, so criteria that read tokens only agree by themselves. Criteria that
may read anything else, a clock above all (`max_time`, or one of the user's own), could stop one rank before another,
which would then wait for it: their decision is that of the first rank, one small broadcast per token.

For that, `generate` of the model is wrapped when a cache is made for it. In `model.generate(ids, past_key_values=
ContextParallelCache(model))` Python has looked `generate` up before, the first time: the first pass then notices that
it was called without the wrapper, and refuses what only the wrapper makes exact.
"""

import inspect
import math
import sys
from dataclasses import dataclass
from types import FrameType, MethodType
from typing import Any

import torch
from transformers.generation import (
    ConfidenceCriteria,
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from ring_hf.parallel import broadcast

from .cache_protocol import cache_of


class FirstRankDecides(StoppingCriteria):
    """A criterion whose decision is that of the first rank.

    Args:
        criterion: evaluated on every rank, so that its own state stays the same.
        group: the registered name of the ranks.
    """

    def __init__(self, criterion: StoppingCriteria, group: str) -> None:
        self._criterion, self._group = criterion, group

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        decision = self._criterion(input_ids, scores, **kwargs)
        decision_B = torch.as_tensor(decision, device=input_ids.device).to(torch.uint8).expand(len(input_ids))
        return broadcast(decision_B, self._group, 0).bool()


AGREED_CRITERIA = {MaxLengthCriteria, StopStringCriteria, EosTokenCriteria, ConfidenceCriteria, FirstRankDecides}


def share_stopping(model: torch.nn.Module) -> None:
    """Let all ranks stop together when `model.generate` is called with a `ContextParallelCache`.

    Raises:
        ValueError: if something else has replaced the method of this model.
    """
    replaced = vars(model).get("generate")
    if replaced is not None and getattr(replaced, "__func__", None) is not generate:
        raise ValueError(
            f"model.generate of this {type(model).__name__} was replaced, and ContextParallelCache has to replace it, "
            "too, so that all ranks stop after the same token. Delete the attribute, or override generate in a class."
        )
    model.generate = MethodType(generate, model)  # type: ignore[assignment]


def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the model's own `generate`, with stopping criteria on which the ranks agree."""
    own = type(self).generate
    cache = cache_of(kwargs)
    if cache is None:
        return own(self, *args, **kwargs)
    bound = inspect.signature(own).bind(self, *args, **kwargs)
    criteria = list(bound.arguments.get("stopping_criteria") or ())
    configs = bound.arguments.get("generation_config"), self.generation_config
    settings = [kwargs.get("max_time"), *(getattr(config, "max_time", None) for config in configs)]
    max_time = next((value for value in settings if value is not None), None)
    if max_time is not None:
        criteria.append(MaxTimeCriteria(max_time))
        bound.arguments["kwargs"] = {**bound.arguments["kwargs"], "max_time": math.inf}
    group = cache.context.group
    shared = [each if type(each) in AGREED_CRITERIA else FirstRankDecides(each, group) for each in criteria]
    if shared:
        bound.arguments["stopping_criteria"] = StoppingCriteriaList(shared)
    return own(*bound.args, **bound.kwargs)


@dataclass(frozen=True)
class GenerateCall:
    """The call of `generate` that a forward pass belongs to.

    Attributes:
        settings: values on which ranks must agree, by their names in an error message.
        error: why ranks might not stop together, or None.
    """

    settings: dict[str, Any]
    error: str | None

    @classmethod
    def of(cls, model: torch.nn.Module) -> "GenerateCall | None":
        """Return the call that is running on this thread, or None if the model was called by other code."""
        code = inspect.unwrap(type(model).generate).__code__  # type: ignore[attr-defined]
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not code:
            frame = frame.f_back
        if frame is None:
            return None
        variables = frame.f_locals
        config, criteria = variables.get("generation_config"), list(variables.get("stopping_criteria") or ())
        names = [type(criterion).__name__ for criterion in criteria if type(criterion) not in AGREED_CRITERIA]
        if getattr(config, "max_time", None) not in (None, math.inf):
            names.insert(0, "max_time")
        settings = {
            "the settings of generate": str(config.to_diff_dict()) if config is not None else "",
            "the stopping criteria": [type(criterion).__name__ for criterion in criteria],
        }
        if not names:
            return cls(settings, None)
        return cls(
            settings,
            f"{', '.join(names)}: ranks could stop at different tokens, as this call of generate began before its "
            "ContextParallelCache was made. Make the cache first: cache = ContextParallelCache(model), then "
            "model.generate(..., past_key_values=cache).",
        )
