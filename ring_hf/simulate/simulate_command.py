"""`ring-hf simulate`: tables of the cost of every layout and algorithm, on up to 1,024 simulated ranks."""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

from ..costmodel.devices import HARDWARE, Hardware
from ..geometry import LAYOUTS
from ..text import HelpFormatter
from .cli_options import add_scenario_options, scenario_from, shape_from
from .layout_tables import layout_table, transport_table
from .simulation import num_tasks, simulate

_EXAMPLES = """examples:
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
  efficiency      evenly distributed work without any communication or overhead, over that time
  K/V buffers     keys, values and their gradients that a rank holds besides its own, backward
"""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    command = commands.add_parser(
        "simulate",
        help="tables of balance, bytes, exposed communication and time of every layout and algorithm",
        description="Runs the geometry of up to 1,024 ranks in one process and predicts, for a machine described by "
        "a few numbers, the bytes that every algorithm sends and how much of the time for them no compute hides. "
        "One attention layer, one batch row.",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    command.add_argument("--layout", nargs="+", default=list(LAYOUTS), choices=LAYOUTS, help="layouts to simulate")
    command.add_argument("--inner", type=int, help="ranks of the inner ring (default: those of a node)")
    command.add_argument(
        "--ulysses", type=int, nargs="+", default=[], help="Ulysses ranks of the hybrids (default: automatic)"
    )
    command.add_argument("--json", type=Path, help="also write all numbers to this file")
    machine = command.add_argument_group("machine", "a preset, and numbers that replace those of the preset")
    machine.add_argument("--hardware", default="h100", choices=HARDWARE, help="preset (default: h100)")
    machine.add_argument("--ranks-per-node", type=int)
    machine.add_argument("--flops", type=float, help="attention, forward, FLOP/s of a device; backward in proportion")
    machine.add_argument("--node-bandwidth", type=float, help="bytes/s of a device to another of its node, one way")
    machine.add_argument("--network-bandwidth", type=float, help="bytes/s of a device to another node, one way")
    add_scenario_options(command)


def _hardware_from(options: argparse.Namespace) -> Hardware:
    preset = HARDWARE[options.hardware]
    changes = {
        "ranks_per_node": options.ranks_per_node,
        "node_bandwidth": options.node_bandwidth,
        "network_bandwidth": options.network_bandwidth,
    }
    if options.flops is not None:
        changes["flops"] = options.flops
        changes["backward_flops"] = preset.backward_flops * options.flops / preset.flops
    for name, value in changes.items():
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be positive.")
    return replace(preset, **{name: value for name, value in changes.items() if value is not None})


def run(options: argparse.Namespace) -> int:
    """Print both tables."""
    from tqdm import tqdm

    scenario, shape, hardware = scenario_from(options), shape_from(options), _hardware_from(options)
    job = (scenario, options.layout, shape, hardware, options.inner, options.ulysses)
    with tqdm(total=num_tasks(*job), disable=None, leave=False) as progress:

        def advance(task: str) -> None:
            progress.set_description(task, refresh=False)
            progress.update()

        balances, costs = simulate(*job, advance)
    heads = f"{shape.num_heads} / {shape.num_kv_heads} heads x {shape.head_dim}, {shape.bytes_per_element} bytes"
    print(f"{scenario.describe()}; {heads}; {hardware.name}, {hardware.ranks_per_node} ranks per node\n")
    print(f"{layout_table(balances)}\n\n{transport_table(costs)}")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "command": options.argv,
            "layouts": [asdict(balance) for balance in balances],
            "algorithms": [cost.as_dict() for cost in costs],
        }
        options.json.write_text(json.dumps(result, indent=1))
    return 0
