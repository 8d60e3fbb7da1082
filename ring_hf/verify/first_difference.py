"""Where two passes first differ: the module, its tensor, the tokens, and what usually causes that.

Modules end in the order of the forward pass, inner ones first. Of the first tensor that differs, the culprit is the
innermost module around it whose own inputs agree: the code of its forward pass computed the difference. If no tensor
differs, the loss is computed in the usual wrong forms from the logits of the ranks, and compared with what they have.

Shapes: B rows, S tokens of a whole row, C tokens of this rank.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..hf.batch_metadata import IGNORE_INDEX
from ..hf.context import ProcessContext
from ..hf.documents import shift_left
from ..parallel import all_gather, all_reduce, join
from . import usual_causes
from .batch_restoration import ComparedBatch
from .model_verification import FirstDifference, VerificationTolerances
from .module_records import Comparison, ModuleRecords, RecordKey
from .usual_causes import Evidence, describe_tokens, find_causes


@dataclass(frozen=True)
class ComparedPasses:
    """A step on whole sequences and the same on shards, of which something differs.

    Attributes:
        model: the Transformers model.
        context: of this process.
        tolerances: by quantity.
        records: the tensors of the whole step; their comparisons are those of a second whole step.
        comparisons: those of the sharded step.
        callers: the modules that called the ring's attention.
        gradient_ratios: relative differences by parameter.
        whole_loss: of the whole step.
        own_loss: of this rank's shard.
        logits_BCV: of this rank's tokens; None if the loss was computed in blocks.
    """

    model: nn.Module
    batch: ComparedBatch
    context: ProcessContext
    tolerances: VerificationTolerances
    records: ModuleRecords
    comparisons: Mapping[RecordKey, Comparison]
    callers: Sequence[nn.Module]
    gradient_ratios: Mapping[str, float]
    whole_loss: float
    own_loss: float
    logits_BCV: Tensor | None


def find_first_difference(passes: ComparedPasses) -> FirstDifference:
    """Return the first difference, the same on every rank. A collective call."""
    batch, context, comparisons = passes.batch, passes.context, passes.comparisons
    keys = list(passes.records.references)
    ratios = dict(zip(keys, _ratios(keys, comparisons, context), strict=True))
    random_ratios = dict(zip(keys, _ratios(keys, passes.records.comparisons, context), strict=True))
    tolerance = passes.tolerances.logits
    modules = dict(passes.model.named_modules())
    key = next((key for key in keys if key.kind == "output" and ratios[key] > tolerance), None)
    if key is None:
        return _in_loss_or_backward(passes)

    def inputs_of(name: str) -> list[RecordKey]:
        calls = {k.call for k in keys if k.module == name}
        call = key.call if key.call in calls else 0
        return [k for k in keys if k.module == name and k.call == call and k.kind == "input" and k in comparisons]

    culprit, tensor, first_key = key.module, "output", key
    inner = next((k for k in inputs_of(key.module) if ratios[k] > tolerance), None)
    if inner is not None:  # the difference came from outside of this module
        first_key, tensor = inner, f"input {inner.tensor} of {key.module or 'the model'}, computed"
        names = [n for n in _ancestors(key.module) if any(k.module == n for k in keys)]  # those that ran
        culprit = next((n for n in names if all(ratios[k] <= tolerance for k in inputs_of(n))), "")
        if culprit == "" and (bad := [k for k in inputs_of("") if ratios[k] > tolerance]):
            first_key, tensor = bad[0], f"input {bad[0].tensor}"
    differs_BS = _gather_tokens(first_key, comparisons, tolerance, batch, context)
    inside = {id(module) for module in modules[culprit].modules()}
    evidence = Evidence(
        names=(culprit, class_name(modules[culprit]), tensor, key.module, class_name(modules[key.module])),
        differs_BS=differs_BS,
        called_ring=any(id(caller) in inside for caller in passes.callers),
        is_random=any(random_ratios[k] > tolerance for k in keys[: keys.index(key) + 1]),
    )
    causes = find_causes(evidence, batch)
    if culprit == "" and first_key.module == "" and first_key.kind == "input" and "position" in first_key.tensor:
        causes = (usual_causes.BATCH_POSITIONS,)
    return FirstDifference(
        module=culprit or "the model",
        module_class=class_name(modules[culprit]),
        tensor=tensor,
        value=ratios[first_key],
        tokens=tuple(differs_BS.any(0).nonzero().flatten().tolist()),
        pattern=describe_tokens(differs_BS, batch),
        causes=causes,
    )


def _ancestors(name: str) -> list[str]:
    """Return the names of the modules around a module, from the inside to the model itself."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, -1, -1)] if name else [""]


def class_name(module: nn.Module) -> str:
    """Return the class of a module, without the prefix that FSDP2 gives it."""
    return type(module).__name__.removeprefix("FSDP")


def _ratios(
    keys: Sequence[RecordKey], comparisons: Mapping[RecordKey, Comparison], context: ProcessContext
) -> list[float]:
    """Return by tensor the largest difference of a token over the root mean square norm of all, over all ranks."""
    largest = [
        float(comparisons[key].difference_BC.nan_to_num(nan=math.inf).max()) if key in comparisons else 0.0
        for key in keys
    ]
    sums = [
        [comparisons[key].square_sum, comparisons[key].num_tokens] if key in comparisons else [0.0, 0.0]
        for key in keys
    ]
    gathered = torch.stack(all_gather(torch.tensor(largest, dtype=torch.float64), context.group)).amax(0)
    totals = all_reduce(torch.tensor(sums, dtype=torch.float64), context.group)
    scale = (totals[:, 0] / totals[:, 1].clamp(min=1)).sqrt().clamp(min=1e-30)
    return (gathered / scale).tolist()


def _gather_tokens(
    key: RecordKey,
    comparisons: Mapping[RecordKey, Comparison],
    tolerance: float,
    batch: ComparedBatch,
    context: ProcessContext,
) -> Tensor:
    """Return which tokens of the whole batch differ, [B, S], in a tensor."""
    comparison = comparisons[key]
    sums = torch.tensor([comparison.square_sum, comparison.num_tokens], dtype=torch.float64)
    total, count = all_reduce(sums, context.group).tolist()
    scale = max(math.sqrt(total / max(count, 1)), 1e-30)
    sequence = batch.metadata.sequence
    difference = comparison.difference_BC.nan_to_num(nan=math.inf).double().contiguous()
    segments = [sequence.segments(rank) for rank in range(sequence.num_ranks)]
    whole = join(all_gather(difference, context.group), segments, 1)[:, : batch.document_BS.shape[1]]
    return (whole / scale > tolerance).cpu()


def _in_loss_or_backward(passes: ComparedPasses) -> FirstDifference:
    batch, gradient_ratios = passes.batch, passes.gradient_ratios
    of_ranks = torch.stack(all_gather(torch.tensor([passes.own_loss], dtype=torch.float64), passes.context.group))
    mean = float(of_ranks.mean())
    difference = abs(mean - passes.whole_loss) / max(abs(passes.whole_loss), 1e-30)
    if not difference <= passes.tolerances.loss:
        causes, tokens = _explain_loss(passes)
        differs = torch.zeros(batch.document_BS.shape, dtype=torch.bool)
        differs[:, list(tokens)] = True
        pattern = describe_tokens(differs, batch) if tokens else ""
        return FirstDifference("the loss", class_name(passes.model), "value", difference, tokens, pattern, causes)
    names = [name for name, ratio in gradient_ratios.items() if not ratio <= passes.tolerances.gradient]
    if not names:
        name = max(gradient_ratios, key=lambda n: gradient_ratios[n])
    else:
        name = names[-1]  # the last parameter of the forward pass gets its gradient first
    owner = dict(passes.model.named_modules()).get(name.rpartition(".")[0])
    return FirstDifference(
        module=name.rpartition(".")[0] or "the model",
        module_class=class_name(owner or passes.model),
        tensor=f"gradient of {name.rpartition('.')[2]}",
        value=gradient_ratios[name],
        tokens=(),
        pattern="",
        causes=(usual_causes.LOST_GRADIENT,),
    )


def _explain_loss(passes: ComparedPasses) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the causes that the losses of all ranks agree with, and the tokens whose targets are wrong."""
    unknown = (usual_causes.COUNT, usual_causes.LABELS, usual_causes.OTHER_LOSS)
    batch, context, logits_BCV = passes.batch, passes.context, passes.logits_BCV
    if logits_BCV is None or "loss_weights" in batch.sharded:
        return unknown, ()
    correct, is_count = _sum_of_losses(logits_BCV, _targets(batch))
    shifted, shifted_count = _sum_of_losses(logits_BCV, shift_left(batch.sharded["labels"]))
    total, num_targets = all_reduce(torch.tensor([correct, is_count], dtype=torch.float64), context.group).tolist()
    scale = passes.whole_loss / (total / max(num_targets, 1))  # what the Trainer multiplies losses by
    candidates = {
        usual_causes.LABELS: (
            context.size * shifted / num_targets,
            shifted / num_targets,
            shifted / max(shifted_count, 1),
            context.size * shifted / max(shifted_count, 1),
        ),
        usual_causes.COUNT: (correct / max(is_count, 1),),
        usual_causes.MISSING_FACTOR: (correct / num_targets,),
    }
    causes = []
    for cause, values in candidates.items():
        fits = [abs(value * scale - passes.own_loss) <= 1e-4 * abs(passes.own_loss) for value in values]
        on_all = torch.stack(all_gather(torch.tensor(fits).float(), context.group)).amin(0)
        if bool(on_all.any()):
            causes.append(cause)
    ranks, length = batch.rank_of_token, len(batch.rank_of_token)
    ends = tuple(n for n in range(length - 1) if ranks[n] != ranks[n + 1])
    return (tuple(causes) or unknown), (ends if causes[:1] == [usual_causes.LABELS] else ())


def _targets(batch: ComparedBatch) -> Tensor:
    whole = batch.whole["shift_labels"]
    index_C = batch.positions_C.clamp(max=whole.shape[1] - 1).to(whole.device)
    return whole[:, index_C].masked_fill(~batch.is_real_BC.to(whole.device), IGNORE_INDEX)


def _sum_of_losses(logits_BCV: Tensor, targets_BC: Tensor) -> tuple[float, int]:
    logits = logits_BCV.float().flatten(0, 1)
    targets = targets_BC.flatten().to(logits.device)
    total = cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return float(total), int((targets != IGNORE_INDEX).sum())
