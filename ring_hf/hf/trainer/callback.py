"""The Trainer callback: refuses wrong settings before the first step, logs the layout once and the speed always.

`ContextParallelConfig` adds it to the Trainer's default callbacks, so the user need not. Adding it by hand too does no
harm. The checks are collective: every rank constructs the Trainer, and all raise the same error if one has one.
"""

import logging
import resource
import time
from typing import Any

import torch
from accelerate.state import AcceleratorState
from transformers import TrainerCallback

from ring_hf.parallel import group_of, warm_up

from .. import context as process
from ..checks.argument_rules import ARGUMENT_RULES, check_loader, check_memory, first_error
from ..checks.liger import check_liger
from ..checks.model_rules import MODEL_RULES
from ..checks.trainer_rules import TRAINER_RULES
from ..degrees import find_degrees_error, resolve_degrees
from ..refusal import raise_on_all_ranks
from ..runtime.runtime_state import runtime_state
from . import counters, evaluation_loss
from .engines import blocks_error, checkpoints_layers, engine_of, messages, weights_error
from .exact_evaluation import current_evaluator
from .model_guard import base_model, guard_model
from .trainer_hooks import RandomStates, arm_trial, find_trainer, seed_workers_by_replica

logger = logging.getLogger("ring_hf")


class ContextParallelCallback(TrainerCallback):
    """Guard rails and throughput for a Trainer whose `parallelism_config` is a `ContextParallelConfig`."""

    def __init__(self) -> None:
        self._tokens_since = 0
        self._time_since = 0.0
        self._random_states = RandomStates()

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Static checks of the model and the arguments; hooks on the model."""
        self._check(args, state, model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._check(args, state, model, kwargs.get("train_dataloader"))
        context, evaluator = process.current(), current_evaluator()
        if context is None or evaluator is None:
            return
        guard, trainer = guard_model(model), find_trainer()
        guard.logger = self
        self._tokens_since, self._time_since = guard.num_tokens, time.perf_counter()
        self._random_states.start(args.device)
        runtime_state.monitor.restart()
        guard.allowed_outputs = frozenset()
        seed_workers_by_replica(kwargs.get("train_dataloader"), context)
        guard.trainer_takes_trial = trainer is not None
        if trainer is not None:
            arm_trial(trainer, base_model(model), guard)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the epoch with the random numbers of the first process."""
        if process.current() is not None:
            self._random_states.align(args.device)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if process.current() is not None:
            guard_model(model).optimizer_step = state.global_step + 1

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if process.current() is not None:
            guard = guard_model(model)
            guard.optimizer_step, guard.trainer_takes_trial = None, False

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if process.current() is not None:
            guard_model(model).recheck_next_forward()

            # Accelerate marks a model that it prepared for evaluation, and would not wrap it for training later.
            if hasattr(model, "_is_accelerate_prepared"):
                model._is_accelerate_prepared = False

    on_predict = on_evaluate

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add to the training logs the tokens per second of this device (of its own shards) and its peak memory."""
        context, model = process.current(), kwargs.get("model")
        if context is None or logs is None or model is None or guard_model(model).logger is not self:
            return
        if "loss" in logs:
            _add(self._speed(args, model), logs, state)

    def _speed(self, args: Any, model: Any) -> dict[str, float]:
        tokens = guard_model(model).num_tokens
        now = time.perf_counter()
        added = {"peak_memory_gb": round(_peak_memory(args.device) / 1e9, 3)}
        if now > self._time_since and tokens > self._tokens_since:
            added["tokens_per_second_per_device"] = round((tokens - self._tokens_since) / (now - self._time_since), 1)
            self._tokens_since, self._time_since = tokens, now
        return added

    def _check(self, args: Any, state: Any, model: Any, loader: Any = None) -> None:
        if hasattr(args.parallelism_config, "activate"):
            args.parallelism_config.activate()
        else:
            process.reset()  # another Trainer in this process, without context parallelism
        context = process.current()
        if context is None:
            return
        inner = base_model(model)
        error = first_error(ARGUMENT_RULES, args) or first_error(MODEL_RULES, inner) or check_loader(loader)
        engine, running = engine_of(context, inner), AcceleratorState()
        error = error or weights_error(context, inner)
        error = error or next(iter(messages(engine.rules, running, args)), None)
        error = (
            error
            or check_memory(args, inner, checkpoints_layers(running))
            or blocks_error(engine, inner)
            or check_liger(args, inner, is_patched=loader is not None)
        )
        error = error or find_degrees_error(inner.config, context)
        trainer = find_trainer()
        error = error or (None if trainer is None else first_error(TRAINER_RULES, trainer))
        split = None if error is not None else resolve_degrees(inner.config, context)
        raise_on_all_ranks(error, {"the way sequences are split": str(split)}, context)
        assert split is not None
        # Once for a split: here, so that evaluation without training finds it done, too.
        warm_up(group_of(context.group), args.device, split.ulysses_size, split.options.inner_ring_size)
        guard_model(model).recheck_next_forward()
        if trainer is not None:
            evaluation_loss.install(trainer, inner, guard_model(model))
            counters.install(trainer, context)
        if guard_model(model, trainer=True).announce() and state.is_world_process_zero:
            show_messages()
            for notice in messages(engine.notices, running, args):
                logger.warning("%s: %s", engine, notice)
            logger.info(
                "context parallelism: %s, engine %s, %d data-parallel replicas, kernel %s, overlap %s; sequences per "
                "optimizer step: %d",
                split,
                engine,
                context.num_replicas,
                context.options.kernel,
                "on" if context.options.overlap else "off",
                args.per_device_train_batch_size * args.gradient_accumulation_steps * context.num_replicas,
            )


def show_messages() -> None:
    """Let what ring_hf says (how sequences are split, a trial step) be seen where nobody configured its logger."""
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("ring_hf: %(message)s"))
        logger.addHandler(handler)


def _add(added: dict[str, float], logs: dict[str, Any], state: Any) -> None:
    logs.update(added)
    if state.log_history:
        state.log_history[-1].update(added)  # the Trainer made its own copy before it called


def _peak_memory(device: torch.device) -> int:
    """Bytes: what CUDA allocated at most, or on a CPU the most that this process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
