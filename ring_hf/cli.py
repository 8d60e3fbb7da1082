"""`ring-hf`: pictures of who computes what, and simulations of who waits for whom, without a single GPU.

Both commands speak of one attention layer and one batch row. Sizes are tokens: 4096, 64K (65,536) or 1M (1,048,576).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from .geometry import LAYOUTS, TRANSPORTS, Mask
from .geometry.cost import amount
from .geometry.hardware import HARDWARE, Hardware, Shape
from .tools import Setting, draw, layout_table, simulate, transport_table
from .tools.setting import mixed_lengths, parse_size, parse_sizes
from .tools.simulation import num_tasks

_SHOW = """examples:
  the zigzag layout on 8 ranks; colour: who computes it, shade: in which step of the ring
    ring-hf show --layout zigzag --cp 8 --seq 64K --output zigzag.png
  why it is balanced and contiguous is not
    ring-hf show --layout contiguous zigzag striped --cp 8 --seq 64K --output layouts.png
  documents packed into one sequence: zigzag is not balanced any more
    ring-hf show --layout zigzag balanced --cp 8 --seq 64K --num-documents 12 --transport direct --output packed.png
  a sliding window needs its neighbours only
    ring-hf show --layout contiguous --cp 8 --seq 64K --window 8K --transport direct --output window.png
  documents of 8,000 and 20,000 tokens whose first 4,000 tokens see each other both ways
    ring-hf show --layout zigzag --cp 4 --seq 28000 --documents 8000,20000 --prefix 4000 --output prefix.png
"""

_SIMULATE = """examples:
  one million tokens on 64 GPUs, 8 per node, heads of Llama 3 8B
    ring-hf simulate --cp 64 --seq 1M
  the same with 500 packed documents and a slower network, also as JSON
    ring-hf simulate --cp 64 --seq 1M --num-documents 500 --network-bandwidth 12.5e9 --json simulation.json
  a sliding window of 4,096 tokens on A100 cards
    ring-hf simulate --cp 16 --seq 256K --window 4K --hardware a100
  1,024 ranks; 1 minute
    ring-hf simulate --cp 1024 --seq 16M

columns:
  sent            bytes that a rank sends: in a step (the most over ranks), in the forward and in the backward pass
  exposed         seconds in which the last rank to finish does not compute
  time            forward + backward
  efficiency      evenly dealt work without any communication or overhead, over that time
  K/V buffers     keys, values and their gradients that a rank holds besides its own, backward
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ring-hf", description=__doc__, formatter_class=_Formatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    show = commands.add_parser(
        "show",
        help="draw who computes which part of the mask in which step, the work per rank, the bytes per step",
        description="Draws, per layout: the mask, coloured by the place of the ring that computes it and paler with "
        "every step; the work of every rank; what a rank sends in every step of the forward pass.",
        epilog=_SHOW,
        formatter_class=_Formatter,
    )
    show.add_argument(
        "--layout", nargs="+", default=["zigzag"], choices=LAYOUTS, help="one or several, below each other"
    )
    show.add_argument("--transport", default="ring", choices=TRANSPORTS, help="how keys and values travel")
    show.add_argument("--inner", type=int, default=1, help="ranks of an inner ring, for double_ring")
    show.add_argument("--ulysses", type=int, default=1, help="ranks of a place that exchange heads")
    show.add_argument("--output", type=Path, required=True, help="PNG file to write")
    table = commands.add_parser(
        "simulate",
        help="tables of balance, bytes, exposed communication and time of every layout and algorithm",
        description="Runs the geometry of up to 1,024 ranks in one process and predicts, for a machine described by "
        "a few numbers, what every algorithm sends and how much of that no compute hides.",
        epilog=_SIMULATE,
        formatter_class=_Formatter,
    )
    table.add_argument("--layout", nargs="+", default=list(LAYOUTS), choices=LAYOUTS, help="layouts to simulate")
    table.add_argument("--inner", type=int, help="ranks of the inner ring (default: those of a node)")
    table.add_argument("--ulysses", type=int, nargs="+", default=[], help="splits of the hybrid (default: automatic)")
    table.add_argument("--json", type=Path, help="also write all numbers to this file")
    machine = table.add_argument_group("machine", "a preset, any of its figures replaced")
    machine.add_argument("--hardware", default="h100", choices=HARDWARE, help="preset (default: h100)")
    machine.add_argument("--ranks-per-node", type=int)
    machine.add_argument("--flops", type=float, help="attention, forward, FLOP/s of a device; backward in proportion")
    machine.add_argument("--node-bandwidth", type=float, help="bytes/s of a device to another of its node, one way")
    machine.add_argument("--network-bandwidth", type=float, help="bytes/s of a device to another node, one way")
    for command in (show, table):
        command.add_argument("--cp", type=int, default=8, help="ranks that share the sequence")
        command.add_argument("--seq", type=parse_size, default=2**16, help="tokens of the sequence, such as 64K")
        packed = command.add_argument_group("documents and mask")
        packed.add_argument("--documents", type=parse_sizes, default=(), help="lengths, such as 4000,12000,1K")
        packed.add_argument("--num-documents", type=int, help="instead: so many documents of mixed length")
        packed.add_argument("--documents-seed", type=int, default=0, help="of the mixed lengths")
        packed.add_argument("--full", action="store_true", help="every token sees its whole document")
        packed.add_argument("--window", type=parse_size, help="keys that a query sees, its own included")
        packed.add_argument("--chunk", type=parse_size, help="tokens see each other only in runs of so many")
        both_ways = "tokens at the start of each document (one number: of all) that see each other both ways"
        packed.add_argument("--prefix", type=parse_sizes, default=(), help=both_ways)
        layer = command.add_argument_group("attention layer")
        layer.add_argument("--heads", type=int, default=32, help="query heads")
        layer.add_argument("--kv-heads", type=int, default=8, help="key/value heads")
        layer.add_argument("--head-dim", type=int, default=128)
        layer.add_argument("--bytes", type=int, default=2, help="of an element: 2 for bf16, 4 for fp32")
    return parser


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples as they are; nothing is cut at 80 columns."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=110)


def _setting(options: argparse.Namespace, ulysses: int = 1) -> Setting:
    documents = options.documents
    if options.num_documents is not None:
        if documents:
            raise ValueError("--documents and --num-documents both say what is packed. Give one of them.")
        documents = mixed_lengths(options.seq, options.num_documents, options.documents_seed)
    mask = Mask(not options.full, options.window, options.chunk)
    return Setting(options.cp, options.seq, mask, documents, options.prefix, ulysses)


def _shape(options: argparse.Namespace) -> Shape:
    if options.heads % options.kv_heads:
        raise ValueError(
            f"--kv-heads {options.kv_heads} does not divide --heads {options.heads}: every key/value head serves the "
            "same number of query heads."
        )
    return Shape(options.heads, options.kv_heads, options.head_dim, options.head_dim, options.bytes)


def _hardware(options: argparse.Namespace) -> Hardware:
    preset = HARDWARE[options.hardware]
    figures = {"ranks_per_node": options.ranks_per_node, "node_bandwidth": options.node_bandwidth}
    figures["network_bandwidth"] = options.network_bandwidth
    if options.flops is not None:
        figures |= {"flops": options.flops, "backward_flops": preset.backward_flops * options.flops / preset.flops}
    for name, value in figures.items():
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be positive.")
    return replace(preset, **{name: value for name, value in figures.items() if value is not None})


def _show(options: argparse.Namespace) -> None:
    setting = _setting(options, options.ulysses)
    if options.inner != 1 and options.transport != "double_ring":
        raise ValueError(
            f"--inner {options.inner} with --transport {options.transport}: only a double ring has inner rings. Add "
            "--transport double_ring, or leave --inner out."
        )
    facts = draw(setting, options.layout, options.output, _shape(options), options.transport, options.inner)
    for layout, numbers in facts.items():
        mean, most = amount(numbers["mean_sent"]), amount(numbers["busiest_step"])
        print(f"{layout}: busiest / mean {numbers['imbalance']:.4f}; a rank sends {mean}, in a step at most {most}")
    print(f"picture: {options.output}")


def _simulate(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    setting, shape, hardware = _setting(options), _shape(options), _hardware(options)
    job = (setting, options.layout, shape, hardware, options.inner, options.ulysses)
    with tqdm(total=num_tasks(*job), disable=None, leave=False) as progress:

        def advance(task: str) -> None:
            progress.set_description(task, refresh=False)
            progress.update()

        balances, rows = simulate(*job, advance)
    heads = f"{shape.num_heads} / {shape.num_kv_heads} heads x {shape.head_dim}, {shape.bytes_per_element} bytes"
    print(f"{setting.describe()}; {heads}; {hardware.name}, {hardware.ranks_per_node} ranks per node\n")
    print(f"{layout_table(balances)}\n\n{transport_table(rows)}")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        found = {"layouts": [asdict(b) for b in balances], "algorithms": [row.as_dict() for row in rows]}
        options.json.write_text(json.dumps({"command": options.words, **found}, indent=1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; what does not fit is said in one line, without a traceback."""
    options = _parser().parse_args(arguments)
    options.words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        {"show": _show, "simulate": _simulate}[options.command](options)
    except ValueError as error:
        print(f"ring-hf {options.command}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
