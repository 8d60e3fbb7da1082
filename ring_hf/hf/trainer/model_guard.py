"""Hooks around the model's forward pass that check, at run time, the assumptions of context parallelism.

Before every forward pass of a sharded batch, all ranks exchange one small message (`pass_message.py`): does every rank
hold its shard of the same batch, and does no rank have an error? On the first pass of training and of evaluation they
compare more: layout, backend, dtype, memory options. If a check fails, all ranks raise the same error together, so
that no rank waits for one that has left. After a first pass, every layer must have called the attention function.
Before the first training step, a model class that is not proven by name takes a trial step (`trial_step.py`).
`loss_monitor.py` follows losses and their gradients.

A forward pass of whole sequences (generation, samples of a callback) starts no collective.
"""

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from ring_hf.memory import applied_to
from ring_hf.parallel import share_reason

from .. import context as process
from ..attention import announcements
from ..attention.backend import attention_calls, key_sums
from ..attn_names import BACKENDS, attention_name
from ..batch_metadata import IGNORE_INDEX, METADATA_KEY, ContextParallelMetadata
from ..checks.argument_rules import first_error
from ..checks.batch_rules import check_batch
from ..checks.model_rules import MODEL_RULES, text_config
from ..checks.moe_aux_loss import gather_router_logits, rescale_aux_loss
from ..checks.padded_targets import refuse_padded_targets
from ..refusal import raise_on_all_ranks, unless_recorded
from ..runtime.loss_monitor import find_loss_mismatch
from ..runtime.nonfinite import raise_if_not_finite
from ..runtime.pass_message import (
    NO_FINGERPRINT,
    PassMessage,
    exchange_messages,
    find_disagreement,
    group_by_sequence,
)
from ..runtime.proven_classes import find_unproven_module
from ..runtime.runtime_state import runtime_state
from ..runtime.trial_step import run_model_trial
from .engines import engine_of, require_gradient_method
from .exact_evaluation import current_evaluator

_guards: "weakref.WeakKeyDictionary[PreTrainedModel, ModelGuard]" = weakref.WeakKeyDictionary()


def find_base_model(model: Any) -> PreTrainedModel | None:
    """Return the Transformers model inside wrappers (DDP, PEFT, a custom module), or None if there is none.

    Raises:
        ValueError: if there are several.
    """
    if isinstance(model, PreTrainedModel):
        return model
    if not isinstance(model, torch.nn.Module):
        return None
    models: dict[str, PreTrainedModel] = {}  # outermost ones by name
    for name, module in model.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in models)
        if isinstance(module, PreTrainedModel) and not is_inside:
            models[name] = module
    if len(models) > 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(models)} Transformers models ({', '.join(models)}), and context "
            "parallelism has to know which one is trained. Pass that one, and call the others outside of it."
        )
    return next(iter(models.values()), None)


def base_model(model: Any) -> PreTrainedModel:
    """Return the Transformers model inside wrappers.

    Raises:
        ValueError: if there is none, or several.
    """
    inner = find_base_model(model)
    if inner is None:
        raise ValueError(
            f"{type(model).__name__} holds no Transformers model, which context parallelism needs. Pass a "
            "PreTrainedModel, or a module around one."
        )
    return inner


def guard_prepared_models(accelerator: Any) -> None:
    """Have `accelerator.prepare` guard every Transformers model that has a ring backend."""
    accelerator_ref = weakref.ref(accelerator)

    def with_guard(method: str) -> Callable[..., Any]:
        def prepare(*objects: Any, **kwargs: Any) -> Any:
            accelerator = accelerator_ref()
            assert accelerator is not None, "called after the accelerator was freed"
            for model in objects:
                inner = find_base_model(model) if isinstance(model, torch.nn.Module) else None
                if inner is not None and attention_name(inner.config) in BACKENDS:
                    guard_model(inner)
            return getattr(type(accelerator), method)(accelerator, *objects, **kwargs)

        return prepare

    accelerator.prepare = with_guard("prepare")  # DeepSpeed prepares all objects at once
    accelerator.prepare_model = with_guard("prepare_model")


def guard_model(model: Any, trainer: bool = False) -> "ModelGuard":
    """Attach a guard to a model, or return the one it has.

    The Trainer's callback and `accelerator.prepare(model)` call this. Call it in a loop that does neither.

    Args:
        model: a Transformers model, possibly wrapped.
        trainer: whether the Trainer runs the loop; it multiplies the loss of an evaluation batch by the number of
            processes.

    Raises:
        ValueError: if `model` holds no Transformers model, or several.
    """
    inner = base_model(model)
    guard = _guards.get(inner) or _find_copied_guard(inner)
    if guard is None:
        guard = ModelGuard()
        inner.register_forward_pre_hook(guard.before_forward, with_kwargs=True)
        inner.register_forward_hook(guard.after_forward, with_kwargs=True)
        inner.base_model.register_forward_hook(gather_router_logits, with_kwargs=True)
    _guards[inner] = guard
    announcements.register(inner)
    guard.trainer = guard.trainer or trainer
    return guard


def _find_copied_guard(model: PreTrainedModel) -> "ModelGuard | None":
    """Return the guard of a model that was copied with its hooks (copy.deepcopy, for an average of weights)."""
    owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, ModelGuard)), None)


class ModelGuard:
    """The forward hooks of one model, and their state.

    Attributes:
        trainer: whether the Trainer runs the loop.
        num_tokens: tokens of this rank's shards that were trained on.
        optimizer_step: number of the step that is being trained, for messages; None where it is not known.
        throughput_logger: of several callbacks, the one that adds to the logs.
        trainer_runs_trial: whether a Trainer runs the trial step, with all code around the model.
        in_trial: whether a trial step is running.
        allowed_outputs: outputs that a trial step has proven, so that the loss may be computed from them outside.
    """

    def __init__(self) -> None:
        self.trainer = False
        self.num_tokens = 0
        self.optimizer_step: int | None = None
        self.throughput_logger: Any = None
        self.trainer_runs_trial = False
        self.in_trial = False
        self.allowed_outputs: frozenset[str] = frozenset()
        self._logged_context: process.ProcessContext | None = None
        self._checked_modes: set[str] = set()
        self._is_scaled_by_trainer = False  # whether the Trainer multiplies the loss of the running evaluation batch
        self._is_counted_here = False  # whether the running training batch came without num_items_in_batch

    def recheck_next_forward(self, mode: str | None = None) -> None:
        """Repeat the full comparison at the next forward pass of a mode (default: of each): the data loader may
        be another one."""
        self._checked_modes -= {mode} if mode is not None else {"training", "evaluation"}

    def should_log(self) -> bool:
        """Return whether to log the parallel degrees: True once per context."""
        context = process.current()
        is_new = context is not None and context != self._logged_context
        self._logged_context = context
        return is_new

    def before_forward(
        self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Forward pre-hook: check the batch with all ranks and complete the arguments.

        Args:
            kwargs: arguments of the model, with the tensors of this rank's shard ([B, C]: B rows, C tokens).

        Returns:
            New arguments, or None to keep them. `num_items_in_batch` is added as a scalar if it is missing.

        Raises:
            ValueError: on every rank, if a check fails on any rank.
        """
        context, evaluator = process.current(), current_evaluator()
        if context is None or evaluator is None:
            refuse_padded_targets(model, kwargs)
            return None
        batch = kwargs.get(METADATA_KEY)
        runtime_state.evaluation_batch = None
        if batch is None and not (model.training and kwargs.get("labels") is not None):
            return None  # whole sequences: generation, samples
        if runtime_state.token_reads is not None:
            runtime_state.token_reads.inside_model = True
        mode = _mode(model)
        is_first = mode not in self._checked_modes
        error = unless_recorded(first_error(MODEL_RULES, model)) if is_first else None
        error = error or check_batch(model, args, kwargs, context)
        error = error or (None if model.training else evaluator.check_batch(batch))
        messages = self._compare_across_ranks(model, kwargs, error, context)
        assert isinstance(batch, ContextParallelMetadata)
        if model.training and is_first and not (self.trainer_runs_trial or self.in_trial):
            self._run_trial(model, kwargs, context)
        key_sums.sums.clear()
        if is_first:
            attention_calls.start()
        announcements.register(model)
        announcements.announce(model, batch)
        if not model.training:
            self._is_scaled_by_trainer = self.trainer and "num_items_in_batch" in kwargs
            return args, evaluator.prepare_inputs(batch, kwargs)
        self.num_tokens += 0 if self.in_trial else kwargs["input_ids"].numel()
        self._is_counted_here = _needs_count(kwargs)
        if not self._is_counted_here:
            return None
        group = group_by_sequence(messages, context)[context.replica]
        count = math.fsum(message.num_targets for _, message in group)
        dtype = torch.promote_types(model.dtype, torch.float32)
        return args, {**kwargs, "num_items_in_batch": torch.tensor(count, dtype=dtype, device=model.device)}

    def after_forward(self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook: check the attention calls of a first pass and correct the loss.

        Args:
            output: a `ModelOutput` or tuple; its loss is a scalar.

        Returns:
            The output with monitored aliases in training, or with the loss of the whole batch in evaluation; None to
            keep it.

        Raises:
            ValueError: if a layer did not call the attention function.
        """
        context, evaluator = process.current(), current_evaluator()
        if context is None or evaluator is None or kwargs.get(METADATA_KEY) is None:
            return None
        if runtime_state.token_reads is not None:
            runtime_state.token_reads.inside_model = False
        mode = _mode(model)
        if mode not in self._checked_modes:
            error = unless_recorded(_check_attention_calls(model, attention_calls.stop()))
            if error is not None:
                raise ValueError(error)
            if not self.in_trial:
                self._checked_modes.add(mode)
        has_labels = kwargs.get("labels") is not None
        if has_labels and getattr(output, "loss", None) is not None:
            output.loss = rescale_aux_loss(model, output, kwargs[METADATA_KEY])
        if model.training:
            if has_labels and self._is_counted_here:
                # Each rank has its share of the group's loss, and the engine averages over ranks.
                output = _map_loss(output, lambda loss: loss * context.size)
            return runtime_state.loss_monitor.alias_outputs(output, context.size, has_labels, self.allowed_outputs)
        if not has_labels:
            return None
        return _map_loss(output, lambda loss: evaluator.combine_losses(loss, self._is_scaled_by_trainer))

    def _compare_across_ranks(
        self,
        model: PreTrainedModel,
        kwargs: dict[str, Any],
        error: str | None,
        context: process.ProcessContext,
    ) -> list[PassMessage]:
        """Exchange messages with all ranks. Raise the same error on each if a rank has one or values differ."""
        batch = kwargs.get(METADATA_KEY)
        is_first = _mode(model) not in self._checked_modes
        needs_count = model.training and error is None and _needs_count(kwargs)
        last_loss = runtime_state.loss_monitor.pop_last_backward()
        message = PassMessage(
            fingerprint=getattr(batch, "fingerprint", NO_FINGERPRINT),
            is_training=model.training,
            needs_agreement=is_first or error is not None,
            num_targets=_count_targets(kwargs) if needs_count else 0.0,
            num_items=_passed_num_items(kwargs) if model.training else math.nan,
            loss_factor=last_loss.factor,
            loss_residual=last_loss.residual,
            loss_tolerance=last_loss.tolerance,
            is_finite=last_loss.is_finite,
        )
        device = kwargs["input_ids"].device if "input_ids" in kwargs else model.device
        messages = exchange_messages(message, device)
        if any(message.needs_agreement for message in messages):
            raise_on_all_ranks(error, _values_to_compare(model, batch), context)
        raise_if_not_finite(messages, device, self._step_prefix())
        disagreement = find_disagreement(messages, context)
        if disagreement is not None:
            raise ValueError(f"{self._step_prefix()}{disagreement}. {_advise(disagreement)}")
        loss_mismatch = find_loss_mismatch(messages, context)
        if loss_mismatch is not None:
            raise ValueError(f"{self._step_prefix()}{loss_mismatch}")
        return messages

    def _step_prefix(self) -> str:
        return "" if self.optimizer_step is None else f"In optimizer step {self.optimizer_step}: "

    def _run_trial(self, model: PreTrainedModel, kwargs: dict[str, Any], context: process.ProcessContext) -> None:
        """Run a trial step of the model's own loss if needed: in a loop without a Trainer, the rest is unknown."""
        reason = share_reason(find_unproven_module(model))
        if reason is not None or context.verify:
            reason = reason or "verify=True"
            method = require_gradient_method(engine_of(context, model), reason)
            self.in_trial = True
            try:
                run_model_trial(model, kwargs, reason, context, method)
            finally:
                self.in_trial = False


def _mode(model: PreTrainedModel) -> str:
    return "training" if model.training else "evaluation"


def _needs_count(kwargs: dict[str, Any]) -> bool:
    """Return whether the loss is a mean over targets that the caller did not count."""
    return kwargs.get("labels") is not None and kwargs.get("num_items_in_batch") is None


def _passed_num_items(kwargs: dict[str, Any]) -> float:
    num_items = kwargs.get("num_items_in_batch")
    return math.nan if num_items is None else float(num_items)


def _advise(disagreement: str) -> str:
    if "num_items_in_batch" in disagreement:
        return (
            "Count the targets of all ranks (accelerator.reduce(..., reduction='sum')), or leave num_items_in_batch "
            "out, and they are counted here."
        )
    return (
        "Random numbers were drawn on some of these ranks only, or differently: by a sampler, a dataset or collator "
        "that augments, or a callback. Draw the same numbers on all ranks, from a separate generator with one seed."
    )


def _count_targets(kwargs: dict[str, Any]) -> float:
    """Return the number of targets in this shard, or the sum of their weights."""
    is_target_BC = kwargs.get("shift_labels", kwargs["labels"]) != IGNORE_INDEX
    weights_BC = kwargs.get("loss_weights")
    return float(is_target_BC.sum() if weights_BC is None else (weights_BC * is_target_BC).sum(dtype=torch.float64))


def _map_loss(output: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(output, tuple):
        return (function(output[0]), *output[1:])
    if getattr(output, "loss", None) is not None:
        output.loss = function(output.loss)
    return output


def _values_to_compare(model: PreTrainedModel, batch: Any) -> dict[str, Any]:
    """Return the values that must be equal on all ranks of a sequence, by their names in an error message."""
    options = applied_to(model)
    values: dict[str, Any] = {
        "the mode": _mode(model),
        "the model": f"{type(model).__name__} with {attention_name(model.config)} in {model.dtype}",
        # Recomputed attention exchanges keys and values again.
        "the memory options": None if options is None else str(options.config),
    }
    if isinstance(batch, ContextParallelMetadata):
        sequence = batch.sequence
        values["the layout"] = f"{sequence.layout}, {sequence.num_ranks} ranks, ulysses_size {sequence.ulysses}"
        values["the transport"] = f"{batch.options.transport}, inner_ring_size {batch.options.inner_ring_size}"
        values["the chunks of heads"] = batch.options.head_chunks
        values["the batch (hash of its tokens, labels and documents)"] = batch.fingerprint
    return values


def _check_attention_calls(model: PreTrainedModel, callers: list[torch.nn.Module]) -> str | None:
    """Return an error message unless there was at least one call per layer (some layers attend twice, some run several
    times), and one by every module of a class that called the attention function."""
    num_layers = text_config(model).num_hidden_layers
    caller_classes = {type(caller) for caller in callers}
    caller_ids = {id(caller) for caller in callers}
    missing = [
        name
        for name, module in model.named_modules()
        if type(module) in caller_classes and id(module) not in caller_ids
    ]
    if len(callers) >= num_layers and not missing:
        return None
    example = f" ({missing[0]} did not)" if missing else ""
    return (
        f"{type(model).__name__} has {num_layers} layers, but called the attention function {len(callers)} times in "
        f"one forward pass{example}. A layer that computes attention elsewhere sees one shard only. Use a model whose "
        "every layer uses the attention interface."
    )
