"""Pictures of runs: loss over tokens, and perplexity by context length."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the backend is chosen
from matplotlib.ticker import EngFormatter


def plot_run(rows: list[dict[str, Any]], perplexities: list[dict[str, Any]], path: Path) -> None:
    """Draw the loss of a run over its tokens and, if measured, perplexity by context length."""
    series = {"held-out": perplexities} if perplexities else {}
    plot_stages([{"name": "", "rows": rows}], series, path)


def plot_stages(stages: list[dict[str, Any]], perplexities: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the loss of all stages over the tokens of all, and perplexity by context length for each measurement.

    Args:
        stages: of each, `name` and the `rows` of its log, whose tokens start at 0.
        perplexities: by name, the rows of a perplexity.json.
    """
    columns = 2 if perplexities else 1
    figure, axes = plt.subplots(1, columns, figsize=(6.4 * columns, 4.2), layout="constrained", squeeze=False)
    left, start = axes[0][0], 0
    for index, stage in enumerate(stages):
        training = [row for row in stage["rows"] if "loss" in row]
        tokens = [start + row["tokens"] for row in training]
        left.plot(tokens, [row["loss"] for row in training], color=f"C{index}", linewidth=1.2, label=stage["name"])
        evaluations = [(start + row["tokens"], row[key]) for row in stage["rows"] for key in _heldout_keys(row)]
        left.plot(*zip(*evaluations, strict=True), "o", color=f"C{index}", markersize=4) if evaluations else None
        start = tokens[-1] if tokens else start
        if index + 1 < len(stages):
            left.axvline(start, color="0.6", linewidth=0.8, linestyle="--")
    has_evaluations = any(_heldout_keys(row) for stage in stages for row in stage["rows"])
    label = "training loss" + " (dots: held-out)" * has_evaluations
    left.set(xlabel="tokens", ylabel=label, title="Loss")
    left.xaxis.set_major_formatter(EngFormatter(sep=""))
    if any(stage["name"] for stage in stages):
        left.legend(frameon=False)
    if perplexities:
        plot_perplexities(axes[0][1], perplexities)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_perplexities(axes: Any, perplexities: dict[str, list[dict[str, Any]]]) -> None:
    """Draw perplexity by context length on doubly logarithmic axes; `before` is grey, the others as their stages."""
    lengths = sorted({row["length"] for rows in perplexities.values() for row in rows})
    colour = 0
    for name, rows in perplexities.items():
        is_base = name == "before"
        points = [row["length"] for row in rows], [row["perplexity"] for row in rows]
        axes.plot(*points, "o-", color="0.45" if is_base else f"C{colour}", label=name, markersize=4)
        colour += not is_base
    axes.set(xscale="log", yscale="log", xlabel="context length", ylabel="held-out perplexity", title="Perplexity")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    values = [row["perplexity"] for rows in perplexities.values() for row in rows]
    axes.set_yticks(_round_ticks(min(values), max(values)), minor=False)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False)


def _round_ticks(low: float, high: float) -> list[float]:
    """Return 1, 1.5, 2, 3, 5, 7 times powers of ten from just below `low` to just above `high`."""
    values = [factor * 10.0**power for power in range(-2, 12) for factor in (1, 1.5, 2, 3, 5, 7)]
    inside = [index for index, value in enumerate(values) if low <= value <= high]
    first, last = (inside[0], inside[-1]) if inside else (next(i for i, v in enumerate(values) if v > high),) * 2
    return values[max(0, first - 1) : last + 2]


def _heldout_keys(row: dict[str, Any]) -> list[str]:
    return [key for key in ("eval_loss", "eval_heldout_loss") if key in row]
