"""Simulation results as Markdown tables that are also aligned in a terminal."""

from collections.abc import Sequence

from ..text import format_bytes, format_duration, markdown_table
from .simulation import AlgorithmCost, Balance


def layout_table(balances: Sequence[Balance]) -> str:
    """One row per layout: how evenly it distributes the work."""
    rows = [["layout", "tokens, padded", "busiest / mean", "in lockstep"]]
    rows += [[b.layout, f"{b.tokens:,}", f"{b.imbalance:.4f}", f"{b.lockstep:.4f}"] for b in balances]
    return markdown_table(rows)


def transport_table(costs: Sequence[AlgorithmCost]) -> str:
    """One row per algorithm: bytes sent, exposed communication, time."""
    head = ["layout", "algorithm", "steps", "sent in a step", "forward", "backward", "exposed forward"]
    head += ["exposed backward", "time", "efficiency", "K/V buffers"]
    rows = [head]
    for cost in costs:
        num_bytes = (cost.sent_in_a_step, cost.sent_forward, cost.sent_backward)
        seconds = (cost.exposed_forward, cost.exposed_backward, cost.forward + cost.backward)
        row = [cost.layout, cost.algorithm, f"{cost.steps}", *map(format_bytes, num_bytes)]
        rows.append([*row, *map(format_duration, seconds), f"{cost.efficiency:.2f}", format_bytes(cost.buffers)])
    return markdown_table(rows, align="llr")
