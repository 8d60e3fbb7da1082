"""`ring-hf show`: pictures of which rank computes what in which step, and the bytes it sends."""

import argparse
from pathlib import Path

from ..geometry import LAYOUTS, TRANSPORTS
from ..text import HelpFormatter, format_bytes
from .cli_options import add_scenario_options, scenario_from, shape_from
from .schedule_drawing import draw

_EXAMPLES = """examples:
  the zigzag layout on 8 ranks; the colour is the rank that computes, the shade the step of the ring
    ring-hf show --layout zigzag --cp 8 --seq 64K --output zigzag.png
  why it is balanced and contiguous is not
    ring-hf show --layout contiguous zigzag striped --cp 8 --seq 64K --output layouts.png
  documents packed into one sequence: zigzag is not balanced any more
    ring-hf show --layout zigzag balanced --cp 8 --seq 64K --num-documents 12 --transport direct --output packed.png
  a sliding window needs its neighbours only
    ring-hf show --layout contiguous --cp 8 --seq 64K --window 8K --transport direct --output window.png
  documents of 8,000 and 20,000 tokens whose first 4,000 tokens see each other in both directions
    ring-hf show --layout zigzag --cp 4 --seq 28000 --documents 8000,20000 --prefix 4000 --output prefix.png
"""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    command = commands.add_parser(
        "show",
        help="draw which rank computes which part of the mask in which step, the work per rank, the bytes per step",
        description="Draws, per layout: the mask, coloured by the ring rank that computes it and paler with every "
        "step; the work of every rank; the bytes a rank sends in every step of the forward pass. One attention "
        "layer, one batch row.",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    command.add_argument(
        "--layout", nargs="+", default=["zigzag"], choices=LAYOUTS, help="one or several, below each other"
    )
    command.add_argument("--transport", default="ring", choices=TRANSPORTS, help="how keys and values are sent")
    command.add_argument("--inner", type=int, default=1, help="ranks of an inner ring, for double_ring")
    command.add_argument("--ulysses", type=int, default=1, help="ranks of a Ulysses group, which exchange heads")
    command.add_argument("--output", type=Path, required=True, help="PNG file to write")
    add_scenario_options(command)


def run(options: argparse.Namespace) -> int:
    """Draw the picture and print one line per layout with the numbers in it.

    Raises:
        ValueError: if `--inner` is given without `--transport double_ring`.
    """
    scenario = scenario_from(options, options.ulysses)
    if options.inner != 1 and options.transport != "double_ring":
        raise ValueError(
            f"--inner {options.inner} with --transport {options.transport}: only a double ring has inner rings. Add "
            "--transport double_ring, or leave --inner out."
        )
    summaries = draw(scenario, options.layout, options.output, shape_from(options), options.transport, options.inner)
    for layout, summary in summaries.items():
        mean_sent, max_sent = format_bytes(summary.mean_sent), format_bytes(summary.max_sent_in_step)
        print(
            f"{layout}: busiest / mean {summary.imbalance:.4f}; a rank sends {mean_sent}, in a step at most {max_sent}"
        )
    print(f"picture: {options.output}")
    return 0
