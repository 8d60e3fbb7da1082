"""Raise an error of any rank on every rank, so that no rank waits in a collective for one that has left.

`record_refusals` is for a comparison that runs although a rule about models refuses the training: it is only after a
comparison that one can name the layer and the tokens at which a model differs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
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


_recorded: list[str] | None = None


@contextmanager
def record_refusals() -> Iterator[list[str]]:
    """Inside, the rules about models record their messages in the list that is yielded, and refuse nothing."""
    global _recorded
    previous, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = previous


def unless_recorded(message: str | None) -> str | None:
    """Return the message of a rule about models, or None inside `record_refusals`, which keeps each message once."""
    if _recorded is None or message is None:
        return message
    if message not in _recorded:
        _recorded.append(message)
    return None
