"""The classic experiment, with a correct merge: textbook, fused and ring attention over growing lengths.

Time and measured peak memory of a process, forward and forward + backward: textbook attention that materialises its
S x S scores, PyTorch's fused `scaled_dot_product_attention`, both in one process with two threads, and this package's
zigzag ring on two processes with one thread each. Writes a table, a plot, and the exponents of growth: the slope of a
line through the longest lengths in log-log.

    python scripts/bench_lengths.py --output results/       # 512 to 32K tokens, fp32; about 15 minutes
    python scripts/bench_lengths.py --lengths 512 1024 2048 --repeats 3
"""

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ring_hf.text import markdown_table
from scripts.bench_harness import Variants, add_options, measure, report, table

STANDARD, SDPA, RING = "textbook, 1 process", "sdpa, 1 process", "ring, 2 processes"
FIGURES = {
    "forward": ("forward", "s"),
    "total": ("forward + backward", "s"),
    "forward_memory": ("forward: peak of a process", "MiB"),
    "memory": ("forward + backward: peak of a process", "MiB"),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, [512, 1024, 2048, 4096, 8192, 16384, 32768], ["float32"], repeats=3)
    parser.add_argument("--fit", type=int, default=3, help="longest lengths through which exponents are fitted")
    return parser.parse_args()


def longest_textbook(arguments: argparse.Namespace) -> int:
    """Return the longest length whose scores, weights and their gradients fit half of this machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    return math.isqrt(int(memory / (5 * 4 * arguments.heads)))


def exponents(rows: list[dict[str, Any]], fit: int) -> list[dict[str, Any]]:
    """Return the slope of every figure by dtype and variant: least squares in log-log over the `fit` longest lengths.

    Variants that ran at a single length are left out.
    """
    slopes_of_variants = []
    for dtype, variant in dict.fromkeys((row["dtype"], row["variant"]) for row in rows):
        selection = [row for row in rows if (row["dtype"], row["variant"]) == (dtype, variant)][-fit:]
        if len(selection) < 2:  # of the textbook form, longer lengths do not fit
            continue
        x = [math.log(row["length"]) for row in selection]
        middle = sum(x) / len(x)
        slopes = {
            key: sum((a - middle) * math.log(row[key]) for a, row in zip(x, selection, strict=True))
            / sum((a - middle) ** 2 for a in x)
            for key in FIGURES
        }
        lengths = {"from": selection[0]["length"], "to": selection[-1]["length"]}
        slopes_of_variants.append({"dtype": dtype, "variant": variant, **lengths, **slopes})
    return slopes_of_variants


def exponent_table(slopes_of_variants: list[dict[str, Any]]) -> str:
    """Markdown, one line per dtype and variant."""
    cells = [["dtype", "variant", "tokens", *(name for name, _ in FIGURES.values())]]
    for row in slopes_of_variants:
        lengths = f"{row['from']:,} to {row['to']:,}"
        cells.append([row["dtype"], row["variant"], lengths, *(f"{row[key]:.2f}" for key in FIGURES)])
    return markdown_table(cells, align="lllr", padded=False)


def plot(rows: list[dict[str, Any]], slopes_of_variants: list[dict[str, Any]], path: Path) -> None:
    """Draw four panels, log-log, with the exponents in the legend; one picture per dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        figure, panels = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
        lengths = sorted({row["length"] for row in rows})
        for panel, (key, (name, unit)) in zip(panels.flat, FIGURES.items(), strict=True):
            slopes = {
                row["variant"]: f": $S^{{{row[key]:.2f}}}$" for row in slopes_of_variants if row["dtype"] == dtype
            }
            for marker, variant in zip("os^", (STANDARD, SDPA, RING), strict=True):
                selection = [row for row in rows if (row["dtype"], row["variant"]) == (dtype, variant)]
                scale = 2**20 if unit == "MiB" else 1
                values = [row[key] / scale for row in selection]
                label = variant + slopes.get(variant, "")
                panel.plot([row["length"] for row in selection], values, marker=marker, label=label)
            panel.set(xscale="log", yscale="log", title=name, ylabel=unit)
            panel.set_xticks(lengths, [f"{n // 1024}K" if n >= 1024 else str(n) for n in lengths], minor=False)
            panel.set_xticks([], minor=True)
            panel.grid(alpha=0.3)
            panel.legend(fontsize=9)
        for panel in panels[1]:
            panel.set_xlabel("tokens of the sequence, S")
        figure.suptitle(f"Causal attention, {dtype}: 2 CPU cores, as 1 process or as 2")
        figure.savefig(path.with_name(f"{path.stem}-{dtype}.png"), dpi=120)
        pyplot.close(figure)


def main() -> None:
    arguments = parse_arguments()
    arguments.processes = 2
    if len(set(arguments.lengths)) < 2 or arguments.fit < 2:
        raise SystemExit(f"--lengths {arguments.lengths} --fit {arguments.fit}: growth needs at least two lengths.")
    variants: Variants = {
        SDPA: {"baseline": "sdpa"},
        RING: {"baseline": "ring", "settings": {"layout": "zigzag", "transport": "ring"}},
        STANDARD: {"baseline": "standard", "longest": longest_textbook(arguments)},
    }
    rows = measure(arguments, variants)
    slopes = exponents(rows, arguments.fit)
    report(arguments.output, "lengths", f"{table(rows)}\n\nExponents of growth\n\n{exponent_table(slopes)}\n", rows)
    if arguments.output:
        plot(rows, slopes, arguments.output / "lengths.png")


if __name__ == "__main__":
    main()
