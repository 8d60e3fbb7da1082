"""`ring-hf`: the command line. One module per command: its `add` declares the options, its `run` executes the command.

`run` prints the result and raises `ValueError` for options that cannot work. It imports slow modules itself, so that
`--help` stays fast.
"""

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType

from .data import data_command
from .doctor import doctor_command
from .planner import plan_command
from .simulate import bench_command, show_command, simulate_command
from .text import HelpFormatter
from .verify import verify_command

COMMANDS: dict[str, ModuleType] = {
    "doctor": doctor_command,
    "verify": verify_command,
    "plan": plan_command,
    "data": data_command,
    "show": show_command,
    "simulate": simulate_command,
    "bench": bench_command,
}
_DESCRIPTION = """Exact context parallelism for Hugging Face models: check and verify a machine, plan, report on
data, draw, simulate.

Sizes are tokens: 4096, 64K (65,536) or 1M (1,048,576). `ring-hf <command> --help` has examples."""


def parser() -> argparse.ArgumentParser:
    """Return the parser with all commands and their options."""
    parser = argparse.ArgumentParser(prog="ring-hf", description=_DESCRIPTION, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for module in COMMANDS.values():
        module.add(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Options that cannot work and files that cannot be opened are reported in one line, without a traceback.
    """
    options = parser().parse_args(arguments)
    options.argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return COMMANDS[options.command].run(options)
    except ValueError as error:
        print(f"ring-hf {options.command}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:  # not about a file that an option names, but a connection for example
            raise
        print(f"ring-hf {options.command}: {error.filename}: {error.strerror}. Name another file.", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
