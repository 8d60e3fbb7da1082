"""Raise on every rank what is wrong on any, so that none waits in an exchange for one that left."""

from typing import Any

from ring_hf.parallel import assert_equal_across_ranks, group_of

from .context import ProcessContext


def raise_on_all_ranks(error: str | None, facts: dict[str, Any], context: ProcessContext) -> None:
    """Raise one ValueError on every rank if any rank has an error, or the ranks of a group disagree about the facts.

    A collective call of all processes.
    """
    try:
        assert_equal_across_ranks(facts, error, group_of(context.group))
    except ValueError as refusal:
        error = str(refusal)
    if context.num_replicas > 1:
        assert_equal_across_ranks({}, error)
    elif error is not None:
        raise ValueError(error)
