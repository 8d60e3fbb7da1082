"""The files of a run of stages, and whether they agree with its YAML.

output_dir/
  stages.json             what is finished: steps, tokens, why each stage ended
  log.jsonl               the rows of all stages, with `stage` and the tokens since the first
  stages.md, stages.png   the report
  stage-00-base/          perplexity of the base model
  stage-01-NAME/          run.yaml, output.log, the model, its checkpoints, its log.jsonl and perplexity.json
"""

import json
from pathlib import Path
from typing import Any

import yaml
from checkpoints import read_state
from run_log import LOG, read_rows, write_rows
from run_start import REACHED
from stages import Stage

from ring_hf.hf import last_checkpoint

RECORD, RUN, OUTPUT = "stages.json", "run.yaml", "output.log"
# Keys that change no number of a stage: they may differ from those it was begun with.
FREE_KEYS = {"report_to", "run_name", "logging_dir", "save_steps", "save_total_limit", "disable_tqdm", "card_notes"}
FREE_KEYS |= {"push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_revision"}
FREE_KEYS |= {"num_proc", "dataloader_num_workers", "peak_tflops", "perplexity_windows", "perplexity_lengths"}


def write_text(path: Path, text: str) -> None:
    """Replace a file, so that a kill leaves the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def is_finished(stage: Stage) -> bool:
    """Return whether a stage took its steps, or ended early, and wrote its model."""
    state = read_state(stage.folder)
    if state is None:
        return False
    return bool(state["global_step"] >= stage.num_steps) or end_reason(stage) is not None


def end_reason(stage: Stage) -> str | None:
    """Return why a stage ended before its budget was spent, None if it did not."""
    state = read_state(stage.folder)
    rows = [row for row in (state or {}).get("log_history", []) if REACHED in row]
    return f"perplexity {rows[-1][REACHED]:.3f} <= {rows[-1]['limit']:.3f}" if rows else None


def taken_steps(stage: Stage) -> int:
    """Return the steps of a finished stage, else of its last complete checkpoint."""
    folder = stage.folder if is_finished(stage) else last_checkpoint(stage.folder)
    state = None if folder is None else read_state(folder)
    return int(state["global_step"]) if state else 0


def check_files(stages: list[Stage], output_dir: Path) -> None:
    """Raise if a stage was begun with other values, or is on disk and not in the YAML.

    Raises:
        ValueError: with the key and both values.
    """
    names = {stage.folder.name for stage in stages} | {"stage-00-base"}
    foreign = sorted(
        path.name for path in output_dir.glob("stage-*") if path.name not in names and (path / RUN).is_file()
    )
    if foreign:
        raise ValueError(
            f"{output_dir} has {', '.join(foreign)}, which the YAML does not name; it has "
            f"{', '.join(stage.folder.name for stage in stages)}. Stages that were begun keep their order and names: "
            "take the YAML back, or another output_dir."
        )
    for stage in stages:
        path = stage.folder / RUN
        if not path.is_file():
            continue
        begun = yaml.safe_load(path.read_text())
        differences = find_differences(begun, stage.values)
        if differences:
            state = "finished" if is_finished(stage) else "begun"
            lines = "\n".join(f"  {key}: {old!r} on disk, {new!r} in the YAML" for key, old, new in differences)
            raise ValueError(
                f"{stage.title} was {state} with other values ({path}):\n{lines}\nTake the YAML back, name another "
                f"output_dir, or remove {stage.folder} and the stages after it to train them again."
            )


def find_differences(begun: dict[str, Any], values: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (key, value on disk, value now) of all keys that matter and differ."""
    ignored = FREE_KEYS | {"until_perplexity", "optimizer_from"}  # these follow from files
    keys = sorted((begun.keys() | values.keys()) - ignored)
    return [(key, begun.get(key), values.get(key)) for key in keys if begun.get(key) != values.get(key)]


def write_record(stages: list[Stage], output_dir: Path) -> None:
    """Write stages.json."""
    finished = [
        {
            "stage": stage.index,
            "name": stage.name,
            "folder": str(stage.folder),
            "steps": taken_steps(stage),
            "tokens": taken_steps(stage) * stage.batch.num_tokens,
            "ended_by": end_reason(stage) or "budget",
        }
        for stage in stages
        if is_finished(stage)
    ]
    write_text(output_dir / RECORD, json.dumps({"finished": finished}, indent=1) + "\n")


def merge_logs(stages: list[Stage], output_dir: Path) -> list[dict[str, Any]]:
    """Write the log of all stages, and return its rows: tokens count from the first stage on."""
    rows, start = [], 0
    for stage in stages:
        own = read_rows(stage.folder / LOG)
        rows += [{"stage": stage.name, **row, "tokens": start + row["tokens"]} for row in own]
        start += taken_steps(stage) * stage.batch.num_tokens
    write_rows(output_dir / LOG, rows)
    return rows
