"""Hooks around the model's forward pass that prove, at run time, what context parallelism relies on.

On the first forward pass of training and of evaluation all ranks compare notes before any of them attends: does every
rank hold its shard of the same batch, with the same layout, backend and dtype, and did any rank refuse its batch? They
then raise the same error together, so that no rank waits for one that left. After that pass, the attention function
must have been called by every layer. Later passes check what this rank can see by itself, which costs nothing.
"""

import weakref
from typing import Any

import torch
from accelerate.state import GradientState
from transformers import PreTrainedModel

from ring_hf.memory import applied_to
from ring_hf.parallel import agree, group_of

from . import context as process
from .backend import NOT_FROM_COLLATOR, call_count
from .batch import KEY, ContextParallelBatch, RefusedBatch
from .models import MODEL_RULES, text_config
from .names import attention_name
from .router import gather_router_logits, router_output_error, share
from .split import resolve
from .supported import check_loader, check_weights, first_error

_guards: "weakref.WeakKeyDictionary[PreTrainedModel, Guard]" = weakref.WeakKeyDictionary()


def base_model(model: Any) -> PreTrainedModel:
    """The Transformers model inside wrappers: DDP and the like (`.module`), PEFT (`get_base_model`)."""
    while not isinstance(model, PreTrainedModel):
        inner = model.get_base_model() if hasattr(model, "get_base_model") else getattr(model, "module", None)
        if inner is None:
            raise ValueError(f"{type(model).__name__} holds no Transformers model, which context parallelism needs.")
        model = inner
    return model


def guard_model(model: Any, trainer: bool = False) -> "Guard":
    """Attach the guard to a model once; for hand-written training loops (the Trainer's callback does it by itself).

    Args:
        model: a Transformers model, possibly wrapped.
        trainer: whether the Trainer runs the loop; it multiplies the loss of an evaluation batch by the number of
            processes.
    """
    inner = base_model(model)
    if inner not in _guards:
        guard = Guard(inner)
        inner.register_forward_pre_hook(guard.before, with_kwargs=True)
        inner.register_forward_hook(guard.after, with_kwargs=True)
        inner.base_model.register_forward_hook(gather_router_logits, with_kwargs=True)
        _guards[inner] = guard
    _guards[inner].trainer = _guards[inner].trainer or trainer
    return _guards[inner]


class Guard:
    """The two hooks of one model."""

    def __init__(self, model: PreTrainedModel):
        self.trainer = False
        self.num_tokens = 0  # tokens of this rank that were trained on
        self.logger: Any = None  # of several callbacks the one that adds to the logs
        self._announced: process.ProcessContext | None = None
        self._proven: set[str] = set()
        self._scaled_by_trainer = False

    def prove_again(self) -> None:
        """Compare notes at the next forward pass of each mode: another loader or collator may come."""
        self._proven.clear()

    def announce(self) -> bool:
        """True once per context: the resolved layout is to be logged."""
        context = process.current()
        first = context is not None and context != self._announced
        self._announced = context
        return first

    def before(
        self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        """Refuse, or make the arguments of an evaluation batch ready."""
        context, evaluator = process.current(), process.current_evaluator()
        if context is None or evaluator is None:
            return None
        batch = kwargs.get(KEY)
        evaluator.batch = None
        if batch is None and not model.training:
            return None  # a whole sequence, for example inside generate()
        mode = _mode(model)
        error = first_error(MODEL_RULES, model) if mode not in self._proven else None
        error = error or _batch_error(model, args, kwargs, context)
        error = error or (None if model.training else evaluator.error(batch))
        if mode not in self._proven:
            refuse_together(error, _facts(model, batch), context)
            call_count.start()
        elif error is not None:
            raise ValueError(error)
        assert isinstance(batch, ContextParallelBatch)
        if model.training:
            self.num_tokens += kwargs["input_ids"].numel()
            return None
        self._scaled_by_trainer = self.trainer and "num_items_in_batch" in kwargs
        return args, evaluator.prepare(batch, kwargs)

    def after(self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Count attention calls on the first pass; give every rank the loss of the whole evaluation batch."""
        context, evaluator = process.current(), process.current_evaluator()
        if context is None or evaluator is None or kwargs.get(KEY) is None:
            return None
        mode = _mode(model)
        if mode not in self._proven:
            _check_calls(model, call_count.stop())
            self._proven.add(mode)
        if kwargs.get("labels") is None:
            return None
        if not isinstance(output, tuple):
            output.loss = share(model, output, kwargs[KEY])
        if model.training:
            return output
        if isinstance(output, tuple):
            return (evaluator.loss(output[0], self._scaled_by_trainer), *output[1:])
        output.loss = evaluator.loss(output.loss, self._scaled_by_trainer)
        return output


def refuse_together(error: str | None, facts: dict[str, Any], context: process.ProcessContext) -> None:
    """Raise one ValueError on every rank if any rank has an error, or the ranks of a group disagree about the
    facts."""
    try:
        agree(facts, error, group_of(context.group))
    except ValueError as refusal:
        error = str(refusal)
    if context.num_replicas > 1:
        agree({}, error)
    elif error is not None:
        raise ValueError(error)


def _mode(model: PreTrainedModel) -> str:
    return "training" if model.training else "evaluation"


def _facts(model: PreTrainedModel, batch: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "the mode": _mode(model),
        "the model": f"{type(model).__name__} with {attention_name(model.config)} in {model.dtype}",
    }
    levers = applied_to(model)
    facts["the levers on memory"] = None if levers is None else str(levers.config)  # recomputing exchanges again
    if isinstance(batch, ContextParallelBatch):
        sequence = batch.sequence
        facts["the layout"] = f"{sequence.layout}, {sequence.num_ranks} ranks, ulysses_size {sequence.ulysses}"
        facts["the transport"] = f"{batch.transport}, inner_ring_size {batch.inner_ring_size}"
        facts["the batch (hash of its tokens, labels and documents)"] = batch.fingerprint
    return facts


def _batch_error(
    model: PreTrainedModel, args: tuple, kwargs: dict[str, Any], context: process.ProcessContext
) -> str | None:
    batch = kwargs.get(KEY)
    if isinstance(batch, RefusedBatch):
        return batch.message
    if not isinstance(batch, ContextParallelBatch):
        return NOT_FROM_COLLATOR
    if args:
        return "Tokens were passed by position. Call the model with the batch as keyword arguments: model(**batch)."
    if kwargs.get("shift_labels") is not None and kwargs.get("labels") is None:
        return (
            "The batch has shift_labels but its labels were taken out before the forward pass (as "
            "label_smoothing_factor and compute_loss_func do): a loss outside the model would see one shard. Let the "
            "model compute the loss."
        )
    if kwargs.get("loss_weights") is not None and (weights_error := check_weights(model)) is not None:
        return weights_error
    loader_error = check_loader(GradientState().active_dataloader)
    if loader_error is not None:
        return loader_error
    for name, why in (
        ("attention_mask", "padding and documents travel in the batch that ContextParallelCollator made"),
        ("past_key_values", "a KV cache cannot be combined with sharded sequences"),
        ("inputs_embeds", "only token ids can be sharded"),
    ):
        if kwargs.get(name) is not None:
            return f"{name} was passed beside a sharded batch, but {why}. Leave it out."
    if kwargs.get("output_attentions"):
        return "output_attentions=True needs the attention matrix, which ring attention never builds. Set it to False."
    error = router_output_error(model, kwargs) or _split_differs(model, batch, context)
    if error is not None:
        return error
    num_tokens, sequence = kwargs["input_ids"].shape[1], batch.sequence
    if num_tokens != batch.shard_length:
        return (
            f"This rank got {num_tokens} tokens, but its {sequence.layout} shard of {sequence.length} tokens has "
            f"{batch.shard_length}. Do not cut or pad the batch after ContextParallelCollator."
        )
    if kwargs["input_ids"].device.type not in ("cpu", "cuda"):
        return f"Device {kwargs['input_ids'].device} is not supported by ring attention. Use a CPU or CUDA device."
    return None


def _split_differs(model: PreTrainedModel, batch: ContextParallelBatch, context: process.ProcessContext) -> str | None:
    """The collator resolved the split from the model it was given: is it still that of the model that runs?"""
    try:
        split = resolve(model.config, context)
    except ValueError as error:
        return str(error)
    sequence = batch.sequence
    wanted = (split.layout, split.size, split.ulysses_size, split.transport, split.inner_ring_size)
    found = (sequence.layout, sequence.num_ranks, sequence.ulysses, batch.transport, batch.inner_ring_size)
    if wanted == found:
        return None
    more = "" if wanted[0] != found[0] else f", {found[1]} ranks with ulysses_size={found[2]}, not for {split}"
    return (
        f"The model attends with {split.backend!r}, but the batch was sharded for layout {sequence.layout!r}{more}. "
        "Build the collator from the model that is trained, after its last set_attn_implementation call."
    )


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
