"""Heat maps of scores by length and depth: a row of panels for each task, a panel for each model."""

from collections.abc import Mapping
from pathlib import Path

from .retrieval_grid import GridResult


def plot_grids(results: Mapping[str, GridResult], path: Path, title: str = "Retrieval by length and depth") -> None:
    """Draw a panel for each task with depths and each model; red is 0, green is 1, cells that have not run are grey.

    Args:
        results: by name of the model.
        path: file to write; its ending chooses the format.
        title: heading of the figure.
    """
    # Imported here: it takes half a second, and only plotting needs it.
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(task for result in results.values() for task in result.spec.tasks))
    figure = Figure(
        figsize=(1.2 + 3.6 * len(results), 1.0 + 2.4 * len(tasks)), dpi=150, layout="constrained", facecolor="white"
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(tasks), len(results), squeeze=False)
    image = None
    for row, task in enumerate(tasks):
        for column, (name, result) in enumerate(results.items()):
            axes, depths = panels[row][column], result.spec.depths(task) if task in result.spec.tasks else ()
            lengths = sorted(result.spec.lengths)
            means = [[result.mean(task, length, depth) for length in lengths] for depth in depths]
            grid = np.array([[np.nan if mean is None else mean for mean in line] for line in means], dtype=float)
            axes.set_facecolor("#DDDDDD")
            if grid.size:
                image = axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto", interpolation="nearest")
            for y, line in enumerate(means):
                for x, mean in enumerate(line):
                    if mean is not None and len(lengths) * len(depths) <= 120:
                        axes.text(x, y, f"{100 * mean:.0f}", ha="center", va="center", fontsize=6)
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7, rotation=45)
            axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths], fontsize=7)
            axes.set_title(f"{task}: {name}", fontsize=9, loc="left")
            if column == 0:
                axes.set_ylabel("depth", fontsize=8)
            if row == len(tasks) - 1:
                axes.set_xlabel("tokens", fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=panels, fraction=0.03, label="score")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
