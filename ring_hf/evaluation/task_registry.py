"""Every task of `recipes/evaluate.py` by name: retrieval in prompts, and perplexity of text.

Retrieval tasks are measured by generation over the sharded cache, perplexity by the sharded forward pass of training.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .retrieval_tasks import RETRIEVAL_TASKS


@dataclass(frozen=True)
class EvaluationTask:
    """One task.

    Attributes:
        family: "retrieval" or "perplexity".
        measures: what a result says.
    """

    family: str
    measures: str


TASKS: dict[str, EvaluationTask] = {
    **{name: EvaluationTask("retrieval", task.measures) for name, task in RETRIEVAL_TASKS.items()},
    "perplexity": EvaluationTask("perplexity", "predicts text with so many tokens before it"),
    "perplexity_by_position": EvaluationTask("perplexity", "predicts text better, the more tokens are before it"),
    "short_context": EvaluationTask("perplexity", "predicts short text as well as the model before"),
}


def split_tasks(names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of retrieval and of perplexity tasks, in their order.

    Raises:
        ValueError: if there is no name, or no task of a name.
    """
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        raise ValueError(f"tasks={list(names)}: choose one or more of {', '.join(TASKS)}.")
    retrieval = tuple(name for name in names if TASKS[name].family == "retrieval")
    return retrieval, tuple(name for name in names if TASKS[name].family == "perplexity")
