"""The picture of a data report: lengths, tokens by source, what choices of `overlong` keep, balance over ranks."""

from io import BytesIO
from pathlib import Path
from typing import Any

from ..simulate.schedule_drawing import COLOURS, save_png
from ..text import format_tokens
from .data_report import DataReport
from .source_spec import OVERLONG

_GREY = "#C9CED6"


def draw_report(report: DataReport, path: Path) -> None:
    """Write the picture of a report to `path`, a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second that only pictures need
    from matplotlib.figure import Figure

    num_sources = len(report.sources)
    figure = Figure(figsize=(12.5, 6.6 + 0.35 * num_sources), dpi=95, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    mask = "attention across documents" if report.attend_across_documents else "documents masked"
    figure.suptitle(
        f"{report.sequences:,} sequences of {format_tokens(report.max_length)} tokens, {report.packing}, {mask}: "
        f"{100 * report.padding:.1f} % padding, {100 * report.targets / report.tokens:.1f} % of tokens have a loss",
        fontsize=12,
    )
    panels = figure.subplots(2, 2, width_ratios=(1.25, 1))
    _draw_lengths(panels[0][0], report)
    _draw_sources(panels[0][1], report)
    _draw_overlong(panels[1][0], report)
    _draw_balance(panels[1][1], report)
    buffer = BytesIO()
    canvas.print_png(buffer)
    save_png(buffer, path)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _style(axes: Any, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9)


def _draw_lengths(axes: Any, report: DataReport) -> None:
    """Tokens by length of their document, stacked by source."""
    lengths = sorted({bucket.least for source in report.sources for bucket in source.histogram})
    total = sum(source.tokens for source in report.sources)
    bottom = [0.0] * len(lengths)
    for number, source in enumerate(report.sources):
        tokens = {bucket.least: bucket.tokens for bucket in source.histogram}
        heights = [100 * tokens.get(least, 0) / total for least in lengths]
        axes.bar(range(len(lengths)), heights, bottom=bottom, color=_colour(number), width=0.85, label=source.name)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    limit = next((n for n, least in enumerate(lengths) if 2 * least > report.max_length), None)
    if limit is not None:  # the bar that holds max_length: the line divides it where the length does
        within = (report.max_length - lengths[limit]) / lengths[limit]
        axes.axvline(limit - 0.5 + within, color="#333333", linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"max_length {format_tokens(report.max_length)}",
            (limit - 0.5 + within, 1),
            (4, -2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="top",
            fontsize=8.5,
            color="#333333",
        )
    axes.set_xticks(range(len(lengths)), [format_tokens(least) for least in lengths])
    axes.set_ylim(0, 1.18 * max(bottom))
    axes.set_xlabel("tokens of a document, from", fontsize=9)
    axes.set_ylabel("% of all tokens", fontsize=9)
    axes.set_title("lengths of documents, as they are read", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")
    _style(axes, "y")


def _draw_sources(axes: Any, report: DataReport) -> None:
    """Tokens that each source holds, and those that are trained on."""
    rows = range(len(report.sources))
    largest = max(max(source.trained_tokens, source.tokens) for source in report.sources)
    size, unit = next(
        ((s, u) for s, u in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")) if largest >= s), (1, "")
    )
    axes.barh(rows, [source.tokens / size for source in report.sources], color=_GREY, height=0.8)
    axes.barh(
        rows,
        [source.trained_tokens / size for source in report.sources],
        color=[_colour(number) for number in rows],
        height=0.42,
    )
    for row, source in enumerate(report.sources):
        text = f"{100 * source.share:.1f} %, {source.epochs:.2f} epochs"
        axes.text(
            (max(source.trained_tokens, source.tokens) + 0.02 * largest) / size, row, text, va="center", fontsize=8.5
        )
    axes.set_yticks(list(rows), [source.name for source in report.sources])
    axes.set_ylim(len(report.sources) - 0.4, -0.6)
    axes.set_xlim(0, 1.42 * largest / size)
    axes.set_xlabel(f"{unit} tokens; grey: the source holds, coloured: the run reads".strip(), fontsize=9)
    axes.set_title("tokens by source, share of training", loc="left", fontsize=11)
    _style(axes, "x")


def _draw_overlong(axes: Any, report: DataReport) -> None:
    """Share of the tokens of each source that each choice keeps, the rest grey."""
    labels = []
    for number, source in enumerate(report.sources):
        for offset, choice in enumerate(OVERLONG):
            row = number * (len(OVERLONG) + 0.6) + offset
            kept = 100 * source.outcomes[choice].kept_tokens / source.tokens
            chosen = choice == source.overlong
            axes.barh(row, 100, color="#ECEEF1", height=0.82)
            axes.barh(row, kept, color=_colour(number), alpha=1.0 if chosen else 0.35, height=0.82)
            axes.text(101, row, f"{kept:.1f} %", va="center", fontsize=8.5)
            labels.append((row, f"{source.name}: {choice}" if offset == 0 else choice))
    axes.set_yticks([row for row, _ in labels], [text for _, text in labels])
    axes.invert_yaxis()
    axes.set_xlim(0, 112)
    axes.set_xlabel("% of the source's tokens kept; strong colour: this run's choice", fontsize=9)
    axes.set_title("documents that are too long: cut, drop or truncate", loc="left", fontsize=11)
    _style(axes, "x")


def _draw_balance(axes: Any, report: DataReport) -> None:
    """Busiest rank over the mean, by layout."""
    axes.set_title(f"work over {report.context_parallel_size} ranks", loc="left", fontsize=11)
    if not report.balance:
        axes.text(0.5, 0.5, "one rank holds each sequence", ha="center", va="center", fontsize=10, color="#555555")
        axes.set_axis_off()
        return
    rows = range(len(report.balance))
    axes.bar(rows, [row.worst for row in report.balance], color=_GREY, width=0.8, label="worst sequence")
    axes.bar(rows, [row.mean for row in report.balance], color="#5B6573", width=0.45, label="mean")
    for number, row in enumerate(report.balance):
        axes.text(number, row.worst, f"{row.worst:.2f}", ha="center", va="bottom", fontsize=8.5)
        axes.text(number, 0.5, f"{row.mean:.2f}", ha="center", va="center", fontsize=8.5, color="white")
    axes.axhline(1.0, color="#333333", linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xticks(list(rows), [row.layout for row in report.balance])
    axes.set_ylim(0, 1.25 * max(row.worst for row in report.balance))
    axes.set_ylabel("busiest rank / mean", fontsize=9)
    axes.legend(frameon=False, fontsize=8.5, ncols=2, loc="upper right")
    _style(axes, "y")
