"""What was simulated, as Markdown that is aligned in a terminal, too."""

from collections.abc import Sequence

from ..text import format_bytes, format_duration, markdown_table
from .simulation import Balance, Row


def layout_table(balances: Sequence[Balance]) -> str:
    """A row per layout: how evenly it deals the work."""
    rows = [[b.layout, f"{b.tokens:,}", f"{b.imbalance:.4f}", f"{b.lockstep:.4f}"] for b in balances]
    return markdown_table([["layout", "tokens, padded", "busiest / mean", "in lockstep"], *rows])


def transport_table(rows: Sequence[Row]) -> str:
    """A row per algorithm: what it sends, what is exposed of that, and how long it takes."""
    head = ["layout", "algorithm", "steps", "sent in a step", "forward", "backward", "exposed forward"]
    head += ["exposed backward", "time", "efficiency", "K/V buffers"]
    table = [head]
    for row in rows:
        sent = [format_bytes(n) for n in (row.sent_in_a_step, row.sent_forward, row.sent_backward)]
        times = [row.exposed_forward, row.exposed_backward, row.forward + row.backward]
        ends = [f"{row.efficiency:.2f}", format_bytes(row.buffers)]
        table.append([row.layout, row.algorithm, f"{row.steps}", *sent, *map(format_duration, times), *ends])
    return markdown_table(table, align="llr")
