"""Memory and time of each stage on a GPU, predicted by the planner from the values of the run."""

from dataclasses import dataclass
from typing import Any

from stages import Stage

from ring_hf.costmodel.devices import DEVICES, GIB
from ring_hf.planner import Model, TrainingJob, read_model
from ring_hf.planner.memory_estimate import estimate_memory
from ring_hf.planner.model_config import parse_config
from ring_hf.planner.step_times import estimate_times
from ring_hf.text import markdown_table

CHECKPOINTS = {"none": "none", "recompute": "full", "save": "save-attention"}
# TRL's SFTTrainer takes the loss in tiles of 4,096 tokens and 32,768 words, as large as 1,024 tokens of 131,072.
_TRL_LOSS_BLOCK = 1024
_OFFLOADED = {"layers": ("layers",), "attention": ("attention",), "all": ("layers", "attention"), None: ()}


def plan_model(top: dict[str, Any]) -> Model:
    """Return the model of a file of stages as the planner knows it.

    Raises:
        ValueError: if it does not.
    """
    model = top.get("plan_model") or top.get("model") or top.get("model_config")
    return parse_config(model, "the model", "the YAML") if isinstance(model, dict) else read_model(str(model))


def make_job(stage: Stage, device: str, model: Model) -> TrainingJob:
    """Return the planner's job of a stage.

    Args:
        stage: a resolved stage.
        device (`str`): a name of `DEVICES`.
        model: the result of `plan_model`.

    Raises:
        ValueError: if the settings cannot run.
    """
    values, settings = stage.values, stage.launch.settings
    num_devices, is_deepspeed = stage.launch.num_processes, stage.launch.engine == "DEEPSPEED"
    zero = {"FSDP": 3, "DEEPSPEED": int(settings.get("zero_stage", 2))}.get(stage.launch.engine, 0)
    checkpoint = CHECKPOINTS[values.get("memory_attention", "none")]
    if checkpoint == "none" and (values.get("gradient_checkpointing") or values.get("activation_checkpointing")):
        checkpoint = "full"
    return TrainingJob(
        model,
        stage.batch.max_length,
        devices=num_devices,
        device=device,
        per_node=num_devices // stage.launch.num_machines,
        cp=int(values.get("context_parallel_size") or 1),
        batch_size=stage.batch.rows,
        zero=zero,
        optimizer=str(values.get("optim", "adamw_torch_fused")),
        precision="bf16-master" if is_deepspeed else "bf16" if values.get("dtype") == "bfloat16" else "auto",
        offload=(*_offloaded_states(settings), *_OFFLOADED[values.get("memory_offload")]),
        checkpoint=checkpoint,
        ffn_block=_block(values, "ffn_block"),
        loss_block=_block(values, "loss_block") or _own_loss_block(stage),
        layout=_layout(values),
        transport=str(values.get("transport") or "auto"),
        ulysses=_ulysses(values),
        inner=int(values.get("inner_ring_size") or 1),
        head_chunks=int(values.get("head_chunks") or 1),
        kernel=str(values.get("kernel") or "auto"),
        fused=bool(values.get("use_liger_kernel")),
    )


def _offloaded_states(settings: dict[str, Any]) -> tuple[str, ...]:
    """Return the states that the options of an engine keep in host memory."""
    if str(settings.get("fsdp_offload_params", "false")).lower() == "true":
        return ("optimizer", "weights")
    names = (("optimizer", "offload_optimizer_device"), ("weights", "offload_param_device"))
    return tuple(name for name, key in names if settings.get(key, "none") not in ("none", None))


def _block(values: dict[str, Any], key: str) -> int:
    value = str(values.get(key) or 0)
    if not value.isdigit():
        raise ValueError(f"{key}={value}: the planner needs a number of tokens. Write one instead of {value}.")
    return int(value)


def _own_loss_block(stage: Stage) -> int:
    """Return the block of a Trainer that takes its loss in blocks by itself, 0 for others."""
    is_trl = stage.recipe == "sft" and stage.values.get("loss_weighting", "tokens") == "tokens"
    return _TRL_LOSS_BLOCK if is_trl else 0


def _layout(values: dict[str, Any]) -> str:
    """Return the layout of an attention backend; the planner has one for all whose ranks work equally."""
    name = str(values.get("attn_implementation", "ring_zigzag")).removeprefix("ring_")
    return {"ulysses": "contiguous", "balanced": "zigzag"}.get(name, name)


def _ulysses(values: dict[str, Any]) -> int:
    if values.get("attn_implementation") == "ulysses":
        return int(values.get("context_parallel_size") or 1)
    size = values.get("ulysses_size") or 1
    return 0 if size == "auto" else int(size)


@dataclass(frozen=True)
class Estimate:
    """The prediction of one stage.

    Attributes:
        gib: memory on a device.
        capacity: GiB that a device has.
        micro_batch, step: seconds.
        hours: of all steps.
        rate: tokens/s of a device.
    """

    gib: float
    capacity: float
    micro_batch: float
    step: float
    hours: float
    rate: float


def estimates(stages: list[Stage], device: str, model: Model) -> list[Estimate]:
    """Return the predictions of stages on a device.

    Args:
        device (`str`): a name of `DEVICES`.
        model: the result of `plan_model`.
    """
    results = []
    for stage in stages:
        job = make_job(stage, device, model)
        times, memory = estimate_times(job), estimate_memory(job).allocated / GIB
        step = times.step * stage.batch.accumulation
        hours = step * stage.num_steps / 3600
        capacity = job.device_spec.memory / GIB
        results.append(Estimate(memory, capacity, times.step, step, hours, times.tokens_per_device))
    return results


def format_estimates(stages: list[Stage], device: str, top: dict[str, Any]) -> str:
    """Return a table of predicted memory and time of the stages on a device.

    Args:
        device (`str`): a name of `DEVICES`; "" for h100.
        top: top-level values of the file.

    Raises:
        ValueError: as `plan_model` and `make_job`, or if the device is not known.
    """
    name = device or "h100"
    if name not in DEVICES:
        raise ValueError(f"--plan {device}: choose one of {', '.join(DEVICES)}.")
    rows = [["stage", "GiB per device", "s per micro-batch", "s per step", "steps", "hours", "tokens/s per device"]]
    for stage, estimate in zip(stages, estimates(stages, name, plan_model(top)), strict=True):
        rows.append(
            [
                f"{stage.index} {stage.name}",
                f"{estimate.gib:.1f} of {estimate.capacity:.0f}",
                f"{estimate.micro_batch:.1f}",
                f"{estimate.step:,.1f}",
                f"{stage.num_steps:,}",
                f"{estimate.hours:,.1f}",
                f"{estimate.rate:,.0f}",
            ]
        )
    heading = f"predicted on {DEVICES[name].name} (ring-hf plan --help has the assumptions)"
    return f"{heading}\n\n{markdown_table(rows, align='lrrrrrr')}"
