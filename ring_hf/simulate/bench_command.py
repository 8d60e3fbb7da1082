"""`ring-hf bench`: one front end for the benchmarks in the repository's `scripts/`."""

import argparse
import subprocess
import sys
from pathlib import Path

from ..text import HelpFormatter

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
# Name -> what it compares. `scripts/bench_<name>.py` runs it and has further options.
BENCHMARKS = {
    "attention": "ring attention on 2 processes against PyTorch's in one with as many threads: time, peak memory",
    "lengths": "textbook, fused and ring attention over growing lengths: time, peak memory, plot, exponents of growth",
    "algorithms": "every transport, Ulysses and layout side by side, one document and many packed ones",
    "training": "a training step through the Trainer, one process and two, every memory option off and on: time, "
    "peak memory",
    "memory": "peak memory of a training step, every option of ring_hf.memory off and on, each in its own process",
    "longest": "one step at 256K tokens, its loss compared with plain Transformers in one process",
    "checks": "time of the message of every forward pass and of the trial step: seconds, share of a step",
    "generation": "generation over a sharded cache: KV bytes of each rank, messages and time of a decoded token",
    "peers": "this package, PyTorch's own ring and two packages from PyPI: exactness, time, peak memory",
}
_EXAMPLES = """examples:
  what a benchmark does, and its options
    ring-hf bench lengths --help
  three lengths, quickly
    ring-hf bench lengths --lengths 512 1024 2048 --repeats 3 --output results/
  the whole comparison with other packages that run on a CPU
    ring-hf bench peers --output results/
"""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command; the arguments after the name of a benchmark are for its script."""
    listed = "\n".join(f"  {name:12}{description}" for name, description in BENCHMARKS.items())
    command = commands.add_parser(
        "bench",
        help="time and measure attention and training steps on this machine",
        description="Runs a benchmark; processes that are compared run interleaved, figures are medians and ratios. "
        f"Results are printed, with --output also written as JSON, Markdown and plots.\n\nbenchmarks:\n{listed}",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    command.add_argument("name", choices=BENCHMARKS, metavar="benchmark", help="one of those above")
    command.add_argument("options", nargs=argparse.REMAINDER, help="its own options, see --help after its name")


def run(options: argparse.Namespace) -> int:
    """Run the script and return its exit code.

    Raises:
        ValueError: outside a checkout: benchmarks are not part of the installed package.
    """
    script = SCRIPTS / f"bench_{options.name}.py"
    if not script.exists():
        raise ValueError(
            f"{script} does not exist: benchmarks are in the repository, not in the installed package. Clone it, "
            f"install it with pip install -e ., and run ring-hf bench {options.name} there."
        )
    return subprocess.run([sys.executable, str(script), *options.options]).returncode
