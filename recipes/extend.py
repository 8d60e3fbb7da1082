"""Extend the context of a model in stages, each from the weights of the last one, with one command:

    python recipes/extend.py configs/extend/tiny.yaml
    python recipes/extend.py configs/extend/prolong.yaml --plan          # print the stages, and start nothing

The YAML file holds the defaults of all stages and a list of them (docs/stages.md). Every stage is a launch of its own,
so it can use other engines and degrees; its resolved run, log and model are in output_dir/stage-NN-NAME. Top-level
values can be replaced on the command line: `--model <hub id or folder> --output_dir runs/mine`.

The same command continues after a kill at any point. Ctrl-C and SIGTERM end all processes first.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from processes import Interrupted, run_child
from refusals import run
from run_log import LOG, read_rows
from stage_files import (
    OUTPUT,
    RUN,
    check_files,
    end_reason,
    is_finished,
    merge_logs,
    taken_steps,
    write_record,
    write_text,
)
from stage_plan import format_estimates
from stage_report import draw_report, format_plan, format_report
from stages import STAGE_KEYS, TOP_KEYS, Stage, measurement, read_stages, with_measured_values
from tqdm import tqdm

from ring_hf.data.run_options import read_yaml

SHARED_FOLDER = 120.0  # seconds that a file of another machine may take to appear
USAGE = "usage: extend.py stages.yaml [--key value ...] [--plan [device]]"


def main() -> None:
    argv = sys.argv[1:]
    if not argv or "--help" in argv or "-h" in argv:
        print(format_help())
        sys.exit(0)
    path, overrides, plan_device = parse_command_line(argv)
    stages, top = read_stages(path, overrides)
    output_dir = Path(str(top.get("output_dir", "runs/extend")))
    print(f"{path}: {len(stages)} stages in {output_dir}\n\n{format_plan(stages)}\n")
    for stage in stages:
        for warning in stage.warnings:
            print(f"{stage.title}: {warning}\n")
    if plan_device is not None:
        print(format_estimates(stages, plan_device, top))
        return
    check_files(stages, output_dir)
    Extension(stages, output_dir, measurement(stages, top)).run()


def parse_command_line(argv: list[str]) -> tuple[str, dict[str, Any], str | None]:
    """Return the file, the values that replace its own, and the device of --plan ("" without one, None without it).

    Raises:
        ValueError: if it is not `file [--key value ...]`.
    """
    path, *rest = argv
    if path.startswith("-") or not Path(path).is_file():
        raise ValueError(f"the first argument {path!r} is not a file. {USAGE}")
    overrides: dict[str, Any] = {}
    plan_device = None
    while rest:
        word = rest.pop(0)
        key, separator, value = word.partition("=")
        if not word.startswith("--") or (key == "--plan" and separator):
            raise ValueError(f"{word!r} is not a --key. {USAGE}")
        if key == "--plan":
            plan_device = rest.pop(0) if rest and not rest[0].startswith("--") else ""
            continue
        if not separator:
            if not rest:
                raise ValueError(f"{word} has no value. {USAGE}")
            value = rest.pop(0)
        overrides[key.removeprefix("--")] = read_yaml(key, value)
    return path, overrides, plan_device


def format_help() -> str:
    keys = "\n".join(f"  {key:32} {text}" for key, text in {**TOP_KEYS, **STAGE_KEYS}.items())
    return f"{USAGE}\n\n{__doc__}\nkeys besides those of recipes/finetune.py --help:\n{keys}"


class Extension:
    """A run of stages: launches those that are not finished, one after the other.

    Args:
        stages: all of them.
        output_dir: shared by all machines; only that of rank 0 writes.
        base: the measurement before the first stage, None without one.
    """

    def __init__(self, stages: list[Stage], output_dir: Path, base: Stage | None):
        self.stages = stages
        self.output_dir = output_dir
        self.base = base
        self.writes = all(stage.launch.machine_rank == 0 for stage in stages)
        self.bar: Any = None
        self.log_size = 0

    def run(self) -> None:
        """Run everything that is left.

        Raises:
            SystemExit: if a launch fails, or a signal ended it.
        """
        total = sum(self.tokens_of(stage) for stage in self.stages)
        with tqdm(total=total, unit=" tokens", unit_scale=True, smoothing=0.1, disable=not self.writes) as self.bar:
            if self.base is not None and not (self.base.folder / "perplexity.json").is_file():
                self.launch(self.base)
            for stage in self.stages:
                if not is_finished(stage):
                    self.launch(with_measured_values(stage, self.stages, self.base))
                    self.update(stage)
        if self.writes:
            report = format_report(self.stages, self.output_dir)
            picture = draw_report(self.stages, self.output_dir)
            write_text(self.output_dir / "stages.md", f"{report}\n")
            print(f"\n{report}\n\nmodel: {self.stages[-1].folder}\nplot: {picture}")

    def tokens_of(self, stage: Stage) -> int:
        """Return the tokens of a stage; of one that ended early, those it took."""
        return (taken_steps(stage) if is_finished(stage) else stage.num_steps) * stage.batch.num_tokens

    def launch(self, stage: Stage) -> None:
        """Launch one stage and wait for its end."""
        text = yaml.safe_dump(stage.values, sort_keys=False)
        if self.writes and stage.index and not self.bar.initial:  # earlier runs of this command took these
            done = sum(self.tokens_of(earlier) for earlier in self.stages if earlier.index < stage.index)
            self.bar.initial = self.bar.n = done + taken_steps(stage) * stage.batch.num_tokens
        with tempfile.TemporaryDirectory() as temporary:
            folder = stage.folder if self.writes else Path(temporary)
            if self.writes:
                self.prepare(stage)
            write_text(folder / RUN, text)
            command = stage.launch.command(str(Path(__file__).with_name(f"{stage.recipe}.py")), str(folder / RUN))
            log = folder / OUTPUT
            self.show(f"{stage.title}: starting; its output is in {log}")
            environment = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", **os.environ}
            reader = OutputReader(log, self.show)
            try:
                code = run_child(command, log, environment, lambda: self.watch(stage, reader))
            except Interrupted as signal_received:
                at = f"{taken_steps(stage):,} of {stage.num_steps:,} steps" if stage.index else "the measurement"
                self.show(
                    f"{signal_received} ended {stage.title}; {at} are saved, and no process is left. The same "
                    "command continues."
                )
                sys.exit(128 + signal_received.number)
            if code == 0 and self.wait_for_files(stage):
                return
            last = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-40:])
            sys.exit(
                f"\n{last}\n{stage.title} ended with exit status {code}. Its whole output is in {log}. The same "
                "command continues from the last checkpoint."
            )

    def wait_for_files(self, stage: Stage) -> bool:
        """Return whether a stage has written its results; on several machines, after the shared folder shows them."""
        deadline = time.monotonic() + (SHARED_FOLDER if stage.launch.num_machines > 1 else 0.0)
        while not (is_finished(stage) if stage.index else (stage.folder / "perplexity.json").is_file()):
            if time.monotonic() > deadline:
                return False
            time.sleep(1.0)
        return True

    def prepare(self, stage: Stage) -> None:
        """Write the notes for the model card: the stages before this one."""
        finished = [earlier for earlier in self.stages if earlier.index < stage.index]
        if "card_notes" in stage.values:
            table = f"{format_plan(self.stages)}\n\n{format_report(finished, self.output_dir)}"
            notes = f"## Stages\n\nStage {stage.index} of {len(self.stages)}.\n\n{table}\n"
            write_text(Path(stage.values["card_notes"]), notes)

    def watch(self, stage: Stage, reader: "OutputReader") -> None:
        """Report the progress of a stage that runs."""
        reader.read()
        path = stage.folder / LOG
        size = path.stat().st_size if path.is_file() else 0
        if stage.index and size != self.log_size:
            self.log_size = size
            self.update(stage)

    def update(self, stage: Stage) -> None:
        """Move the progress bar to the end of a stage's log; write the common log when it has grown."""
        if not self.writes:
            return
        rows = [row for row in read_rows(stage.folder / LOG) if "loss" in row]
        before = sum(self.tokens_of(earlier) for earlier in self.stages if earlier.index < stage.index)
        tokens = before + (self.tokens_of(stage) if is_finished(stage) else rows[-1]["tokens"] if rows else 0)
        self.bar.set_description(f"{stage.title} of {len(self.stages)}")
        self.bar.total = sum(self.tokens_of(other) for other in self.stages)
        self.bar.n = tokens
        if rows:
            self.bar.set_postfix(loss=f"{rows[-1]['loss']:.4f}", refresh=False)
        self.bar.refresh()
        merge_logs(self.stages, self.output_dir)
        write_record(self.stages, self.output_dir)
        if is_finished(stage):
            self.show(f"{stage.title}: finished, ended by {end_reason(stage) or 'its budget'}")

    def show(self, text: str) -> None:
        if self.writes:
            tqdm.write(text, file=sys.stderr)


class OutputReader:
    """Shows the lines of ring_hf in the output of a launch as they come."""

    def __init__(self, path: Path, show: Any):
        self.path = path
        self.show = show
        self.position = path.stat().st_size if path.is_file() else 0

    def read(self) -> None:
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self.position)
            text = file.read()
        end = text.rfind(b"\n") + 1
        self.position += end
        for line in text[:end].decode(errors="replace").splitlines():
            if line.startswith("ring_hf:"):
                self.show(f"  {line}")


if __name__ == "__main__":
    run(main)
