"""Training engines: which can run on this machine, and the bytes of states on a rank under each, with fp32 AdamW."""

from collections.abc import Mapping
from typing import Any

from ..planner import TrainingJob
from ..planner.engine_bytes import select_engine
from ..planner.memory_estimate import estimate_memory
from ..planner.model_config import parse_config
from .machine_report import Devices, EngineStatus, InstalledPackage, Query

STATES = ("weights", "gradients", "gradient buckets (DDP)", "optimizer states")
# The planner's settings of DDP, FSDP2, and the stages of DeepSpeed.
ENGINE_SETTINGS: tuple[dict[str, Any], ...] = (
    {"zero": 0},
    {"zero": 3},
    *({"zero": stage, "precision": "bf16-master"} for stage in (1, 2, 3)),
)


def find_engines(
    query: Query, config: Mapping[str, Any], devices: Devices, packages: tuple[InstalledPackage, ...]
) -> tuple[EngineStatus, ...]:
    """Return the status of every engine, or nothing if the planner cannot count the layers of this `config.json`."""
    try:
        model = parse_config(config, query.model, query.model)
    except ValueError:
        return ()
    engines = []
    for settings in ENGINE_SETTINGS:
        job = TrainingJob(model, query.seq_length, devices=query.num_ranks, **settings)
        state_bytes = sum(item.num_bytes for item in estimate_memory(job).items if item.name in STATES)
        name = select_engine(job).name
        engines.append(EngineStatus(name, round(state_bytes), _unavailable_reason(name, devices, packages)))
    return tuple(engines)


def _unavailable_reason(name: str, devices: Devices, packages: tuple[InstalledPackage, ...]) -> str | None:
    if name.startswith("FSDP") and devices.kind != "cuda":
        return "Accelerate has no FSDP on CPUs"
    deepspeed = next((package for package in packages if package.name == "deepspeed"), None)
    has_deepspeed = deepspeed is not None and deepspeed.version is not None and deepspeed.is_supported
    if name.startswith("DeepSpeed") and not has_deepspeed:
        return "the package deepspeed is not installed, or too old"
    return None
