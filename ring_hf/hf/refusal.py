"""Raise an error of any rank on every rank, so that no rank waits in a collective for one that has left."""

from typing import Any

from ring_hf.parallel import assert_equal_across_ranks, group_of

from .context import ProcessContext


def raise_on_all_ranks(error: str | None, values: dict[str, Any], context: ProcessContext) -> None:
    """Raise the same ValueError on every rank if any rank has an error, or if values differ within a group.

    A collective call of all processes.

    Args:
        error: message of this rank, or None.
        values: small picklable objects by name, which must be equal on all ranks that share a sequence.
        context: the groups of this process.

    Raises:
        ValueError: with the messages of all ranks that have one, or with the first name whose values differ.
    """
    try:
        assert_equal_across_ranks(values, error, group_of(context.group))
    except ValueError as group_error:
        error = str(group_error)
    if context.num_replicas > 1:
        assert_equal_across_ranks({}, error)
    elif error is not None:
        raise ValueError(error)
