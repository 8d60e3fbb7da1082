"""One training step of a Trainer, on whole sequences and on shards: loss, logits, gradients, and the first difference.

Every rank runs the step twice, as a trial step does (`ring_hf/hf/runtime/trial_step.py`), but on a real batch: with
whole sequences and Transformers' own attention, as one process would, and with its shard. The price is the memory of
one process at that length on every rank, plus the gradients of both.

Shapes: B rows, S tokens of a whole row, C tokens of this rank, V tokens of the vocabulary.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from ..hf import context as process
from ..hf.attention.backend import attention_calls
from ..hf.runtime import full_precision
from ..hf.runtime.gradients import compute_dtype
from ..hf.runtime.preserved_state import preserve_state
from ..hf.runtime.runtime_state import runtime_state
from ..hf.runtime.trial_step import (
    StepResult,
    mean_losses,
    measure_gradients,
    relative_differences,
    run_step,
)
from ..hf.trainer.engines import engine_of, require_gradient_method
from ..hf.trainer.model_guard import ModelGuard
from ..hf.trainer.trainer_hooks import capture_loss
from ..parallel import all_gather, all_reduce, assert_equal_across_ranks, group_of
from .batch_restoration import ComparedBatch
from .first_difference import ComparedPasses, class_name, find_first_difference
from .model_verification import ModelVerification, WorstDifference, tolerances_for
from .module_records import ModuleRecords


@dataclass
class Outputs:
    """The logits of the last forward pass, [B, S, V] or those of this rank's tokens, [B, C, V]."""

    logits: Tensor | None = None


@dataclass(frozen=True)
class StepComparison:
    """The settings of a comparison.

    Attributes:
        trainer: whose training step runs.
        training_step: its own, not one that a hook has replaced.
        model: the Transformers model inside.
        guard: of that model.
        reference: attention of whole sequences: an `attn_implementation`, "own" for that of the model, or "auto".
        pass_num_items: whether the Trainer passes the number of targets.
    """

    trainer: Trainer
    training_step: Any
    model: PreTrainedModel
    guard: ModelGuard
    reference: str
    pass_num_items: bool

    def compare(self, batch: ComparedBatch) -> ModelVerification:
        """Run both steps and return the result, the same on every rank. A collective call."""
        context = process.current()
        assert context is not None
        method = require_gradient_method(engine_of(context, self.model), "the model is to be verified")
        dtype = compute_dtype(self.model)
        is_half = dtype in full_precision.HALF_DTYPES or full_precision.trains_half_weights(self.model)
        reference = self.reference
        if reference == "auto":  # the backend rounds queries to half-precision weights, sdpa in fp32 does not
            reference = "own" if is_half else choose_reference(self.model)
        in_fp32 = is_half and reference == "own" and full_precision.can_run_in_fp32(self.model)
        tolerances = tolerances_for(torch.bfloat16 if is_half else dtype, in_fp32)
        outermost = self.trainer.model
        parameters = {name: p for name, p in outermost.named_parameters() if p.requires_grad}
        records = ModuleRecords(self.model, batch.positions_C, batch.is_real_BC, batch.document_BS.shape[1])
        setup = {**self._setup(batch, context, dtype, in_fp32), "one process": f"attention {reference}"}
        with preserve_state(self.model, self.trainer), method.prepare(outermost) as gradients_of:

            def run(is_whole: bool, is_reference: bool, num_replicas: int) -> tuple[StepResult | str, Outputs]:
                inputs = dict(batch.whole if is_whole else batch.sharded)
                count = torch.tensor(num_replicas * batch.num_targets, device=inputs["input_ids"].device)

                def compute_gradients(loss: Tensor, trained: Any) -> list[Tensor | None]:
                    records.is_active = False
                    return gradients_of(loss, trained)

                def step() -> Tensor:
                    num_items = count if self.pass_num_items else None
                    return capture_loss(self.trainer, self.training_step, inputs, num_items)

                mode = full_precision.FullPrecisionMode() if in_fp32 else contextlib.nullcontext()
                with _captured_outputs(self.model) as outputs, records.recording(is_whole, is_reference), mode:
                    return run_step(step, compute_gradients, parameters), outputs

            def run_whole(is_reference: bool) -> tuple[StepResult | str, Outputs]:
                with process.whole_sequences(), _attention(self.model, reference):
                    return run(True, is_reference, context.size * context.num_replicas)

            whole, whole_outputs = run_whole(True)
            if failure := _shared_failure(whole, context):
                return ModelVerification("failed", f"one process: {failure}", setup)
            self.guard.recheck_next_forward("training")
            with self._trial():
                sharded, outputs = run(False, False, context.num_replicas)
            if failure := _shared_failure(sharded, context):
                is_refusal = "ValueError: " in failure
                return ModelVerification("refused" if is_refusal else "failed", f"on shards: {failure}", setup)
            assert isinstance(whole, StepResult) and isinstance(sharded, StepResult)
            callers = list(attention_calls.last_callers)

            losses = mean_losses(whole, sharded, context)
            gradients = measure_gradients(whole, sharded, parameters, context, method.are_reduced)
            ratios = relative_differences(gradients)
            norms = math.hypot(*(g.norm for g in gradients)), math.hypot(*(g.sharded_norm for g in gradients))
            worst = max(range(len(ratios)), key=lambda n: ratios[n] if ratios[n] == ratios[n] else math.inf)
            names = list(parameters)
            differences = (
                WorstDifference("loss", _relative(*losses), tolerances.loss, _both(*losses)),
                _compare_logits(whole_outputs, outputs, batch, tolerances.logits, context),
                WorstDifference("gradients", ratios[worst], tolerances.gradient, names[worst]),
                WorstDifference("grad norm", _relative(*norms), tolerances.grad_norm, _both(*norms)),
            )
            if all(difference.is_rounding for difference in differences):
                return ModelVerification("exact", "", setup, differences)
            comparisons = dict(records.comparisons)
            run_whole(False)  # a second time, which shows what is random
            first = find_first_difference(
                ComparedPasses(
                    model=self.model,
                    batch=batch,
                    context=context,
                    tolerances=tolerances,
                    records=records,
                    comparisons=comparisons,
                    callers=callers,
                    gradient_ratios=dict(zip(names, ratios, strict=True)),
                    whole_loss=float(whole.loss.mean()),
                    own_loss=float(sharded.loss.mean()),
                    logits_BCV=outputs.logits,
                )
            )
        return ModelVerification("different", "", setup, differences, first)

    @contextlib.contextmanager
    def _trial(self) -> Iterator[None]:
        """Let outputs of the model be used outside of it, as in a trial step: the comparison judges the result."""
        self.guard.in_trial = True
        runtime_state.loss_monitor.recorded_outputs = set()
        try:
            yield
        finally:
            runtime_state.loss_monitor.recorded_outputs = None
            self.guard.in_trial = False

    def _setup(
        self, batch: ComparedBatch, context: process.ProcessContext, dtype: torch.dtype, in_fp32: bool
    ) -> dict[str, str]:
        num_rows, length = batch.document_BS.shape
        sequence = batch.metadata.sequence
        num_documents = int((batch.document_BS.amax(1) + 1).sum())
        documents = "" if sequence.documents is None else f", {num_documents} documents"
        num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.model.parameters())  # ZeRO-3 frees them
        return {
            "model": f"{class_name(self.model)}, {num_parameters:,} parameters, {str(dtype)[6:]}"
            + ", computed in fp32" * in_fp32,
            "batch": f"{num_rows} rows of {length:,} tokens{documents}, {batch.num_targets:,.0f} targets",
            "ranks": f"{sequence.num_ranks} share each row ({sequence.layout}, {batch.metadata.options.transport}), "
            f"engine {engine_of(context, self.model)}, {next(self.model.parameters()).device.type}",
        }


def choose_reference(model: PreTrainedModel) -> str:
    """Return the attention of Transformers that computes everything a model asks for: sdpa, or eager where that has no
    soft-capping or attention sinks."""
    config = model.config.get_text_config()
    has_softcap = any(getattr(config, name, None) for name in ("attn_logit_softcapping", "attention_logit_cap"))
    return "sdpa" if model._supports_sdpa and not has_softcap else "eager"


@contextlib.contextmanager
def _attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    if implementation == "own":
        configs = {}
    previous = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = implementation
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = previous[key]


@contextlib.contextmanager
def _captured_outputs(model: PreTrainedModel) -> Iterator[Outputs]:
    outputs = Outputs()

    def capture(module: Any, args: tuple, output: Any) -> None:
        logits = getattr(output, "logits", None)
        outputs.logits = logits.detach() if isinstance(logits, Tensor) else None

    handle = model.register_forward_hook(capture)
    try:
        yield outputs
    finally:
        handle.remove()


def _compare_logits(
    whole: Outputs, sharded: Outputs, batch: ComparedBatch, tolerance: float, context: process.ProcessContext
) -> WorstDifference:
    """Return the largest difference of a logit, over the root mean square of all."""
    if whole.logits is None or sharded.logits is None:
        return WorstDifference("logits", math.nan, tolerance, "not compared: the model computes its loss in blocks")
    index_C = batch.positions_C.clamp(max=batch.document_BS.shape[1] - 1).to(whole.logits.device)
    expected = whole.logits[:, index_C]
    is_real_BC = batch.is_real_BC.to(expected.device)
    largest_BC = (sharded.logits.to(expected) - expected).abs().amax(-1).float().nan_to_num(nan=math.inf)
    largest_BC = largest_BC.masked_fill(~is_real_BC, 0.0)
    squares = (expected.float() ** 2).mean(-1)[is_real_BC].double().sum()
    total, count = all_reduce(torch.stack([squares, is_real_BC.sum().double()]), context.group).tolist()
    gathered = torch.stack(all_gather(largest_BC.amax(0), context.group))  # [ranks, C]
    rank, index = divmod(int(gathered.argmax()), gathered.shape[1])
    positions = [p for segment in batch.metadata.sequence.segments(rank) for p in segment.range]
    root_mean_square = max(math.sqrt(total / max(count, 1)), 1e-30)
    value = float(gathered.max()) / root_mean_square
    detail = f"position {positions[index]}, {float(gathered.max()):.1e} beside an RMS of {root_mean_square:.3g}"
    return WorstDifference("logits", value, tolerance, detail)


def _shared_failure(result: StepResult | str, context: process.ProcessContext) -> str | None:
    """Return why a step failed on any rank, the same on all. A collective call."""
    try:
        assert_equal_across_ranks({}, result if isinstance(result, str) else None, group_of(context.group))
    except ValueError as error:
        return str(error)
    return None


def _relative(expected: float, value: float) -> float:
    return abs(value - expected) / max(abs(expected), 1e-30)


def _both(expected: float, value: float) -> str:
    return f"{expected:.7g} in one process, {value:.7g} on ranks"
