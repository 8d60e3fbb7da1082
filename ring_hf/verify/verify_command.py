"""`ring-hf verify`: are the kernels exact on this machine, does training stay the same, how fast is it?

With `--model` or `--config`, the question is another one: is a model of the user exact (`model_command.py`)?
Each finished section is kept in results.json, so that a stopped run continues where it was; of the section `steps`,
each finished run is kept. `scripts/gpu_check.py` runs the same from a bare checkout.
"""

import argparse
import functools
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..text import HelpFormatter
from . import model_command

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

SECTIONS = ("exactness", "trainer", "benchmark", "steps")
RESULTS = Path("runs") / "verify"
_DESCRIPTION = """Verifies this package on a machine with one GPU or more, in minutes, section by section:

  exactness   every attention kernel that fits, on the tiles of all ranks, forward and backward, against fp64
  trainer     losses and grad norms of a ring, emulated on one device and run on several, against one process
  benchmark   attention TFLOP/s of rings (all blocks resident) against one device with the whole sequence
  steps       tokens/s, MFU and memory of the Trainer's steps, and of one rank's share, against the planner

Finished sections are kept: the same command continues a run that was stopped."""
_EXAMPLES = """examples:
  everything, on the GPUs of this machine
    ring-hf verify
  fewer problems and lengths
    ring-hf verify --quick
  two sections, one kernel from the Hugging Face hub
    ring-hf verify --only exactness,benchmark --kernels kernels-community/flash-attn3
  without a GPU, at sizes that say nothing about speed
    ring-hf verify --emulate --quick
"""
_EXIT_CODES = """
Exit code 0, or 1 if a section failed or a model is not exact; 2 if an option is wrong or there is no GPU.
"""
ReportProgress = Callable[[str, int], None]


@dataclass(frozen=True)
class Checkpoint:
    """Results of a section: those of an earlier call that did not finish it, and a function that saves new ones."""

    previous: dict[str, Any]
    save: Callable[[dict[str, Any]], None]


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    command = commands.add_parser(
        "verify",
        help="this machine's GPUs (exactness, training, speed, memory), or a model of your own against one process",
        description=f"{_DESCRIPTION}\n{model_command.DESCRIPTION}",
        epilog=f"{_EXAMPLES.rstrip()}{model_command.EXAMPLES}{_EXIT_CODES}",
        formatter_class=HelpFormatter,
    )
    add_options(command, RESULTS)
    model_command.add_options(command)


def add_options(parser: argparse.ArgumentParser, results_root: Path) -> None:
    """Add the options of a verification to a parser.

    Args:
        results_root: folder that gets one folder per device and day, unless `--output` names another.
    """
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument(
        "--kernels", nargs="+", default=["auto"], help="for exactness; also hub kernels, by repository"
    )
    parser.add_argument("--quick", action="store_true", help="fewer problems and lengths")
    parser.add_argument("--emulate", action="store_true", help="run on the CPU, with tiny shapes")
    parser.add_argument(
        "--output", type=Path, help=f"folder (default: {'/'.join(results_root.parts[-2:])}/DEVICE_DATE)"
    )
    parser.add_argument("--again", action="store_true", help="repeat sections that are done already")
    parser.set_defaults(results_root=results_root)


def run(options: argparse.Namespace) -> int:
    """Run the missing sections and return 1 if any of the chosen ones failed, else 0.

    Raises:
        ValueError: if an option is wrong or there is no GPU.
    """
    if options.model is not None or options.config is not None:
        machine_options = {
            f"--only {options.only}": options.only != ",".join(SECTIONS),
            f"--kernels {' '.join(options.kernels)}": options.kernels != ["auto"],
            "--quick": options.quick,
            "--emulate": options.emulate,
            "--output": options.output is not None,
            "--again": options.again,
        }
        if given := [name for name, is_given in machine_options.items() if is_given]:
            raise ValueError(f"{given[0]} is for the machine, not for --model or --config. Leave one of the two out.")
        return model_command.run(options)
    given = [
        f"--{name}"
        for name in ("cp", "attn", "data", "tokenizer", "length", "rows", "dtype", "json")
        if getattr(options, name) is not None
    ]
    if given:
        raise ValueError(f"{given[0]} is for a model. Name one with --model, or a run with --config.")
    return verify(options, command=" ".join(["ring-hf", *options.argv]))


def verify(options: argparse.Namespace, command: str) -> int:
    """Run the missing sections, print the report, and return 1 if any of the chosen ones failed, else 0.

    Args:
        options: those of `add_options`.
        command: what was typed, for the report.

    Raises:
        ValueError: if an option is wrong or there is no GPU.
    """
    sections = options.only.split(",")
    if unknown := sorted(set(sections) - set(SECTIONS)):
        raise ValueError(f"--only {','.join(unknown)} is not known. Choose from {', '.join(SECTIONS)}.")
    import torch
    from tqdm import tqdm

    from ..kernels import check_name
    from .verify_report import markdown

    try:
        for kernel in options.kernels:
            check_name(kernel)
    except ValueError as error:
        raise ValueError(f"--kernels: {error}") from None
    if not options.emulate and not torch.cuda.is_available():
        raise ValueError(
            "PyTorch finds no GPU here. Add --emulate to run everything on the CPU, or see `ring-hf doctor`."
        )
    device = torch.device("cpu" if options.emulate else "cuda")
    about = describe(device, command)
    device_name = re.sub(r"[^A-Za-z0-9]+", "-", about["device"]).strip("-")
    folder = options.output or options.results_root / f"{device_name}_{about['date']}"
    folder.mkdir(parents=True, exist_ok=True)
    print(f"results: {folder}")
    settings = {"quick": options.quick, "emulate": options.emulate, "kernels": options.kernels}
    settings["versions"] = about["versions"]
    results = {"about": about, "settings": settings, "sections": {}}
    path = folder / "results.json"
    if path.is_file() and (previous := json.loads(path.read_text())).get("settings") == settings:
        results["sections"] = previous["sections"]
    for section in sections:
        earlier = {} if options.again else results["sections"].get(section, {})
        if earlier.get("ok") and earlier.get("finished", True):
            print(f"{section}: done before, kept (--again repeats it)")
            continue
        start = time.perf_counter()

        def save(result: dict[str, Any], section: str = section, start: float = start) -> None:
            results["sections"][section] = {**result, "seconds": round(time.perf_counter() - start, 1)}
            write(folder, results)

        with tqdm(desc=section, disable=None, leave=False) as bar:
            report_progress = functools.partial(advance, bar)
            try:
                save(run_section(section, device, options, report_progress, Checkpoint(earlier, save)))
            except ValueError as error:  # no wrong option: the command line would print it without its traceback
                raise RuntimeError(f"section {section} raised {type(error).__name__}: {error}") from error
    print(markdown(results))
    print(f"written: {folder}/results.json and results.md")
    return int(not all(results["sections"][section]["ok"] for section in sections))


def run_section(
    section: str,
    device: "torch.device",
    options: argparse.Namespace,
    report_progress: ReportProgress,
    checkpoint: Checkpoint,
) -> dict[str, Any]:
    """Run one of `SECTIONS` and return its results, JSON values with at least the verdict `ok`."""
    from . import attention_timing, exactness, training_steps, trajectories

    quick, tiny = options.quick, options.emulate
    if section == "exactness":
        return exactness.run(device, quick, tiny, options.kernels, report_progress)
    if section == "trainer":
        return trajectories.run(device, tiny, report_progress)
    if section == "benchmark":
        return attention_timing.run(device, quick, tiny, report_progress)
    return training_steps.run(device, quick, tiny, report_progress, checkpoint.previous, checkpoint.save)


def write(folder: Path, results: dict[str, Any]) -> None:
    """Write results.json and results.md; the next call reads the first one, so it is replaced as a whole."""
    from .verify_report import markdown

    new = folder / "results.json.new"
    new.write_text(json.dumps(results, indent=1))
    new.replace(folder / "results.json")
    (folder / "results.md").write_text(markdown(results))


def advance(bar: "tqdm", text: str, total: int) -> None:
    """Advance a progress bar by one of `total` and show the text beside it."""
    bar.total = total
    bar.set_postfix_str(text, refresh=False)
    bar.update()


def describe(device: "torch.device", command: str) -> dict[str, Any]:
    """Return the device, date, command and versions that the results belong to; memory in bytes."""
    from ..doctor import machine

    devices, packages = machine.find_devices(), machine.list_packages()
    label = f"CPU, {devices.num_cores} cores"
    if device.type == "cuda":
        label = f"{len(devices.names)} x {devices.names[0]}"
    versions = {package.name: package.version for package in packages if package.version}
    versions |= {f"{package.name} with": package.notes for package in packages if package.notes}
    return {
        "device": label,
        "date": time.strftime("%Y-%m-%d"),
        "command": command,
        "versions": versions,
        "capability": devices.capability,
        "memory": devices.memory,
    }
