"""Trains on an engine as a user's script does: `accelerate launch ... tests/engines/train_script.py FOLDER FAMILY`.

All runs of a family of engines and a world size happen in one launch. Rank 0 writes FOLDER/results.json.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.engines.cases import (
    AT_LOADING,
    EngineCase,
    engine_arguments,
    family_of,
    reference_cases,
    state_of,
    world_cases,
)
from tests.engines.jobs import (
    EVALUATIONS,
    RESUMES,
    count,
    evaluate,
    loop,
    make_trainer,
    refuse_at_loading,
    resume,
    save,
    take_trials,
)
from tests.trainer.train_script import curves


def train(case: EngineCase, folder: Path) -> dict[str, Any]:
    with engine_arguments(case.engine, case.on_host) as more:
        trainer = make_trainer(case, folder, more)
        trainer.train()
        return {**state_of(trainer), **curves(trainer)}


def jobs(family: str, world_size: int, folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the jobs of this launch by name."""
    cases = reference_cases() if world_size == 1 else world_cases(world_size, family)
    by_name: dict[str, Callable[[], dict[str, Any]]] = {case.name: partial(train, case, folder) for case in cases}
    evaluated = [("DDP", 1)] if world_size == 1 else sorted(EVALUATIONS)
    if world_size == 1:
        by_name["final"] = partial(save, folder)
        by_name["loop on DDP"] = partial(loop, "DDP", folder)
    for engine, size in evaluated:
        if size == world_size and (size == 1 or family_of(engine) == family):
            by_name[f"evaluation on {engine}"] = partial(evaluate, engine, size, folder)
    for engine in ("FSDP2", "ZeRO-3"):
        if world_size == 2 and family_of(engine) == family:
            by_name[f"loop on {engine}"] = partial(loop, engine, folder)
        if world_size == 2 and family_of(engine) == family:
            by_name[f"collectives of {engine}"] = partial(count, engine, folder)
            by_name[f"trials on {engine}"] = partial(take_trials, engine, folder)
    if (world_size, family) == (2, family_of(AT_LOADING)):
        by_name["refusals at loading"] = partial(refuse_at_loading, folder)
    for case in RESUMES:
        sizes = {cp * dp for cp, dp in (case.before, case.after)}
        if world_size in sizes and family_of(case.engine) == family:
            by_name[case.name] = partial(resume, case, folder)
    return by_name


def main() -> None:
    gc.freeze()  # see tests/support/freeze.py
    folder, family = Path(sys.argv[1]), sys.argv[2]
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    selection = os.environ.get("CASES", "").split(",")
    results: dict[str, Any] = {}
    for name, job in jobs(family, world_size, folder).items():
        if any(text in name for text in selection):
            start_time = time.perf_counter()
            results[name] = {**job(), "seconds": time.perf_counter() - start_time}
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
