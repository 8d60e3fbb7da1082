"""One command for somebody with a GPU: are the kernels exact there, does training stay the same, how fast is it?

Four sections, each of which is kept when it is done, so that a run that was stopped goes on where it was; of the last
one also each run:

    exactness   every attention kernel that fits, on the tiles of all ranks, forward and backward, against fp64
    trainer     losses and grad norms of a ring, emulated on one device and run on several, against one process
    benchmark   attention TFLOP/s of rings (all blocks resident) against one device with the whole sequence
    steps       tokens/s, MFU and memory of the Trainer's steps, and of one rank's share, against the planner

    python scripts/gpu_check.py                          # minutes on one GPU; writes runs/gpu_check/...
    python scripts/gpu_check.py --quick
    python scripts/gpu_check.py --only exactness         # or several: exactness,benchmark
    python scripts/gpu_check.py --only exactness --kernels kernels-community/flash-attn3   # loaded from the hub
    python scripts/gpu_check.py --emulate --quick        # on a CPU, at sizes that say nothing of speed

Writes results.json and results.md, by default to a folder of the device and the day in runs/gpu_check, which git
ignores; it is named first and last. The exit code is 1 if anything is not exact.
"""

import argparse
import functools
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ring_hf.doctor import machine
from ring_hf.kernels import check_name
from scripts.checks import exactness, steps, timing, training
from scripts.checks.report import markdown

RESULTS = Path(__file__).resolve().parents[1] / "runs" / "gpu_check"  # git ignores runs/
Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Kept:
    """What an earlier call left of a section that it did not finish, and how to leave something for the next."""

    before: dict[str, Any]
    keep: Callable[[dict[str, Any]], None]


SECTIONS: dict[str, Callable[[torch.device, argparse.Namespace, Progress, Kept], dict[str, Any]]] = {
    "exactness": lambda device, options, say, _: exactness.run(
        device, options.quick, options.emulate, options.kernels, say
    ),
    "trainer": lambda device, options, say, _: training.run(device, options.emulate, say),
    "benchmark": lambda device, options, say, _: timing.run(device, options.quick, options.emulate, say),
    "steps": lambda device, options, say, kept: steps.run(
        device, options.quick, options.emulate, say, kept.before, kept.keep
    ),
}


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument(
        "--kernels", nargs="+", default=["auto"], help="for exactness; also hub kernels, by repository"
    )
    parser.add_argument("--quick", action="store_true", help="fewer problems and lengths")
    parser.add_argument("--emulate", action="store_true", help="run on the CPU, with tiny shapes")
    parser.add_argument("--output", type=Path, help="folder (default: runs/gpu_check/DEVICE_DATE)")
    parser.add_argument("--again", action="store_true", help="repeat sections that are done already")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Runs the sections that are missing; 1 if any of the chosen ones failed, 2 if there is nothing to run on."""
    options = parse_arguments(words)
    only = options.only.split(",")
    if unknown := sorted(set(only) - set(SECTIONS)):
        return refuse(f"--only {','.join(unknown)} is not known. Choose from {', '.join(SECTIONS)}.")
    try:
        for kernel in options.kernels:
            check_name(kernel)
    except ValueError as error:
        return refuse(f"--kernels: {error}")
    if not options.emulate and not torch.cuda.is_available():
        return refuse(
            "PyTorch finds no GPU here. Add --emulate to run everything on the CPU, or see `ring-hf doctor`."
        )
    device = torch.device("cpu" if options.emulate else "cuda")
    about = describe(device, sys.argv[1:] if words is None else words)
    name = re.sub(r"[^A-Za-z0-9]+", "-", about["device"]).strip("-")
    folder = options.output or RESULTS / f"{name}_{about['date']}"
    folder.mkdir(parents=True, exist_ok=True)
    print(f"results: {folder}")
    path = folder / "results.json"
    settings = {"quick": options.quick, "emulate": options.emulate, "kernels": options.kernels}
    settings["versions"] = about["versions"]
    found = {"about": about, "settings": settings, "sections": {}}
    if path.is_file() and (before := json.loads(path.read_text())).get("settings") == settings:
        found["sections"] = before["sections"]
    for section in only:
        before = {} if options.again else found["sections"].get(section, {})
        if before.get("ok") and before.get("finished", True):
            print(f"{section}: done before, kept (--again repeats it)")
            continue
        begin = time.perf_counter()

        def keep(result: dict[str, Any], section: str = section, begin: float = begin) -> None:
            found["sections"][section] = {**result, "seconds": round(time.perf_counter() - begin, 1)}
            write(folder, found)

        with tqdm(desc=section, disable=None, leave=False) as bar:
            say = functools.partial(advance, bar)
            keep(SECTIONS[section](device, options, say, Kept(before, keep)))
    print(markdown(found))
    print(f"written: {folder}/results.json and results.md")
    return int(not all(found["sections"][section]["ok"] for section in only))


def write(folder: Path, found: dict[str, Any]) -> None:
    """Both files; the first one is what the next call reads, so it is never half there."""
    new = folder / "results.json.new"
    new.write_text(json.dumps(found, indent=1))
    new.replace(folder / "results.json")
    (folder / "results.md").write_text(markdown(found))


def refuse(message: str) -> int:
    print(f"gpu_check.py: {message}", file=sys.stderr)
    return 2


def advance(bar: tqdm, said: str, total: int) -> None:
    bar.total = total
    bar.set_postfix_str(said, refresh=False)
    bar.update()


def describe(device: torch.device, words: Sequence[str]) -> dict[str, Any]:
    """What the results are of."""
    devices, packages = machine.find_devices(), machine.list_packages()
    label = (
        f"{len(devices.names)} x {devices.names[0]}" if device.type == "cuda" else f"CPU, {devices.num_cores} cores"
    )
    versions = {package.name: package.version for package in packages if package.version}
    libraries = {package.name: package.notes for package in packages if package.notes}
    return {
        "device": label,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python scripts/gpu_check.py", *words]),
        "versions": {**versions, **{f"{name} with": notes for name, notes in libraries.items()}},
        "capability": devices.capability,
        "memory": devices.memory,
    }


if __name__ == "__main__":
    sys.exit(main())
