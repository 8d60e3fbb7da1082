"""Pictures of a layout: who computes which part of the mask and when, how much that is, and what travels for it.

One row per layout. Left, the mask (queries down, keys to the right): the colour says which place of the ring computes
a pair, its shade in which step, dark first. Middle, the same work as bars, stacked by step in the same shades. Right,
the bytes a rank sends in each step of the forward pass, the most over ranks and the mean.
"""

import bisect
import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from ..costmodel.devices import HARDWARE, Shape
from ..costmodel.pass_cost import Cost, Problem, pass_cost, sources_in
from ..geometry import Mask, ShardedSequence
from ..geometry.layout import layout_rule
from ..geometry.plan import blocks
from ..text import format_tokens
from .scenario import Scenario

# Neighbours stay apart for colour-blind readers, too (Okabe and Ito 2008, two more added).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8C6D31", "#6A51A3")
_CELLS = 480  # resolution of a mask
_STRIPES = 48  # tokens that a striped mask is drawn with, so that the stripes can be seen
_PALEST = 0.72  # share of white in the last step


def draw(
    setting: Scenario,
    layouts: Sequence[str],
    path: str | os.PathLike[str],
    shape: Shape,
    transport: str = "ring",
    inner: int = 1,
) -> dict[str, dict[str, Any]]:
    """Writes the picture to `path` and returns, per layout, the numbers in it: imbalance and bytes.

    Args:
        shape: whose key/value heads and bytes per element the bytes are counted with.
        transport, inner: as in `make_plan`; they decide the steps.

    Raises:
        ValueError: if the transport does not fit the ring.
    """
    # imported here: half a second that only pictures need
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.7 + 3.1 * len(layouts)), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(layouts), 3, width_ratios=(1.05, 1, 1))
    name = transport.replace("_", " ").replace("allgather", "all-gather")
    name += f" of {inner}" if transport == "double_ring" else ""
    figure.suptitle(f"{setting.describe()}, {name}", fontsize=11)
    legend = "colour: the place of the ring that computes a pair; shade: in which step, dark first"
    figure.supxlabel(legend, fontsize=8, color="#555555")
    facts = {}
    for row, layout in enumerate(layouts):
        sequence = setting.sequence(layout)
        blocks(sequence, setting.mask, 0, transport, inner)  # refuses what does not fit
        problem = Problem.of(sequence, setting.mask)
        steps, inner_size = problem.num_steps(transport, inner), _inner(sequence, transport, inner)
        colours = _colours(sequence.ring_size, 1 if transport == "allgather" else steps)
        cost = pass_cost(problem, shape, HARDWARE["h100"], transport, inner)
        work = _work_by_step(problem, transport, steps, inner_size)
        total = sum(map(sum, work))
        imbalance = max(map(sum, work)) * sequence.ring_size / total
        facts[layout] = {"imbalance": imbalance, "busiest_step": max(cost.sent), "mean_sent": cost.mean_sent}
        small = setting.scaled(_scaled_length(setting)) if layout_rule(layout).interleaved else setting
        _draw_mask(figure.add_subplot(grid[row, 0]), layout, small, setting, transport, inner, colours)
        _draw_work(figure.add_subplot(grid[row, 1]), work, colours, imbalance)
        _draw_bytes(figure.add_subplot(grid[row, 2]), cost, sequence.ulysses)
    buffer = BytesIO()
    canvas.print_png(buffer)
    save_png(buffer, Path(path))
    return facts


def _inner(sequence: ShardedSequence, transport: str, inner: int) -> int:
    return inner if transport == "double_ring" else sequence.ring_size


def _scaled_length(setting: Scenario) -> int:
    places = setting.num_ranks
    return min(setting.length, places * max(1, _STRIPES // places))


def _colours(places: int, steps: int) -> Any:
    """`[place, step, rgb]`: hue by place, paler with every step."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    many = colormaps["turbo"]
    hues = [COLOURS[n] if places <= len(COLOURS) else many(0.04 + 0.9 * n / (places - 1)) for n in range(places)]
    pale = _PALEST * np.arange(steps) / max(1, steps - 1)
    base = np.array([to_rgb(hue[:3] if isinstance(hue, tuple) else hue) for hue in hues])
    return base[:, None, :] * (1 - pale)[None, :, None] + pale[None, :, None]


def _work_by_step(problem: Problem, transport: str, steps: int, inner: int) -> list[list[int]]:
    """`[place][step]`: visible pairs."""
    if transport == "allgather" or problem.num_places == 1:
        return [[sum(row)] for row in problem.work]
    by_step = [pairs for pairs, _ in problem.by_step(steps, inner)]
    return [[pairs[place] for pairs in by_step] for place in range(problem.num_places)]


def _owner(sequence: ShardedSequence, tokens: Sequence[int]) -> list[int]:
    """The place of the ring that holds each of these tokens."""
    if layout_rule(sequence.layout).interleaved and sequence.ring_size > 1:
        return [token % sequence.ring_size for token in tokens]
    runs = sorted(
        (segment.start, place) for place in range(sequence.ring_size) for segment in sequence.ring_segments(place)
    )
    starts = [start for start, _ in runs]
    return [runs[bisect.bisect_right(starts, token) - 1][1] for token in tokens]


def _visible(sequence: ShardedSequence, mask: Mask, tokens: Any) -> Any:
    """Which of these queries see which of these keys, in the first row."""
    import numpy as np

    regions = sequence.regions(0, mask)
    region = np.searchsorted(regions.starts, tokens, side="right") - 1
    low = np.array(regions.firsts)[region]
    if mask.window is not None:
        low = np.maximum(low, tokens - mask.window + 1)
    high = np.maximum(tokens, np.array(regions.reaches)[region] - 1) if mask.causal else None
    high = np.array(regions.ends)[region] - 1 if high is None else high
    return (tokens[None, :] >= low[:, None]) & (tokens[None, :] <= high[:, None])


def _draw_mask(
    axes: Any, layout: str, small: Scenario, setting: Scenario, transport: str, inner: int, colours: Any
) -> None:
    import numpy as np

    sequence = small.sequence(layout)
    cells = min(_CELLS, sequence.length)
    tokens = np.array([(2 * n + 1) * sequence.length // (2 * cells) for n in range(cells)])
    owner = np.array(_owner(sequence, tokens.tolist()))
    size, inner = sequence.ring_size, _inner(sequence, transport, inner)
    step_of = np.zeros((size, size), dtype=int)
    if transport != "allgather":
        for step in range(size):
            step_of[np.arange(size), sources_in(step, size, inner)] = min(step, colours.shape[1] - 1)
    image = colours[owner[:, None], step_of[owner[:, None], owner[None, :]]]
    image = np.where(_visible(sequence, small.mask, tokens)[:, :, None], image, 1.0)
    edge = setting.length
    fine = "nearest" if cells < _CELLS // 2 else "antialiased"
    axes.imshow(image, extent=(0, edge, edge, 0), interpolation=fine, aspect="equal")
    ticks = [edge * n // 4 for n in range(5)]
    labels = [format_tokens(tick, exact=True) for tick in ticks]
    axes.set_xticks(ticks, labels, fontsize=8)
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.set_title(layout, loc="left", fontsize=10, fontweight="bold")
    if sequence.length < edge:
        axes.set_title(f"drawn with {sequence.length} tokens", loc="right", fontsize=8, color="#555555")
    axes.set_xlabel("key", fontsize=9)
    axes.set_ylabel("query", fontsize=9)
    axes.tick_params(length=2)


def _bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, length=2)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)


def _draw_work(axes: Any, work: list[list[int]], colours: Any, imbalance: float) -> None:
    places = range(len(work))
    mean = sum(map(sum, work)) / len(work)
    bottom = [0.0] * len(work)
    for step in range(len(work[0])):
        share = [work[place][step] / mean for place in places]
        axes.bar(places, share, bottom=bottom, color=colours[:, step], width=0.86 if len(work) <= 64 else 1.0)
        bottom = [a + b for a, b in zip(bottom, share, strict=True)]
    axes.axhline(1.0, color="#333333", linewidth=1, linestyle=(0, (4, 3)))
    axes.set_ylim(0, max(1.25, 1.08 * max(bottom)))
    _bare(axes)
    axes.set_title(f"work, busiest / mean = {imbalance:.3f}", loc="left", fontsize=10)
    axes.set_xlabel("place of the ring", fontsize=9)
    axes.set_ylabel("visible pairs / mean", fontsize=9)
    if len(work) <= 16:
        axes.set_xticks(list(places))


def _draw_bytes(axes: Any, cost: Cost, ulysses: int) -> None:
    most, mean = cost.sent, cost.mean_by_step
    unit, name = (2**20, "MiB") if max(most) >= 2**20 else (2**10, "KiB")
    steps = range(len(most))
    wide, narrow = (0.86, 0.5) if len(most) <= 32 else (1.0, 1.0)
    axes.bar(steps, [n / unit for n in most], color="#C9CED6", width=wide, label="most of any rank")
    axes.bar(steps, [n / unit for n in mean], color="#5B6573", width=narrow, label="mean")
    axes.set_ylim(0, max(1e-9, 1.3 * max(most) / unit))
    _bare(axes)
    axes.set_title(f"sent by a rank, mean {sum(mean) / unit:.3g} {name}", loc="left", fontsize=10)
    axes.set_xlim(-0.7, max(7, len(most) - 1) + 0.7)
    axes.set_xlabel("step of the forward pass" + (", ulysses apart" if ulysses > 1 else ""), fontsize=9)
    axes.set_ylabel(f"K and V, {name}", fontsize=9)
    if len(most) <= 16:
        axes.set_xticks(list(steps))
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")


def save_png(buffer: BytesIO, path: Path) -> None:
    """PNG files with a palette: a third of the size, for pictures of few colours."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    buffer.seek(0)
    image = Image.open(buffer).convert("RGB").quantize(colors=128, dither=Image.Dither.NONE)
    image.save(path, format="PNG", optimize=True)
