"""Pictures of plans: memory and time of a job, the cost of length, and predictions of published runs."""

from io import BytesIO
from pathlib import Path
from typing import Any

from ..costmodel.devices import GIB
from ..simulate.schedule_drawing import COLOURS, save_png
from ..text import format_tokens
from .engine_bytes import select_engine
from .paper_tables import APPENDIX_D, APPENDIX_D_LENGTHS, appendix_d_ratio
from .published import TOLERANCE, compare_runs
from .training_plan import TrainingPlan


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # Imported here because it takes half a second, which only pictures need.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=95, layout="constrained")
    return figure, FigureCanvasAgg(figure)


def _write(canvas: Any, path: Path) -> None:
    buffer = BytesIO()
    canvas.print_png(buffer)
    save_png(buffer, path)


def _style_axes(axes: Any) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9)


def _bars(axes: Any, names: list[str], values: list[float], colours: list[str], unit: str, total: float) -> None:
    rows = range(len(names))
    axes.barh(rows, values, color=colours, height=0.68)
    axes.set_yticks(list(rows), names)
    axes.invert_yaxis()
    largest = max(max(values), 1e-9)
    for row, value in zip(rows, values, strict=True):
        label = f"{value:.3g} {unit}" + (f" ({100 * value / total:.0f} %)" if total else "")
        axes.text(value + 0.012 * largest, row, label, va="center", fontsize=8.5, color="#333333")
    axes.set_xlim(0, 1.3 * largest)
    _style_axes(axes)


def draw_plan(plan: TrainingPlan, path: Path) -> None:
    """Draw the memory of a rank by item on the left, the time of a step by part on the right."""
    figure, canvas = _figure(12.5, 5.2)
    job, memory, times = plan.job, plan.memory, plan.times
    figure.suptitle(
        f"{job.model.name}, {format_tokens(job.length)} tokens on {job.devices} x {job.device_spec.name}, "
        f"ring {job.ring} x ulysses {job.ulysses}, {select_engine(job).name}, checkpoint {job.checkpoint}",
        fontsize=12,
    )
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    items = [item for item in memory.items if not item.on_host and item.phase in ("", memory.peak_phase)]
    names = [item.name for item in items] + ["overhead: runtime, fragmentation"]
    values = [item.num_bytes / GIB for item in items] + [memory.overhead / GIB]
    colours = [COLOURS[1] if item.phase else COLOURS[0] for item in items] + ["#9AA3AE"]
    _bars(left, names, values, colours, "GiB", 0.0)
    verdict = "fits" if plan.fits else "does not fit"
    left.set_title(
        f"memory: {memory.total / GIB:.1f} of {plan.memory_budget / GIB:.1f} GiB, {verdict}", loc="left", fontsize=11
    )
    left.set_xlabel(f"GiB; blue: all phases, orange: {memory.peak_phase}", fontsize=9)
    parts = [part for part in times.parts if part.seconds > 0]
    _bars(right, [p.name for p in parts], [p.seconds for p in parts], [COLOURS[2]] * len(parts), "s", times.step)
    right.set_title(f"step: {times.step:,.1f} s, causal MFU {100 * times.mfu:.1f} %", loc="left", fontsize=11)
    right.set_xlabel(f"seconds; {times.tokens_per_device:,.0f} tokens/s per device", fontsize=9)
    _write(canvas, path)


def draw_appendix_d(path: Path) -> None:
    """Draw heat maps of the cost of length, without and with a causal mask."""
    from matplotlib.colors import LogNorm

    figure, canvas = _figure(12.5, 6.4)
    figure.suptitle("FLOPs of a token, relative to a context of 4K", fontsize=12)
    names = list(APPENDIX_D)
    image = None
    panels = figure.subplots(2, 1)
    for axes, causal in zip(panels, (False, True), strict=True):
        ratios = [[appendix_d_ratio(h, s, causal) for s in APPENDIX_D_LENGTHS] for h in APPENDIX_D.values()]
        image = axes.imshow(ratios, cmap="viridis", norm=LogNorm(1, 5000), aspect="auto")
        axes.set_xticks(range(len(APPENDIX_D_LENGTHS)), [format_tokens(s) for s in APPENDIX_D_LENGTHS], fontsize=9)
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.tick_params(length=0)
        axes.set_ylabel("parameters", fontsize=10)
        title = "with a causal mask" if causal else "without a causal mask (Ring Attention, appendix D)"
        axes.set_title(title, loc="left", fontsize=10)
        for row, values in enumerate(ratios):
            for column, value in enumerate(values):
                text = f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
                axes.text(
                    column,
                    row,
                    text,
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    color="white" if value < 250 else "black",
                )
    panels[1].set_xlabel("context length, tokens", fontsize=10)
    figure.colorbar(image, ax=panels, label="times the cost at 4K", pad=0.01)
    _write(canvas, path)


def draw_published(path: Path) -> None:
    """Draw the relative error of every prediction of a published run."""
    comparisons = list(compare_runs())
    figure, canvas = _figure(9.6, 0.8 + 0.17 * len(comparisons))
    axes = figure.subplots()
    for row, comparison in enumerate(comparisons):
        percent = 100 * comparison.error
        colour = COLOURS[0] if abs(comparison.error) <= TOLERANCE else COLOURS[4]
        axes.plot([0, percent], [row, row], color="#C9CED6", linewidth=1.4, zorder=1)
        axes.scatter(percent, row, color=colour, s=34, zorder=2)
        side = 1 if percent >= 0 else -1
        axes.annotate(
            f"{percent:+.1f} %",
            (percent, row),
            (7 * side, 0),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="center",
            fontsize=7,
        )
    axes.axvspan(-100 * TOLERANCE, 100 * TOLERANCE, color="#E8EEF5", zorder=0)
    axes.set_yticks(
        range(len(comparisons)), [f"{comparison.run}: {comparison.quantity}" for comparison in comparisons]
    )
    axes.invert_yaxis()
    percents = [100 * comparison.error for comparison in comparisons]
    axes.set_xlim(min(percents) - 14, max(percents) + 14)
    _style_axes(axes)
    axes.tick_params(labelsize=7.5)
    axes.set_xlabel("predicted over published, % (band: 15 %; the table explains the others)", fontsize=8)
    axes.set_title("Predictions from published kernel rates, without fitting", loc="left", fontsize=11)
    _write(canvas, path)
