"""`ring-hf doctor`: diagnoses this machine for a model at a length, and advises what to change."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from ..geometry import LAYOUTS
from ..text import HelpFormatter, parse_size

_EXAMPLES = """examples:
  what this machine has, and how it would run Llama 3.1 8B at 64K tokens
    ring-hf doctor
  your own model (nothing is downloaded), 128K tokens over 8 ranks
    ring-hf doctor --model path/to/model --seq 128K --ranks 8
  the ranks that training would have, on all nodes
    torchrun --nproc_per_node 8 -m ring_hf.cli doctor --seq 256K
  for a program
    ring-hf doctor --json doctor.json

The exit code is 0, or 1 if training would be refused; 2 if an option is wrong.
"""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    command = commands.add_parser(
        "doctor",
        help="versions, devices, kernels, links and speed of this machine, and what to change before training",
        description="Inspects versions and devices, asks every attention kernel whether it supports the model,\n"
        "measures the links between ranks and the speed of attention, predicts whether compute hides\n"
        "communication, and advises what to change.",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    models = "a folder, a config.json, or a name in the table of ring-hf plan"
    command.add_argument("--model", default="Llama-3.1-8B", help=f"{models} (default: Llama-3.1-8B)")
    command.add_argument("--seq", type=parse_size, default=2**16, help="tokens of the sequence (default: 64K)")
    command.add_argument("--ranks", type=int, default=0, help="ranks that share it (default: GPUs; 2 on a CPU)")
    command.add_argument("--layout", default="zigzag", choices=LAYOUTS, help="layout of the ring (default: zigzag)")
    command.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    command.add_argument("--repeats", type=int, default=5, help="timed exchanges per message size")
    command.add_argument(
        "--timeout", type=float, default=120.0, help="seconds to wait for a rank that does not answer"
    )
    command.add_argument("--json", type=Path, help="also write the report and the advice to this file")


def run(options: argparse.Namespace) -> int:
    """Print the report; return 1 if training would be refused, else 0.

    Raises:
        ValueError: if an option is out of range, or the model does not exist.
    """
    for name in ("ranks", "repeats", "timeout"):
        if getattr(options, name) < (0 if name == "ranks" else 1):
            raise ValueError(f"--{name} {getattr(options, name)} must be at least 1.")
    from . import Query, advise, diagnose, render

    query = Query(
        model=options.model,
        seq_length=options.seq,
        num_ranks=options.ranks,
        layout=options.layout,
        dtype=options.dtype,
    )
    report = diagnose(query, options.timeout, options.repeats)
    if report is None:  # another rank of a launcher prints
        return 0
    advice = advise(report)
    print(render(report, advice))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        record = {"report": asdict(report), "advice": [asdict(item) for item in advice]}
        options.json.write_text(json.dumps(record, indent=1))
    return int(any(item.blocks_training for item in advice))
