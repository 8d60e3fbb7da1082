"""Pictures of a layout: which rank computes which part of the mask and when, the work per rank, the bytes it sends.

One row per layout. Left, the mask (queries down, keys to the right): the colour is the ring rank that computes a pair,
its shade the step, dark first. Middle, the same work as bars, stacked by step in the same shades. Right, the bytes a
rank sends in each step of the forward pass, the most over ranks and the mean.
"""

import bisect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from ..costmodel.devices import HARDWARE, Shape
from ..costmodel.pass_cost import PassCost, WorkMatrices, estimate_pass, sources_in_step
from ..geometry import Mask, ShardedSequence
from ..geometry.layout import layout_rule
from ..geometry.plan import blocks
from ..text import format_tokens
from .scenario import Scenario

# Neighbours can also be told apart by colour-blind readers (Okabe and Ito 2008, two more added).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8C6D31", "#6A51A3")
_MASK_CELLS = 480  # resolution of a mask
_STRIPED_TOKENS = 48  # tokens that a striped mask is drawn with, so that the stripes are visible
_MAX_WHITE = 0.72  # share of white in the last step


@dataclass(frozen=True)
class LayoutSummary:
    """The numbers in one row of a picture: busiest rank over mean, and bytes that a rank sends."""

    imbalance: float
    max_sent_in_step: float
    mean_sent: float


def draw(
    scenario: Scenario,
    layouts: Sequence[str],
    path: str | os.PathLike[str],
    shape: Shape,
    transport: str = "ring",
    inner_ring_size: int = 1,
) -> dict[str, LayoutSummary]:
    """Write the picture to `path` and return the numbers in it, per layout.

    Args:
        shape: the layer whose key/value heads and bytes per element the bytes are counted with.
        transport, inner_ring_size: as in `make_plan`; they decide the steps.

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
    name += f" of {inner_ring_size}" if transport == "double_ring" else ""
    figure.suptitle(f"{scenario.describe()}, {name}", fontsize=11)
    legend = "colour: the ring rank that computes a pair; shade: the step in which it does, dark first"
    figure.supxlabel(legend, fontsize=8, color="#555555")
    summaries = {}
    for row, layout in enumerate(layouts):
        sequence = scenario.sequence(layout)
        blocks(sequence, scenario.mask, 0, transport, inner_ring_size)  # raises if the transport does not fit
        inner = inner_ring_size if transport == "double_ring" else sequence.ring_size
        matrices = WorkMatrices.exact(sequence, scenario.mask)
        num_steps = matrices.num_steps(transport, inner_ring_size)
        colours = _colours(sequence.ring_size, 1 if transport == "allgather" else num_steps)
        cost = estimate_pass(matrices, shape, HARDWARE["h100"], transport, inner_ring_size)
        work = _work_by_step(matrices, transport, num_steps, inner)
        imbalance = max(map(sum, work)) * sequence.ring_size / sum(map(sum, work))
        summaries[layout] = LayoutSummary(imbalance, max(cost.max_sent), cost.mean_sent)
        step_of = _step_of_block(sequence.ring_size, transport, inner, num_steps)
        _draw_mask(figure.add_subplot(grid[row, 0]), layout, scenario, step_of, colours)
        _draw_work(figure.add_subplot(grid[row, 1]), work, colours, imbalance)
        _draw_bytes(figure.add_subplot(grid[row, 2]), cost, sequence.ulysses)
    buffer = BytesIO()
    canvas.print_png(buffer)
    save_png(buffer, Path(path))
    return summaries


def _colours(num_ranks: int, num_steps: int) -> Any:
    """Array `[ring rank, step, rgb]`: hue by rank, paler with every step."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    if num_ranks <= len(COLOURS):
        hues = [to_rgb(colour) for colour in COLOURS[:num_ranks]]
    else:
        hues = [colormaps["turbo"](0.04 + 0.9 * rank / (num_ranks - 1))[:3] for rank in range(num_ranks)]
    white = _MAX_WHITE * np.arange(num_steps) / max(1, num_steps - 1)
    return np.array(hues)[:, None, :] * (1 - white)[None, :, None] + white[None, :, None]


def _work_by_step(matrices: WorkMatrices, transport: str, num_steps: int, inner_ring_size: int) -> list[list[int]]:
    """`[ring rank][step]`: visible pairs."""
    if transport == "allgather" or matrices.ring_size == 1:
        return [[sum(row)] for row in matrices.work]
    pairs_by_step = [pairs for pairs, _ in matrices.by_step(num_steps, inner_ring_size)]
    return [[pairs[rank] for pairs in pairs_by_step] for rank in range(matrices.ring_size)]


def _step_of_block(size: int, transport: str, inner_ring_size: int, num_steps: int) -> Any:
    """Array `[ring rank, source]`: the step in which the rank computes with the source's block."""
    import numpy as np

    step_of = np.zeros((size, size), dtype=int)
    if transport != "allgather":
        for step in range(size):
            step_of[np.arange(size), sources_in_step(step, size, inner_ring_size)] = min(step, num_steps - 1)
    return step_of


def _owner(sequence: ShardedSequence, tokens: Sequence[int]) -> list[int]:
    """The ring rank that holds each of these tokens."""
    if layout_rule(sequence.layout).interleaved and sequence.ring_size > 1:
        return [token % sequence.ring_size for token in tokens]
    owner_of_start = sorted(
        (segment.start, rank) for rank in range(sequence.ring_size) for segment in sequence.ring_segments(rank)
    )
    starts = [start for start, _ in owner_of_start]
    return [owner_of_start[bisect.bisect_right(starts, token) - 1][1] for token in tokens]


def _visible(sequence: ShardedSequence, mask: Mask, tokens: Any) -> Any:
    """Boolean array `[query, key]` over these tokens of the first row."""
    import numpy as np

    regions = sequence.regions(0, mask)
    region = np.searchsorted(regions.starts, tokens, side="right") - 1
    low = np.array(regions.doc_starts)[region]
    if mask.window is not None:
        low = np.maximum(low, tokens - mask.window + 1)
    if mask.causal:
        high = np.maximum(tokens, np.array(regions.prefix_ends)[region] - 1)
    else:
        high = np.array(regions.doc_ends)[region] - 1
    return (tokens[None, :] >= low[:, None]) & (tokens[None, :] <= high[:, None])


def _draw_mask(axes: Any, layout: str, scenario: Scenario, step_of: Any, colours: Any) -> None:
    import numpy as np

    drawn = scenario
    if layout_rule(layout).interleaved:
        num_ranks = scenario.num_ranks
        drawn = scenario.scaled(min(scenario.length, num_ranks * max(1, _STRIPED_TOKENS // num_ranks)))
    sequence = drawn.sequence(layout)
    num_cells = min(_MASK_CELLS, sequence.length)
    tokens = np.array([(2 * n + 1) * sequence.length // (2 * num_cells) for n in range(num_cells)])
    owner = np.array(_owner(sequence, tokens.tolist()))
    image = colours[owner[:, None], step_of[owner[:, None], owner[None, :]]]
    image = np.where(_visible(sequence, drawn.mask, tokens)[:, :, None], image, 1.0)
    edge = scenario.length
    interpolation = "nearest" if num_cells < _MASK_CELLS // 2 else "antialiased"
    axes.imshow(image, extent=(0, edge, edge, 0), interpolation=interpolation, aspect="equal")
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


def _style_bars(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, length=2)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)


def _draw_work(axes: Any, work: list[list[int]], colours: Any, imbalance: float) -> None:
    ranks = range(len(work))
    mean = sum(map(sum, work)) / len(work)
    bottom = [0.0] * len(work)
    for step in range(len(work[0])):
        share = [work[rank][step] / mean for rank in ranks]
        axes.bar(ranks, share, bottom=bottom, color=colours[:, step], width=0.86 if len(work) <= 64 else 1.0)
        bottom = [a + b for a, b in zip(bottom, share, strict=True)]
    axes.axhline(1.0, color="#333333", linewidth=1, linestyle=(0, (4, 3)))
    axes.set_ylim(0, max(1.25, 1.08 * max(bottom)))
    _style_bars(axes)
    axes.set_title(f"work, busiest / mean = {imbalance:.3f}", loc="left", fontsize=10)
    axes.set_xlabel("ring rank", fontsize=9)
    axes.set_ylabel("visible pairs / mean", fontsize=9)
    if len(work) <= 16:
        axes.set_xticks(list(ranks))


def _draw_bytes(axes: Any, cost: PassCost, ulysses: int) -> None:
    max_sent, mean_sent = cost.max_sent, cost.mean_sent_by_step
    size, unit = (2**20, "MiB") if max(max_sent) >= 2**20 else (2**10, "KiB")
    steps = range(len(max_sent))
    wide, narrow = (0.86, 0.5) if len(max_sent) <= 32 else (1.0, 1.0)
    axes.bar(steps, [n / size for n in max_sent], color="#C9CED6", width=wide, label="most of any rank")
    axes.bar(steps, [n / size for n in mean_sent], color="#5B6573", width=narrow, label="mean")
    axes.set_ylim(0, max(1e-9, 1.3 * max(max_sent) / size))
    _style_bars(axes)
    axes.set_title(f"sent by a rank, mean {sum(mean_sent) / size:.3g} {unit}", loc="left", fontsize=10)
    axes.set_xlim(-0.7, max(7, len(max_sent) - 1) + 0.7)
    axes.set_xlabel("step of the forward pass" + (", without Ulysses" if ulysses > 1 else ""), fontsize=9)
    axes.set_ylabel(f"K and V, {unit}", fontsize=9)
    if len(max_sent) <= 16:
        axes.set_xticks(list(steps))
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")


def save_png(buffer: BytesIO, path: Path) -> None:
    """Write a PNG with a palette: a third of the size for pictures of few colours."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    buffer.seek(0)
    image = Image.open(buffer).convert("RGB").quantize(colors=128, dither=Image.Dither.NONE)
    image.save(path, format="PNG", optimize=True)
