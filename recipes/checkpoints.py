"""The checkpoints of a run: the one to continue from, and whether the run is finished.

A process can be killed while it writes a checkpoint: `ring_hf.hf.last_checkpoint` takes whole ones only. The state of
the run is written last of all by `train_and_save`, so a run that has one is finished.
"""

import json
from pathlib import Path
from typing import Any

from run_start import REACHED
from transformers import TrainingArguments

from ring_hf.hf import last_checkpoint

STATE = "trainer_state.json"


def find_checkpoint(training_args: TrainingArguments) -> str | None:
    """Return the checkpoint to continue from: that of resume_from_checkpoint (`none`: no one), else the last complete
    one of output_dir."""
    if training_args.resume_from_checkpoint is not None:
        requested = str(training_args.resume_from_checkpoint)
        return None if requested.lower() in ("none", "false") else requested
    checkpoint = last_checkpoint(Path(str(training_args.output_dir)))
    return None if checkpoint is None else str(checkpoint)


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
