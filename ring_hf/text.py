"""Text for people: numbers with units, Markdown tables, wrapped lines, sizes as typed on a command line.

A ground module: every part of the package may import it, and it imports none of them.
"""

import argparse
import textwrap
from collections.abc import Sequence

_SIZE_SUFFIXES = {"K": 2**10, "M": 2**20, "G": 2**30}
_PROSE_WIDTH = 116  # columns


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions and examples, and wraps at 110 columns instead of 80."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=110)


def format_bytes(num_bytes: float) -> str:
    """Return bytes with a decimal unit: `"940 MB"`."""
    return _with_unit(num_bytes, "B", ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def format_duration(seconds: float) -> str:
    """Return seconds with a unit: `"29.4 ms"`."""
    return _with_unit(1e6 * seconds, "us", ("s", 1e6), ("ms", 1e3))


def _with_unit(number: float, smallest_unit: str, *units: tuple[str, float]) -> str:
    unit, size = next(((unit, size) for unit, size in units if number >= size), (smallest_unit, 1.0))
    return f"{number / size:.0f} {unit}" if number >= 999.5 * size else f"{number / size:.3g} {unit}"


def format_tokens(num_tokens: float, exact: bool = False) -> str:
    """Return a number of tokens with a binary suffix: `"1M"`, `"96K"`, `"1.49M"`.

    Args:
        exact: use a suffix only if it divides the number, and write all digits otherwise: `"12,345"`.
    """
    for suffix in ("M", "K"):
        size = _SIZE_SUFFIXES[suffix]
        if num_tokens >= size and num_tokens % size == 0:
            return f"{num_tokens / size:.0f}{suffix}"
        if num_tokens >= size and not exact:
            return f"{num_tokens / size:.3g}{suffix}"
    return f"{num_tokens:,.0f}"


def parse_size(text: str) -> int:
    """Return `"4096"`, `"64K"` (65,536) or `"1M"` (1,048,576) as a number of tokens.

    Raises:
        ValueError: if the text is not a whole number of at least 1 with an optional suffix.
    """
    suffix = text[-1:].upper()
    number, unit = (text[:-1], _SIZE_SUFFIXES[suffix]) if suffix in _SIZE_SUFFIXES else (text, 1)
    try:
        size = float(number) * unit
    except ValueError:
        size = -1.0
    if size < 1 or size != int(size):
        raise ValueError(f"{text!r} is not a number of tokens. Write 4096, 64K (65,536) or 1M (1,048,576).")
    return int(size)


def parse_sizes(text: str) -> tuple[int, ...]:
    """Return a comma-separated list of sizes; unlike in `parse_size`, a size may be 0.

    Raises:
        ValueError: if one of them is not a size.
    """
    return tuple(0 if part.strip() == "0" else parse_size(part.strip()) for part in text.split(","))


def wrap_prose(text: str) -> str:
    """Return the text in lines that fit a terminal; all but the first are indented."""
    return textwrap.fill(text, _PROSE_WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return one indented line per row, with columns two spaces apart and as wide as their longest cell."""
    widths = _column_widths(rows)
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def markdown_table(rows: Sequence[Sequence[str]], align: str = "lr", padded: bool = True) -> str:
    """Return a Markdown table.

    Args:
        rows: cells by row, the heading first.
        align: `l` or `r` per column; the last letter also holds for all further columns.
        padded: pad cells to the width of their column, which keeps the table readable in a terminal. Turn it off where
            cells are longer than a terminal line.
    """
    widths = _column_widths(rows) if padded else [0] * len(rows[0])
    is_left = [letter == "l" for letter in align.ljust(len(widths), align[-1])]

    def line(row: Sequence[str]) -> str:
        columns = zip(row, widths, is_left, strict=True)
        cells = [cell.ljust(width) if left else cell.rjust(width) for cell, width, left in columns]
        return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)

    if padded:
        rule = [
            " " + ("-" * n if left else "-" * (n - 1) + ":") + " " for n, left in zip(widths, is_left, strict=True)
        ]
    else:
        rule = ["---" if left else "---:" for left in is_left]
    return "\n".join((line(rows[0]), f"|{'|'.join(rule)}|", *map(line, rows[1:])))


def _column_widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]
