"""Perplexity by context length and by position as tables for terminals and Markdown, and as plots."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..text import markdown_table
from .perplexity import LengthResult, position_buckets

# Colours that colour-blind readers can tell apart, in print as well (Okabe and Ito 2008).
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")


def format_table(results: Mapping[str, Sequence[LengthResult]]) -> str:
    """Return perplexities with a row per model and a column per context length, as aligned Markdown.

    Args:
        results: by name of the model.
    """
    return markdown_table(perplexity_rows(results))


def perplexity_rows(results: Mapping[str, Sequence[LengthResult]]) -> list[list[str]]:
    """Return the header and the rows of `format_table`."""
    lengths = sorted({result.length for rows in results.values() for result in rows})
    table = [["held-out perplexity at", *(f"{length:,}" for length in lengths)]]
    for name, rows in results.items():
        by_length = {result.length: f"{result.perplexity:.2f}" for result in rows}
        table.append([name, *(by_length.get(length, "") for length in lengths)])
    return table


def format_positions(results: Mapping[str, Sequence[LengthResult]]) -> str:
    """Return the mean loss in nats by the number of preceding tokens, in each model's longest windows, as Markdown."""
    longest = {name: max(rows, key=lambda result: result.length) for name, rows in results.items()}
    buckets = position_buckets(max(result.length for result in longest.values()))
    table = [
        [
            "loss after so many tokens",
            *(f"{first:,}-{last:,}" if last > first else f"{first}" for first, last in buckets),
        ]
    ]
    for name, result in longest.items():
        losses = [f"{loss:.3f}" for loss in result.position_losses]
        table.append([name, *losses, *[""] * (len(buckets) - len(losses))])
    return markdown_table(table)


def plot_perplexity(
    results: Mapping[str, Sequence[LengthResult]],
    path: str | os.PathLike[str],
    title: str = "Held-out perplexity by context length",
    trained_lengths: Mapping[str, int] | None = None,
) -> None:
    """Draw perplexity over context length, both logarithmic, one line per model.

    Args:
        results: model name -> its measurements, drawn in this order.
        path: file to write; its ending chooses the format.
        title (`str`): heading of the plot.
        trained_lengths (*optional*): name -> context length it was trained at, drawn as a vertical line in the colour
            of that model.
    """
    # Imported here: it takes half a second, and only plotting needs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lengths = sorted({result.length for rows in results.values() for result in rows})
    for i, (name, rows) in enumerate(results.items()):
        colour = COLOURS[i % len(COLOURS)]
        ordered = sorted(rows, key=lambda result: result.length)
        xs, ys = [result.length for result in ordered], [result.perplexity for result in ordered]
        axes.plot(
            xs, ys, color=colour, marker=MARKERS[i % len(MARKERS)], markersize=6, linewidth=2, label=name, zorder=3
        )
        end = f"{ys[-1]:.1f}" if ys[-1] < 100 else f"{ys[-1]:.0f}"
        axes.annotate(end, (xs[-1], ys[-1]), xytext=(8, 0), textcoords="offset points", va="center", color=colour)
        if trained_lengths and name in trained_lengths:
            axes.axvline(trained_lengths[name], color=colour, linestyle=":", linewidth=1.4, zorder=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    steps = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if high / low < 30 else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(which="major", color="#DDDDDD", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.08)
    axes.set_xlabel("context length (tokens)" + ("; dotted: trained at" if trained_lengths else ""))
    axes.set_ylabel("perplexity")
    axes.set_title(title, loc="left", fontsize=12)
    axes.legend(frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def plot_positions(
    results: Mapping[str, LengthResult], path: str | os.PathLike[str], title: str = "Loss by position"
) -> None:
    """Draw the mean loss over the number of preceding tokens (logarithmic), one line per model.

    Args:
        results: model name -> its measurement at the longest length, drawn in this order.
        path: file to write; its ending chooses the format.
        title (`str`): heading of the plot.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    longest = max(result.length for result in results.values())
    for i, (name, result) in enumerate(results.items()):
        middles = [math.sqrt(first * last) for first, last in position_buckets(result.length)]
        axes.plot(
            middles,
            result.position_losses,
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=5,
            linewidth=2,
            label=name,
        )
    ticks = [4**n for n in range(longest.bit_length() // 2 + 1) if 4**n < longest]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(which="major", color="#DDDDDD", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("tokens before the predicted one")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title, loc="left", fontsize=12)
    axes.legend(frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
