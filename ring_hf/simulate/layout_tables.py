"""What was simulated, as Markdown that is aligned in a terminal, too."""

from collections.abc import Sequence

from ..costmodel.pass_cost import amount, duration
from .simulation import Balance, Row


def layout_table(balances: Sequence[Balance]) -> str:
    """A row per layout: how evenly it deals the work."""
    rows = [[b.layout, f"{b.tokens:,}", f"{b.imbalance:.4f}", f"{b.lockstep:.4f}"] for b in balances]
    return markdown([["layout", "tokens, padded", "busiest / mean", "in lockstep"], *rows])


def transport_table(rows: Sequence[Row]) -> str:
    """A row per algorithm: what it sends, what is exposed of that, and how long it takes."""
    head = ["layout", "algorithm", "steps", "sent in a step", "forward", "backward", "exposed forward"]
    head += ["exposed backward", "time", "efficiency", "K/V buffers"]
    table = [head]
    for row in rows:
        sent = [amount(n) for n in (row.sent_in_a_step, row.sent_forward, row.sent_backward)]
        times = [row.exposed_forward, row.exposed_backward, row.forward + row.backward]
        ends = [f"{row.efficiency:.2f}", amount(row.buffers)]
        table.append([row.layout, row.algorithm, f"{row.steps}", *sent, *map(duration, times), *ends])
    return markdown(table, left=2)


def markdown(table: list[list[str]], left: int = 1) -> str:
    """Rows, the first of them the heading, with the first `left` columns set to the left."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]

    def line(row: list[str]) -> str:
        sized = enumerate(zip(row, widths, strict=True))
        cells = (cell.ljust(width) if i < left else cell.rjust(width) for i, (cell, width) in sized)
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join((line(table[0]), line(rule), *map(line, table[1:])))
