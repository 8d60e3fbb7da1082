"""The log of a run: `log.jsonl` in its folder, one line for every row that the Trainer logs.

Training rows have `step`, `tokens` (of full sequences so far), `loss` (with a vision vocabulary also `text_loss` and
`vision_loss`), `lr`, `grad_norm`, `tokens_per_second` (all processes), `mfu` (if the peak of the device is known) and
`peak_memory_gb`; evaluations have `step`, `tokens` and their losses. MFU counts the model FLOPs of causal sequences of
max_length, as the planner does.
"""

import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ring_hf.costmodel.devices import DEVICES
from ring_hf.hf.trainer.modality_losses import MODALITIES
from ring_hf.planner.model_config import parse_config
from ring_hf.planner.step_times import model_flops_per_token
from ring_hf.verify.training_steps import planner_device

LOG = "log.jsonl"
MODALITY_LOSSES = [f"{name}_loss" for name in MODALITIES]


class RunLog(TrainerCallback):
    """Writes `log.jsonl` in the first process.

    Rows of steps that an interrupted run had taken after its last checkpoint are removed when it continues.

    Args:
        tokens_per_step (`int`): of an optimizer step, over all processes.
        flops_per_token: of a forward and a backward; None if not known.
        peak_flops: FLOP/s of a device; None if not known.
        world_size (`int`): number of devices.
    """

    def __init__(self, tokens_per_step: int, flops_per_token: float | None, peak_flops: float | None, world_size: int):
        self.tokens_per_step = tokens_per_step
        self.world_size = world_size
        self._utilization = (
            None if flops_per_token is None or peak_flops is None else flops_per_token / (peak_flops * world_size)
        )
        self._last_step, self._last_time = 0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._last_step, self._last_time = state.global_step, time.perf_counter()
        if state.is_world_process_zero:
            path = Path(args.output_dir) / LOG
            path.parent.mkdir(parents=True, exist_ok=True)
            write_rows(path, [row for row in read_rows(path) if row["step"] <= state.global_step])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or not state.is_world_process_zero:
            return
        row: dict[str, Any] = {"step": state.global_step, "tokens": state.global_step * self.tokens_per_step}
        if "loss" in logs:
            row |= {"loss": logs["loss"], "lr": logs.get("learning_rate"), "grad_norm": logs.get("grad_norm")}
            row |= {key: logs[key] for key in MODALITY_LOSSES if key in logs}
            row |= self._measure(args, state, logs)
        else:
            row |= {key: value for key, value in logs.items() if key.startswith("eval_") and key.endswith("loss")}
        if len(row) > 2:
            with (Path(args.output_dir) / LOG).open("a") as file:
                file.write(json.dumps(row) + "\n")

    def _measure(self, args: Any, state: Any, logs: dict[str, Any]) -> dict[str, float]:
        now, num_steps = time.perf_counter(), state.global_step - self._last_step
        rate = num_steps * self.tokens_per_step / max(now - self._last_time, 1e-9)
        self._last_step, self._last_time = state.global_step, now
        measures = {"tokens_per_second": round(rate, 1)}
        if self._utilization is not None:
            measures["mfu"] = round(rate * self._utilization, 4)
        measures["peak_memory_gb"] = logs.get("peak_memory_gb", round(peak_memory_bytes(args.device) / 1e9, 3))
        if state.log_history and state.log_history[-1].get("step") == state.global_step:  # also for trackers' readers
            state.log_history[-1].update(measures)
        logs.update(measures)  # trackers, which come later, report them as well
        return measures


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory that CUDA allocated, or on a CPU that of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def flops_per_token(config: Any, max_length: int) -> float | None:
    """Return the model FLOPs per token of a step, None if the planner does not know the architecture."""
    try:
        model = parse_config(config.to_dict(), config.model_type, "the configuration")
    except ValueError:
        return None
    return model_flops_per_token(model, max_length)


def peak_flops(device: torch.device, peak_tflops: float | None) -> float | None:
    """Return the FLOP/s of a device: those given, else of the data sheet of a known GPU, else None."""
    if peak_tflops is not None or device.type != "cuda":
        return None if peak_tflops is None else peak_tflops * 1e12
    properties = torch.cuda.get_device_properties(device)
    name = planner_device(properties.name, properties.total_memory)
    return None if name is None else DEVICES[name].peak


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a log; a last line that was cut off by a kill is left out."""
    if not path.is_file():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace a log, so that a kill leaves the old or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary.replace(path)
