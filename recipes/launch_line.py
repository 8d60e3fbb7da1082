"""A launch line, such as `accelerate launch --config_file configs/accelerate/cpu_2proc.yaml`: how many processes it
starts, which machine of several this is, and the engine it asks for.

`$NAME`, `${NAME}` and `${NAME:-default}` are expanded, so that the same line serves every machine of a job
(`--machine_rank ${SLURM_NODEID:-0}`).
"""

import os
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

_VARIABLE = re.compile(r"\$(?:(?P<name>\w+)|\{(?P<braced>\w+)(?::-(?P<default>[^}]*))?\})")
# By its name on the command line, the module that starts it with this interpreter.
MODULES = {"accelerate": "accelerate.commands.launch", "torchrun": "torch.distributed.run"}


@dataclass(frozen=True)
class LaunchLine:
    """A launch line that was read.

    Attributes:
        words: the command without the script.
        num_processes: on all machines.
        machine_rank: of this machine, from 0.
        num_machines: of the job.
        engine: `DDP`, `FSDP` or `DEEPSPEED`.
        settings: of the engine, as accelerate's file and options have them.
    """

    words: tuple[str, ...]
    num_processes: int
    machine_rank: int = 0
    num_machines: int = 1
    engine: str = "DDP"
    settings: dict[str, Any] = field(default_factory=dict)

    def command(self, script: str, *arguments: str) -> list[str]:
        """Return the command that starts a script, with this interpreter instead of one on the path."""
        program, *options = self.words
        if program in ("python", "python3"):
            return [sys.executable, *options, script, *arguments]
        if program not in MODULES:
            return [*self.words, script, *arguments]
        options = options[1:] if program == "accelerate" else options
        return [sys.executable, "-m", MODULES[program], *options, script, *arguments]


def read_launch(line: str, num_processes: int | None = None) -> LaunchLine:
    """Read a launch line.

    Args:
        line: of `accelerate launch`, `torchrun`, `python`, or any other program if `num_processes` is given.
        num_processes (`int`, *optional*): on all machines, where the line does not say it.

    Raises:
        ValueError: if the number of processes does not follow from it.
    """
    words = tuple(shlex.split(_VARIABLE.sub(lambda match: _expand(match, line), line)))
    if not words:
        raise ValueError("launch is empty. Write `accelerate launch --config_file <file>`, or `python`.")
    if words[:2] == ("accelerate", "launch"):
        return _read_accelerate(words, line, num_processes)
    if words[0] == "torchrun":
        return _read_torchrun(words, line, num_processes)
    count = 1 if words[0] in ("python", "python3") and num_processes is None else num_processes
    return LaunchLine(words, _require(count, line))


def _expand(match: re.Match[str], line: str) -> str:
    name = match["name"] or match["braced"]
    value = os.environ.get(name) or match["default"]
    if value is None:
        raise ValueError(
            f"launch={line!r}: the variable {name} is not set on this machine. Set it, or write a default: "
            f"${{{name}:-0}}."
        )
    return value


def _require(num_processes: int | None, line: str) -> int:
    if num_processes is None:
        raise ValueError(
            f"launch={line!r} does not say how many processes it starts. Say it in the line, or set num_processes."
        )
    return num_processes


def _read_accelerate(words: tuple[str, ...], line: str, num_processes: int | None) -> LaunchLine:
    options = launch_command_parser().parse_args([*words[2:], "script.py"])
    settings: dict[str, Any] = {}
    if options.config_file is not None:
        path = Path(options.config_file)
        if not path.is_file():
            raise ValueError(f"launch={line!r}: there is no file {path} here (in {os.getcwd()}).")
        settings = yaml.safe_load(path.read_text()) or {}
    engine = {"FSDP": "FSDP", "DEEPSPEED": "DEEPSPEED"}.get(str(settings.get("distributed_type")), "DDP")
    engine = "FSDP" if options.use_fsdp else "DEEPSPEED" if options.use_deepspeed else engine
    nested = settings.get("fsdp_config" if engine == "FSDP" else "deepspeed_config") or {}
    given = {key: value for key, value in vars(options).items() if f"--{key}" in words}
    rank = options.machine_rank if options.machine_rank is not None else settings.get("machine_rank", 0)
    return LaunchLine(
        words,
        _require(options.num_processes or settings.get("num_processes") or num_processes, line),
        int(rank or 0),
        int(options.num_machines or settings.get("num_machines") or 1),
        engine,
        {**nested, **given},
    )


def _read_torchrun(words: tuple[str, ...], line: str, num_processes: int | None) -> LaunchLine:
    options = get_args_parser().parse_args([*words[1:], "script.py"])
    nodes, per_node = str(options.nnodes), str(options.nproc_per_node)
    if not nodes.isdigit():
        raise ValueError(f"launch={line!r}: --nnodes {nodes} lets the number of machines change. Write one number.")
    count = int(nodes) * int(per_node) if per_node.isdigit() else num_processes
    return LaunchLine(words, _require(count, line), int(options.node_rank), int(nodes))
