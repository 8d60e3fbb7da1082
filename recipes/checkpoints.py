"""The checkpoints of a run: the one to continue from, and whether the run is finished.

A process can be killed while it writes. The Trainer writes a checkpoint's `trainer_state.json` after all other files
of the first process, and `train_and_save` writes that of the run last of all; a folder without a readable one, or with
a file that is cut off, is therefore incomplete and not continued from.
"""

import json
import re
import zipfile
from pathlib import Path
from typing import Any

from run_start import REACHED
from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments

STATE = "trainer_state.json"
UNFINISHED = "checkpoint-is-incomplete.txt"  # of a checkpoint at SIGTERM, while the Trainer writes it
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def find_checkpoint(training_args: TrainingArguments) -> str | None:
    """Return the checkpoint to continue from: that of resume_from_checkpoint (`none`: no one), else the last complete
    one of output_dir."""
    if training_args.resume_from_checkpoint is not None:
        requested = str(training_args.resume_from_checkpoint)
        return None if requested.lower() in ("none", "false") else requested
    checkpoint = last_checkpoint(Path(str(training_args.output_dir)))
    return None if checkpoint is None else str(checkpoint)


def last_checkpoint(folder: Path) -> Path | None:
    """Return the complete checkpoint with the most steps in a run's folder, or None."""
    folders = [path for path in folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    newest_first = sorted(folders, key=lambda path: int(path.name.partition("-")[2]), reverse=True)
    return next((path for path in newest_first if is_complete(path)), None)


def is_complete(checkpoint: Path) -> bool:
    """Return whether all files of a checkpoint can be read to their end."""
    if read_state(checkpoint) is None or (checkpoint / UNFINISHED).exists():
        return False
    archives = [path for pattern in ("*.pt", "*.pth", "*.bin") for path in checkpoint.rglob(pattern)]
    return (
        all(map(zipfile.is_zipfile, archives))
        and all(map(_is_whole, checkpoint.glob("*.safetensors")))
        and all((path.parent / ".metadata").is_file() for path in checkpoint.glob("*/*.distcp"))
    )


def _is_whole(weights: Path) -> bool:
    """Return whether a safetensors file has the length that its header says."""
    try:
        with safe_open(weights, "pt"):
            return True
    except SafetensorError:
        return False


def read_state(folder: Path) -> dict[str, Any] | None:
    """Return the state that the Trainer wrote to a folder; None if there is none, or it was cut off."""
    try:
        return dict(json.loads((folder / STATE).read_text()))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def has_nothing_left(checkpoint: str | None, training_args: TrainingArguments) -> bool:
    """Return whether a run is finished, which the first process then says.

    The Trainer would take one more step each time it is started.
    """
    if checkpoint is None or not is_finished(checkpoint, training_args):
        return False
    if training_args.process_index == 0:
        print(f"{checkpoint} is the end of this run: nothing left to train. Raise max_steps, or change output_dir.")
    return True


def is_finished(checkpoint: str, training_args: TrainingArguments) -> bool:
    """Return whether the run of this checkpoint took all its steps and saved its model."""
    state = read_state(Path(str(training_args.output_dir)))
    if state is None or state["global_step"] < (read_state(Path(checkpoint)) or {}).get("global_step", 0):
        return False
    if any(REACHED in row for row in state["log_history"]):
        return True
    if training_args.max_steps > 0:
        return bool(state["global_step"] >= training_args.max_steps)
    finished_epochs = training_args.num_train_epochs <= state["num_train_epochs"]
    return bool(state["global_step"] >= state["max_steps"] and finished_epochs)
