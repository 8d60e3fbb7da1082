"""Which checkpoints are whole: a process can be killed, or a disk be full, while one is written.

The Trainer writes `trainer_state.json` after all other files of the first process, and every process writes the state
of its random numbers after its other files. A checkpoint is whole if it has them all, and every file can be read to
its end. `MANIFEST` says how many processes wrote it.

`train(resume_from_checkpoint=True)` of Transformers takes the newest folder as it is. With a `ContextParallelConfig`,
it takes the newest whole one.
"""

import json
import logging
import re
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import trainer as transformers_trainer

from ring_hf.parallel import assert_equal_across_ranks

logger = logging.getLogger("ring_hf")

STATE = "trainer_state.json"
MANIFEST = "context_parallel.json"
UNFINISHED = "checkpoint-is-incomplete.txt"  # of a checkpoint at SIGTERM, while the Trainer writes it
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def last_checkpoint(folder: str | Path) -> Path | None:
    """Return the whole checkpoint with the most steps in a Trainer's output folder, or None.

    A newer one that is not whole is logged with the reason.
    """
    folders = [path for path in Path(folder).glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
    for path in sorted(folders, key=lambda path: int(path.name.partition("-")[2]), reverse=True):
        damage = find_damage(path)
        if damage is None:
            return path
        logger.warning("%s is not whole (%s) and not continued from.", path, damage)
    return None


def find_damage(checkpoint: str | Path) -> str | None:
    """Return why a checkpoint is not whole, or None if it is.

    Args:
        checkpoint: a folder `checkpoint-N` of a Trainer, of any engine.
    """
    folder = Path(checkpoint)
    if read_state(folder) is None:
        return f"no readable {STATE}"
    if (folder / UNFINISHED).exists():
        return f"{UNFINISHED} is there"
    archives = sorted(path for pattern in ("*.pt", "*.pth", "*.bin") for path in folder.rglob(pattern))
    cut_off = [path for path in archives if not zipfile.is_zipfile(path)]
    cut_off += [path for path in sorted(folder.rglob("*.safetensors")) if not _is_whole(path)]
    if cut_off:
        return f"{cut_off[0].relative_to(folder)} is cut off"
    if any(not (path.parent / ".metadata").is_file() for path in folder.glob("*/*.distcp")):
        return "shards without .metadata"
    return _find_missing_shard(folder) or _find_missing_rank(folder)


def _find_missing_shard(folder: Path) -> str | None:
    """Return which file of weights is missing that the index of a model in several files names, or None."""
    for index in folder.glob("*.index.json"):
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (json.JSONDecodeError, KeyError):
            return f"no readable {index.name}"
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing:
            return f"{missing[0]} is missing"
    return None


def _find_missing_rank(folder: Path) -> str | None:
    """Return which rank has not written its files, or None."""
    ranks = {int(path.stem.rpartition("_")[2]) for path in folder.glob("rng_state_*.pth")}
    if not ranks:
        return None  # one process, or save_only_model
    num_processes = max(ranks) + 1 if max(ranks) else 2  # a single process writes rng_state.pth
    if (folder / MANIFEST).is_file():
        num_processes = json.loads((folder / MANIFEST).read_text())["num_processes"]
    missing = sorted(set(range(num_processes)) - ranks)
    if missing:
        return f"rank {missing[0]} has not written its state"
    shards = {path.parent for path in folder.glob("global_step*/*zero_pp_rank_*_optim_states.pt")}
    for parent in shards:
        if len(list(parent.glob("*zero_pp_rank_*_optim_states.pt"))) != num_processes:
            return f"{parent.name} has not the shards of {num_processes} ranks"
    return None


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


def write_manifest(args: Any, step: int) -> None:
    """Write how many processes write the checkpoint of a step. Called in the process that writes the state.

    Args:
        args: `TrainingArguments`. With `save_on_each_node`, a folder holds the files of some processes only.
    """
    folder = Path(args.output_dir) / f"checkpoint-{step}"
    if folder.is_dir() and args.should_save and not args.save_on_each_node:
        temporary = folder / f"{MANIFEST}.tmp"
        temporary.write_text(json.dumps({"num_processes": args.world_size}) + "\n")
        temporary.replace(folder / MANIFEST)


def take_whole_checkpoints() -> None:
    """Have `train(resume_from_checkpoint=True)` of all Trainers in this process take the newest whole checkpoint."""
    transformers_trainer.get_last_checkpoint = _choose_checkpoint


def _choose_checkpoint(folder: str) -> str | None:
    """Return the newest whole checkpoint. A collective call of all processes.

    Raises:
        ValueError: on every rank, if the ranks see different checkpoints.
    """
    path = last_checkpoint(folder)
    chosen = None if path is None else str(path)
    assert_equal_across_ranks({"the checkpoint to resume from": chosen})
    return chosen
