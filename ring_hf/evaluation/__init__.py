"""Held-out perplexity by context length, in one process, for any causal language model: as a table and as a plot."""

from .perplexity import LengthResult, evaluation_windows, perplexity_by_length, position_buckets
from .perplexity_report import format_positions, format_table, plot_perplexity

__all__ = [
    "LengthResult",
    "evaluation_windows",
    "format_positions",
    "format_table",
    "perplexity_by_length",
    "plot_perplexity",
    "position_buckets",
]
