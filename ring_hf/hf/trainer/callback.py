"""The Trainer callback: checks settings before the first step, logs the parallel degrees once and the throughput in
every training log.

`ContextParallelConfig` adds it to the Trainer's default callbacks. Adding it by hand as well is harmless. The checks
are collective: every rank constructs the Trainer, and if one rank has an error, all raise it.
"""

import logging
import resource
import time
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers import TrainerCallback

from ring_hf.parallel import LivenessWatch, group_of, warm_up

from .. import context as process
from ..checks.argument_rules import ARGUMENT_RULES, check_loader, check_memory, first_error
from ..checks.liger import check_liger
from ..checks.model_rules import MODEL_RULES
from ..checks.trainer_rules import TRAINER_RULES
from ..degrees import find_degrees_error, resolve_degrees
from ..refusal import raise_on_all_ranks, unless_recorded
from ..runtime.runtime_state import runtime_state
from .counters import correct_counters
from .engines import check_blocks, check_sharded_weights, checkpoints_layers, collect_messages, engine_of
from .evaluation_loss import wrap_compute_loss
from .exact_evaluation import current_evaluator
from .fault_handling import check_before_saving, compare_versions, compare_weights, watch_training
from .model_guard import base_model, guard_model
from .sft_trainer import check_sft_columns, shard_own_collator
from .trainer_hooks import RngSynchronizer, enable_trial_step, find_trainer, seed_workers_by_replica
from .whole_checkpoints import write_manifest

logger = logging.getLogger("ring_hf")


class ContextParallelCallback(TrainerCallback):
    """Checks and throughput logs for a Trainer whose `parallelism_config` is a `ContextParallelConfig`.

    Raises:
        ValueError: in `on_init_end` and `on_train_begin`, on every rank, if a setting, the model or the engine cannot
            be trained exactly.
    """

    def __init__(self) -> None:
        self._last_num_tokens = 0
        self._last_time = 0.0  # seconds, as of `_last_num_tokens`
        self._rng = RngSynchronizer()
        self._watch: LivenessWatch | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check the model and the arguments, and add hooks to the model."""
        self._check(args, state, model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Check again, now with the data loader, and prepare the trial step."""
        self._check(args, state, model, kwargs.get("train_dataloader"))
        context, evaluator = process.current(), current_evaluator()
        if context is None or evaluator is None:
            return
        self._watch = watch_training(args)
        guard, trainer = guard_model(model), find_trainer()
        guard.throughput_logger = self
        self._last_num_tokens = guard.num_tokens
        self._last_time = time.perf_counter()
        self._rng.record_start(args.device)
        runtime_state.loss_monitor.reset()
        guard.allowed_outputs = frozenset()
        seed_workers_by_replica(kwargs.get("train_dataloader"), context)
        guard.trainer_runs_trial = trainer is not None
        if trainer is not None:
            enable_trial_step(trainer, base_model(model), guard)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the epoch with the random numbers of the first process."""
        if process.current() is not None:
            self._rng.synchronize(args.device)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if process.current() is not None:
            guard_model(model).optimizer_step = state.global_step + 1
            self._record_progress(state.global_step + 1)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._record_progress()

    on_prediction_step = on_substep_end

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Record progress, and check weights that will be saved."""
        self._record_progress()
        context = process.current()
        # A checkpoint at SIGTERM may be requested in some processes only.
        if context is not None and control.should_save and not args.enable_jit_checkpoint:
            check_before_saving(args, model, state.global_step, context)

    on_epoch_end = on_step_end

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._record_progress()
        if process.current() is not None:
            write_manifest(args, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if process.current() is not None:
            guard = guard_model(model)
            guard.optimizer_step = None
            guard.trainer_runs_trial = False
        if self._watch is not None:
            self._watch.pause()
            self._watch = None

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if process.current() is not None:
            guard_model(model).recheck_next_forward()

            # Accelerate sets this on a model that it prepared for evaluation, and then does not wrap it for training.
            if hasattr(model, "_is_accelerate_prepared"):
                model._is_accelerate_prepared = False

    on_predict = on_evaluate

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add to the training logs this device's tokens per second (of its own shards) and peak memory in GB."""
        self._record_progress()
        context, model = process.current(), kwargs.get("model")
        if context is None or logs is None or model is None or guard_model(model).throughput_logger is not self:
            return
        if "loss" in logs:
            add_to_logs(self._measure(args, model), logs, state)

    def _record_progress(self, step: int | None = None) -> None:
        if self._watch is not None:
            self._watch.record_progress(step)

    def _measure(self, args: Any, model: Any) -> dict[str, float]:
        num_tokens = guard_model(model).num_tokens
        now = time.perf_counter()
        metrics = {"peak_memory_gb": round(_peak_memory_bytes(args.device) / 1e9, 3)}
        if now > self._last_time and num_tokens > self._last_num_tokens:
            throughput = (num_tokens - self._last_num_tokens) / (now - self._last_time)
            metrics["tokens_per_second_per_device"] = round(throughput, 1)
            self._last_num_tokens, self._last_time = num_tokens, now
        return metrics

    def _check(self, args: Any, state: Any, model: Any, loader: Any = None) -> None:
        if hasattr(args.parallelism_config, "activate"):
            args.parallelism_config.activate()
        else:
            process.reset()  # another Trainer in this process, without context parallelism
        context = process.current()
        if context is None:
            return
        compare_versions()
        inner = base_model(model)
        error = first_error(ARGUMENT_RULES, args) or unless_recorded(first_error(MODEL_RULES, inner))
        error = error or check_loader(loader)
        engine, accelerator_state = engine_of(context, inner), AcceleratorState()
        error = error or check_sharded_weights(context, inner)
        error = error or next(iter(collect_messages(engine.rules, accelerator_state, args)), None)
        error = (
            error
            or check_memory(args, inner, checkpoints_layers(accelerator_state))
            or check_blocks(engine, inner)
            or check_liger(args, inner, is_patched=loader is not None)
        )
        error = error or find_degrees_error(inner.config, context)
        trainer = find_trainer()
        if trainer is not None:
            error = error or first_error(TRAINER_RULES, trainer) or check_sft_columns(trainer)
            shard_own_collator(trainer, inner)
        degrees = None if error is not None else resolve_degrees(inner.config, context)
        raise_on_all_ranks(error, {"the parallel degrees": str(degrees)}, context)
        compare_weights(accelerator_state, inner)
        assert degrees is not None
        # Warm up here, not in `on_train_begin`, since evaluation may run without training. Repetitions do nothing.
        warm_up(group_of(context.group), args.device, degrees.ulysses_size, degrees.options.inner_ring_size)
        guard_model(model).recheck_next_forward()
        if trainer is not None:
            wrap_compute_loss(trainer, inner, guard_model(model))
            correct_counters(trainer, context)
        if guard_model(model, trainer=True).should_log() and state.is_world_process_zero:
            enable_logging()
            for notice in collect_messages(engine.notices, accelerator_state, args):
                logger.warning("%s: %s", engine, notice)
            logger.info(
                "context parallelism: %s, engine %s, %d data-parallel replicas, kernel %s, overlap %s; sequences per "
                "optimizer step: %d",
                degrees,
                engine,
                context.num_replicas,
                context.options.kernel,
                "on" if context.options.overlap else "off",
                args.per_device_train_batch_size * args.gradient_accumulation_steps * context.num_replicas,
            )


def enable_logging() -> None:
    """Print the log of ring_hf (parallel degrees, trial steps) to stderr if nobody configured its logger."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("ring_hf: %(message)s"))
        logger.addHandler(handler)


def add_to_logs(metrics: dict[str, float], logs: dict[str, Any], state: Any) -> None:
    """Add numbers to a log: for the callbacks that come after, and in the history of the Trainer."""
    logs.update(metrics)
    if state.log_history:
        state.log_history[-1].update(metrics)  # the Trainer copied `logs` before it called this callback


def _peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory that CUDA allocated, or on a CPU that of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
