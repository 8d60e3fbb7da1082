"""Memory and time of each stage on a GPU, predicted by the planner from the values of the run."""

from typing import Any

from stages import Stage

from ring_hf.costmodel.devices import DEVICES, GIB
from ring_hf.planner import TrainingJob, read_model
from ring_hf.planner.memory_estimate import estimate_memory
from ring_hf.planner.step_times import estimate_times
from ring_hf.text import markdown_table

CHECKPOINTS = {"none": "none", "recompute": "full", "save": "save-attention"}
_OFFLOADED = {"layers": ("layers",), "attention": ("attention",), "all": ("layers", "attention"), None: ()}


def make_job(stage: Stage, device: str, model: str | None = None) -> TrainingJob:
    """Return the planner's job of a stage.

    Args:
        stage: a resolved stage.
        device (`str`): a name of `DEVICES`.
        model (`str`, *optional*): folder or name that the planner knows, instead of the stage's.

    Raises:
        ValueError: if the planner does not know the model, or the settings cannot run.
    """
    values, settings = stage.values, stage.launch.settings
    num_devices, is_deepspeed = stage.launch.num_processes, stage.launch.engine == "DEEPSPEED"
    zero = {"FSDP": 3, "DEEPSPEED": int(settings.get("zero_stage", 2))}.get(stage.launch.engine, 0)
    checkpoint = CHECKPOINTS[values.get("memory_attention", "none")]
    if checkpoint == "none" and (values.get("gradient_checkpointing") or values.get("activation_checkpointing")):
        checkpoint = "full"
    return TrainingJob(
        read_model(str(model or values["model"])),
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
        loss_block=_block(values, "loss_block"),
        layout=_layout(values),
        transport=str(values.get("transport") or "auto"),
        ulysses=_ulysses(values),
        inner=int(values.get("inner_ring_size") or 1),
        head_chunks=int(values.get("head_chunks") or 1),
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


def _layout(values: dict[str, Any]) -> str:
    """Return the layout of an attention backend; the planner has one for all whose ranks work equally."""
    name = str(values.get("attn_implementation", "ring_zigzag")).removeprefix("ring_")
    return {"ulysses": "contiguous", "balanced": "zigzag"}.get(name, name)


def _ulysses(values: dict[str, Any]) -> int:
    if values.get("attn_implementation") == "ulysses":
        return int(values.get("context_parallel_size") or 1)
    size = values.get("ulysses_size") or 1
    return 0 if size == "auto" else int(size)


def format_estimates(stages: list[Stage], device: str, model: str | None = None) -> str:
    """Return a table of predicted memory and time of the stages on a device.

    Args:
        device (`str`): a name of `DEVICES`; "" for h100.
        model (`str`, *optional*): for the planner, instead of the stages' own.

    Raises:
        ValueError: as `make_job`, or if the device is not known.
    """
    name = device or "h100"
    if name not in DEVICES:
        raise ValueError(f"--plan {device}: choose one of {', '.join(DEVICES)}.")
    base = model or str(stages[0].values.get("model"))  # later stages start from a folder that may not exist yet
    rows = [["stage", "GiB per device", "s per micro-batch", "s per step", "steps", "hours", "tokens/s per device"]]
    for stage in stages:
        job = make_job(stage, name, base)
        times, memory = estimate_times(job), estimate_memory(job)
        step = times.step * stage.batch.accumulation
        rows.append(
            [
                f"{stage.index} {stage.name}",
                f"{memory.allocated / GIB:.1f} of {job.device_spec.memory / GIB:.0f}",
                f"{times.step:.1f}",
                f"{step:,.1f}",
                f"{stage.num_steps:,}",
                f"{step * stage.num_steps / 3600:,.1f}",
                f"{times.tokens_per_device:,.0f}",
            ]
        )
    heading = f"predicted on {DEVICES[name].name} (ring-hf plan --help has the assumptions)"
    return f"{heading}\n\n{markdown_table(rows, align='lrrrrrr')}"
