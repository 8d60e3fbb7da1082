"""`ring-hf`: the command line. A module per command: `add` declares its options, `run` does it.

A command prints its result; what is wrong with its options it raises as `ValueError`. Its module imports what takes
long in `run`.
"""

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

from .doctor import doctor_command
from .planner import plan_command
from .simulate import bench_command, show_command, simulate_command
from .text import HelpFormatter

COMMANDS: dict[str, ModuleType] = {
    "doctor": doctor_command,
    "plan": plan_command,
    "show": show_command,
    "simulate": simulate_command,
    "bench": bench_command,
}
_DESCRIPTION = """Exact context parallelism for Hugging Face models: what a machine can do, what a run needs, pictures,
simulations.

Sizes are tokens: 4096, 64K (65,536) or 1M (1,048,576). `ring-hf <command> --help` has examples."""


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(prog="ring-hf", description=_DESCRIPTION, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for module in COMMANDS.values():
        module.add(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; what does not fit is said in one line, without a traceback; so is
    a file that cannot be opened."""
    options = parser().parse_args(arguments)
    options.words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return COMMANDS[options.command].run(options)
    except ValueError as error:
        print(f"ring-hf {options.command}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:  # of a connection, say: no file that an option names
            raise
        print(f"ring-hf {options.command}: {error.filename}: {error.strerror}. Name another file.", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
