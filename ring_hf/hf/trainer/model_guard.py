"""Hooks around the model's forward pass that prove, at run time, what context parallelism relies on.

At every forward pass of a sharded batch all ranks exchange one small message (`pass_message.py`) before any of them
attends: does every rank hold its shard of the same batch, and has no rank an error? On the first pass of training and
of evaluation they compare more: layout, backend, dtype, memory options. If anything is wrong, all ranks raise the same
error together, so that no rank waits for one that left. After a first pass, the attention function must have been
called by every layer; before a first training step, a class of model that is not proven by name takes a trial step
(`trial.py`). Losses and their gradients are followed by `loss_monitor.py`.

A forward pass of whole sequences (generation, samples of a callback) starts no collective.
"""

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from ring_hf.memory import applied_to

from .. import context as process
from ..attention import announcements
from ..attention.backend import attention_calls
from ..attn_names import BACKENDS, attention_name
from ..batch_metadata import IGNORE_INDEX, METADATA_KEY, ContextParallelMetadata
from ..checks.argument_rules import first_error
from ..checks.batch_rules import check_batch
from ..checks.model_rules import MODEL_RULES, text_config
from ..checks.moe_aux_loss import gather_router_logits, rescale_aux_loss
from ..checks.padded_targets import refuse_padded_targets
from ..refusal import raise_on_all_ranks
from ..runtime.loss_monitor import find_other_loss
from ..runtime.pass_message import NO_FINGERPRINT, PassMessage, exchange, find_disagreement, groups_of
from ..runtime.proven_classes import find_unproven
from ..runtime.runtime_state import runtime_state
from ..runtime.trial_step import try_model
from .engines import engine_of, gradient_method
from .exact_evaluation import current_evaluator

_guards: "weakref.WeakKeyDictionary[PreTrainedModel, Guard]" = weakref.WeakKeyDictionary()


def find_base_model(model: Any) -> PreTrainedModel | None:
    """Return the Transformers model inside wrappers (DDP, PEFT, a module of one's own), or None if there is none."""
    if isinstance(model, PreTrainedModel) or not isinstance(model, torch.nn.Module):
        return model if isinstance(model, PreTrainedModel) else None
    held: list[tuple[str, PreTrainedModel]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in held)
        if isinstance(module, PreTrainedModel) and not inside:
            held.append((name, module))
    if len(held) > 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(held)} Transformers models ({', '.join(name for name, _ in held)}). "
            "Context parallelism needs to know which one is trained: pass that one, and call the others around it."
        )
    return held[0][1] if held else None


def base_model(model: Any) -> PreTrainedModel:
    """Return the Transformers model inside wrappers.

    Raises:
        ValueError: if there is none, or several.
    """
    inner = find_base_model(model)
    if inner is None:
        raise ValueError(f"{type(model).__name__} holds no Transformers model, which context parallelism needs.")
    return inner


def guard_prepared_models(accelerator: Any) -> None:
    """Have an accelerator guard every Transformers model with a ring backend that it prepares."""
    reference = weakref.ref(accelerator)

    def guarded(name: str) -> Callable[..., Any]:
        def prepare(*objects: Any, **kwargs: Any) -> Any:
            accelerator = reference()
            assert accelerator is not None, "called without the accelerator it was installed on"
            for model in objects:
                inner = find_base_model(model) if isinstance(model, torch.nn.Module) else None
                if inner is not None and attention_name(inner.config) in BACKENDS:
                    guard_model(inner)
            return getattr(type(accelerator), name)(accelerator, *objects, **kwargs)

        return prepare

    accelerator.prepare = guarded("prepare")  # DeepSpeed prepares all objects at once
    accelerator.prepare_model = guarded("prepare_model")


def guard_model(model: Any, trainer: bool = False) -> "Guard":
    """Attach the guard to a model once. The Trainer's callback and `accelerator.prepare(model)` do it already.

    Args:
        model: a Transformers model, possibly wrapped.
        trainer: whether the Trainer runs the loop; it multiplies the loss of an evaluation batch by the number of
            processes.
    """
    inner = base_model(model)
    guard = _guards.get(inner) or _find_copied_guard(inner)
    if guard is None:
        guard = Guard()
        inner.register_forward_pre_hook(guard.before, with_kwargs=True)
        inner.register_forward_hook(guard.after, with_kwargs=True)
        inner.base_model.register_forward_hook(gather_router_logits, with_kwargs=True)
    _guards[inner] = guard
    announcements.register(inner)
    guard.trainer = guard.trainer or trainer
    return guard


def _find_copied_guard(model: PreTrainedModel) -> "Guard | None":
    """A copy of a guarded model (copy.deepcopy, for an average of its weights) has a copy of its hooks."""
    owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Guard)), None)


class Guard:
    """The two hooks of one model.

    Attributes:
        num_tokens: tokens of this rank that were trained on.
        optimizer_step: the step that is being trained, for messages; None where nobody counts.
        trainer_takes_trial: whether a Trainer runs, which takes the trial step with all that it puts around the model.
        in_trial: whether a trial step runs.
        allowed_outputs: outputs that a trial step has proven to be used rightly outside of the model.
    """

    def __init__(self) -> None:
        self.trainer = False
        self.num_tokens = 0
        self.optimizer_step: int | None = None
        self.logger: Any = None  # of several callbacks the one that adds to the logs
        self.trainer_takes_trial = False
        self.in_trial = False
        self.allowed_outputs: frozenset[str] = frozenset()
        self._announced: process.ProcessContext | None = None
        self._proven: set[str] = set()
        self._scaled_by_trainer = False
        self._counted_here = False

    def recheck_next_forward(self, mode: str | None = None) -> None:
        """Compare all facts at the next forward pass of a mode (default: each): another loader may come."""
        self._proven -= {mode} if mode is not None else {"training", "evaluation"}

    def announce(self) -> bool:
        """True once per context: the resolved layout is to be logged."""
        context = process.current()
        first = context is not None and context != self._announced
        self._announced = context
        return first

    def before(
        self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Refuse, or make the arguments ready."""
        context, evaluator = process.current(), current_evaluator()
        if context is None or evaluator is None:
            refuse_padded_targets(model, kwargs)
            return None
        batch = kwargs.get(METADATA_KEY)
        runtime_state.batch = None
        if batch is None and not (model.training and kwargs.get("labels") is not None):
            return None  # whole sequences: generation, samples
        if runtime_state.token_reads is not None:
            runtime_state.token_reads.inside_model = True
        mode = _mode(model)
        error = first_error(MODEL_RULES, model) if mode not in self._proven else None
        error = error or check_batch(model, args, kwargs, context)
        error = error or (None if model.training else evaluator.error(batch))
        messages = self._compare(model, kwargs, error, context)
        assert isinstance(batch, ContextParallelMetadata)
        if model.training and mode not in self._proven and not (self.trainer_takes_trial or self.in_trial):
            self._take_trial(model, kwargs, context)
        if mode not in self._proven:
            attention_calls.start()
        announcements.register(model)
        announcements.announce(model, batch)
        if not model.training:
            self._scaled_by_trainer = self.trainer and "num_items_in_batch" in kwargs
            return args, evaluator.prepare(batch, kwargs)
        self.num_tokens += 0 if self.in_trial else kwargs["input_ids"].numel()
        self._counted_here = _needs_count(kwargs)
        if not self._counted_here:
            return None
        group = groups_of(messages, context)[context.replica]
        count = math.fsum(message.num_targets for _, message in group)
        dtype = torch.promote_types(model.dtype, torch.float32)
        return args, {**kwargs, "num_items_in_batch": torch.tensor(count, dtype=dtype, device=model.device)}

    def after(self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Count attention calls on the first pass; give every rank the loss of the whole evaluation batch."""
        context, evaluator = process.current(), current_evaluator()
        if context is None or evaluator is None or kwargs.get(METADATA_KEY) is None:
            return None
        if runtime_state.token_reads is not None:
            runtime_state.token_reads.inside_model = False
        mode = _mode(model)
        if mode not in self._proven:
            _check_calls(model, attention_calls.stop())
            if not self.in_trial:
                self._proven.add(mode)
        has_labels = kwargs.get("labels") is not None
        if has_labels and getattr(output, "loss", None) is not None:
            output.loss = rescale_aux_loss(model, output, kwargs[METADATA_KEY])
        if model.training:
            if has_labels and self._counted_here:
                # The engine takes the mean over ranks, of which each has a share of the group's loss.
                output = _with_loss(output, lambda loss: loss * context.size)
            return runtime_state.monitor.alias_outputs(output, context.size, has_labels, self.allowed_outputs)
        if not has_labels:
            return None
        return _with_loss(output, lambda loss: evaluator.loss(loss, self._scaled_by_trainer))

    def _compare(
        self,
        model: PreTrainedModel,
        kwargs: dict[str, Any],
        error: str | None,
        context: process.ProcessContext,
    ) -> list[PassMessage]:
        """Exchange messages with all ranks; raise the same error on each if anything is wrong or differs."""
        batch = kwargs.get(METADATA_KEY)
        is_first = _mode(model) not in self._proven
        targets = _count_targets(kwargs) if model.training and error is None and _needs_count(kwargs) else 0.0
        mine = PassMessage(
            getattr(batch, "fingerprint", NO_FINGERPRINT),
            model.training,
            is_first or error is not None,
            targets,
            _number_of_items(kwargs) if model.training else math.nan,
            *runtime_state.monitor.take_last(),
        )
        messages = exchange(mine, kwargs["input_ids"].device if "input_ids" in kwargs else model.device)
        if any(message.needs_agreement for message in messages):
            raise_on_all_ranks(error, _facts(model, batch), context)
        different = find_disagreement(messages, context)
        if different is not None:
            raise ValueError(f"{self._when()}{different}. {_advice(different)}")
        other_loss = find_other_loss(messages, context)
        if other_loss is not None:
            raise ValueError(f"{self._when()}{other_loss}")
        return messages

    def _when(self) -> str:
        return "" if self.optimizer_step is None else f"In optimizer step {self.optimizer_step}: "

    def _take_trial(self, model: PreTrainedModel, kwargs: dict[str, Any], context: process.ProcessContext) -> None:
        """In a loop without a Trainer, try what is known of it: the model's own loss."""
        reason = find_unproven(model)
        if reason is not None or context.verify:
            reason = reason or "verify=True"
            method = gradient_method(engine_of(context, model), reason)
            self.in_trial = True
            try:
                try_model(model, kwargs, reason, context, method)
            finally:
                self.in_trial = False


def _mode(model: PreTrainedModel) -> str:
    return "training" if model.training else "evaluation"


def _needs_count(kwargs: dict[str, Any]) -> bool:
    """Whether the caller wants a mean over the targets and leaves it to the model to count them."""
    return kwargs.get("labels") is not None and kwargs.get("num_items_in_batch") is None


def _number_of_items(kwargs: dict[str, Any]) -> float:
    items = kwargs.get("num_items_in_batch")
    return math.nan if items is None else float(items)


def _advice(different: str) -> str:
    if "num_items_in_batch" in different:
        return (
            "Count the targets of all ranks (accelerator.reduce(..., reduction='sum')), or leave num_items_in_batch "
            "out: then they are counted here."
        )
    return (
        "Random numbers were drawn on some of them only, or differently: by a sampler, a dataset or collator that "
        "augments, or a callback. Draw them on all ranks alike, from a generator of their own with one seed."
    )


def _count_targets(kwargs: dict[str, Any]) -> float:
    """Return the target tokens of this shard, or the sum of their weights."""
    is_target_BC = kwargs.get("shift_labels", kwargs["labels"]) != IGNORE_INDEX
    weights_BC = kwargs.get("loss_weights")
    return float(is_target_BC.sum() if weights_BC is None else (weights_BC * is_target_BC).sum(dtype=torch.float64))


def _with_loss(output: Any, change: Any) -> Any:
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    if getattr(output, "loss", None) is not None:
        output.loss = change(output.loss)
    return output


def _facts(model: PreTrainedModel, batch: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "the mode": _mode(model),
        "the model": f"{type(model).__name__} with {attention_name(model.config)} in {model.dtype}",
    }
    levers = applied_to(model)
    facts["the levers on memory"] = None if levers is None else str(levers.config)  # recomputing exchanges again
    if isinstance(batch, ContextParallelMetadata):
        sequence = batch.sequence
        facts["the layout"] = f"{sequence.layout}, {sequence.num_ranks} ranks, ulysses_size {sequence.ulysses}"
        facts["the transport"] = f"{batch.options.transport}, inner_ring_size {batch.options.inner_ring_size}"
        facts["the chunks of heads"] = batch.options.head_chunks
        facts["the batch (hash of its tokens, labels and documents)"] = batch.fingerprint
    return facts


def _check_calls(model: PreTrainedModel, callers: list[torch.nn.Module]) -> None:
    """At least one call per layer (some layers attend twice, some are run several times), and no attention layer of a
    kind that calls the function may have been silent."""
    expected, kinds = text_config(model).num_hidden_layers, {type(caller) for caller in callers}
    called = {id(caller) for caller in callers}
    silent = [name for name, module in model.named_modules() if type(module) in kinds and id(module) not in called]
    if len(callers) < expected or silent:
        without = f" ({silent[0]} did not)" if silent else ""
        raise ValueError(
            f"{type(model).__name__} has {expected} layers, but called the attention function {len(callers)} times in "
            f"one forward pass{without}. Layers that compute attention elsewhere would see one shard only. Use a "
            "model whose every layer uses the attention interface."
        )
