"""Batches and budgets in tokens: how many micro-batches make an optimizer step, and how many steps a budget.

Tokens are those of full sequences, s * sequences, as published recipes count them. Lengths and batches have binary
suffixes (4M is 4 * 2**20, a whole number of sequences), budgets decimal ones (4.8B is 4.8 * 10**9).
"""

import math
from dataclasses import dataclass

from ring_hf.text import parse_size

_DECIMAL = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Batch:
    """An optimizer step: `accumulation` micro-batches of `rows` sequences on each of `replicas`."""

    max_length: int
    rows: int
    replicas: int
    accumulation: int

    @property
    def num_tokens(self) -> int:
        return self.max_length * self.rows * self.replicas * self.accumulation


def count_replicas(num_processes: int, context_parallel_size: int) -> int:
    """Return the number of groups of processes that read different sequences.

    Raises:
        ValueError: if the processes cannot be divided into such groups.
    """
    if num_processes % context_parallel_size:
        raise ValueError(
            f"context_parallel_size={context_parallel_size} does not divide {num_processes} processes. Set it to a "
            f"divisor, or start {context_parallel_size} or {2 * context_parallel_size} processes."
        )
    return num_processes // context_parallel_size


def make_batch(
    tokens_per_batch: str | int | None, max_length: int, rows: int, replicas: int, accumulation: int
) -> Batch:
    """Return the batch of an optimizer step.

    Args:
        tokens_per_batch: for the whole step; None keeps `accumulation`.
        max_length (`int`): tokens of a sequence.
        rows (`int`): sequences of a micro-batch on one replica.
        replicas (`int`): groups of processes that read different sequences.
        accumulation (`int`): micro-batches, if `tokens_per_batch` is None.

    Raises:
        ValueError: if no whole number of micro-batches has that many tokens.
    """
    if tokens_per_batch is None:
        return Batch(max_length, rows, replicas, accumulation)
    num_tokens = parse_size(str(tokens_per_batch))
    step = max_length * rows * replicas
    if num_tokens % step:
        lower = num_tokens // step * step
        choices = " or ".join(f"{number:,}" for number in (lower, lower + step) if number)
        raise ValueError(
            f"tokens_per_batch={tokens_per_batch} ({num_tokens:,} tokens) is no multiple of the {step:,} tokens of "
            f"max_length={max_length} * per_device_train_batch_size={rows} * {replicas} data-parallel replicas. Set "
            f"it to {choices}."
        )
    return Batch(max_length, rows, replicas, num_tokens // step)


def parse_budget(text: str | int | float) -> int:
    """Return "4.8B" as 4,800,000,000 tokens.

    Raises:
        ValueError: if it is not a positive number with an optional suffix.
    """
    number, unit = str(text).strip(), 1
    if number[-1:].upper() in _DECIMAL:
        number, unit = number[:-1], _DECIMAL[number[-1:].upper()]
    try:
        num_tokens = float(number) * unit
    except ValueError:
        num_tokens = 0.0
    if not 1 <= num_tokens < math.inf:
        raise ValueError(f"{text!r} is not a number of tokens. Write 4800000000, 4.8B, 500M or 100K (decimal).")
    return round(num_tokens)


def count_steps(max_tokens: str | int | float, batch: Batch) -> int:
    """Return the optimizer steps that see at least `max_tokens`."""
    return math.ceil(parse_budget(max_tokens) / batch.num_tokens)
