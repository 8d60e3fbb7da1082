"""Which engines run here, and what a rank would hold under each of a model that is trained with fp32 AdamW."""

from collections.abc import Mapping
from typing import Any

from ..planner import Job
from ..planner.engine_bytes import engine_of
from ..planner.memory_estimate import memory_of
from ..planner.model_config import parse
from .facts import Devices, EngineFact, Package, Query

STATES = ("weights", "gradients", "gradient buckets (DDP)", "optimizer states")
# What `ring-hf plan` calls each: DDP, FSDP2, and the stages of DeepSpeed.
SETTINGS: tuple[dict[str, Any], ...] = (
    {"zero": 0},
    {"zero": 3},
    *({"zero": stage, "precision": "bf16-master"} for stage in (1, 2, 3)),
)


def find_engines(
    question: Query, keys: Mapping[str, Any], devices: Devices, packages: tuple[Package, ...]
) -> tuple[EngineFact, ...]:
    """Return every engine, why it cannot run on this machine, and bytes of a rank where the planner can count them."""
    try:
        model = parse(keys, question.model, question.model)
    except ValueError:
        return ()  # layers that the planner cannot count
    facts = []
    for settings in SETTINGS:
        job = Job(model, question.sequence, devices=question.ranks, **settings)
        held = sum(item.num_bytes for item in memory_of(job).items if item.name in STATES)
        name = engine_of(job).name
        facts.append(EngineFact(name, round(held), _missing(name, devices, packages)))
    return tuple(facts)


def _missing(name: str, devices: Devices, packages: tuple[Package, ...]) -> str | None:
    if name.startswith("FSDP") and devices.kind != "cuda":
        return "Accelerate has no FSDP on CPUs"
    deepspeed = next((package for package in packages if package.name == "deepspeed"), None)
    if name.startswith("DeepSpeed") and (deepspeed is None or deepspeed.found is None or not deepspeed.fits):
        return "the package deepspeed is not installed, or too old"
    return None
