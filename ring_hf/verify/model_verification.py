"""The result of comparing a model through one process with the same model through the ranks of a sequence.

`ModelVerification.report()` is the text of `ring-hf verify --model`.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..hf.runtime.trial_step import FP32_COMPUTE_TOLERANCES, HALF_PRECISION_TOLERANCES, TOLERANCES
from ..text import markdown_table


class VerificationTolerances(NamedTuple):
    """Largest relative differences that are rounding. Those of losses and gradients are the bounds of a trial step."""

    loss: float
    logits: float
    gradient: float
    grad_norm: float


_LOGITS = {torch.float64: 1e-6, torch.float32: 1e-4}


def tolerances_for(dtype: torch.dtype, in_fp32: bool = False) -> VerificationTolerances:
    """Return the tolerances of a dtype.

    Args:
        in_fp32: whether a model with half-precision weights computes in fp32 during the comparison.
    """
    if dtype in TOLERANCES:
        bounds, logits = TOLERANCES[dtype], _LOGITS[dtype]
    elif in_fp32:
        bounds, logits = FP32_COMPUTE_TOLERANCES, 1e-2  # attention rounds its inputs to the dtype of the weights
    else:
        bounds, logits = HALF_PRECISION_TOLERANCES, 0.1
    return VerificationTolerances(bounds.loss, logits, bounds.gradient, bounds.gradient)


@dataclass(frozen=True)
class WorstDifference:
    """The largest difference of one quantity.

    Attributes:
        quantity: loss, logits, gradients or grad norm.
        value: relative; NaN if it was not compared.
        tolerance: the largest value that is rounding.
        detail: both values, the token, the parameter, or why it was not compared.
    """

    quantity: str
    value: float
    tolerance: float
    detail: str

    @property
    def is_rounding(self) -> bool:
        """Whether it is within its tolerance, or was not compared."""
        return self.value <= self.tolerance or (self.value != self.value and self.detail.startswith("not compared"))


@dataclass(frozen=True)
class FirstDifference:
    """The first tensor that differs, in the order of the forward pass, then the loss, then the backward pass.

    Attributes:
        module: name of the module, or "loss".
        module_class: its class.
        tensor: the output of the module, the input of a module inside, or the gradient of a parameter.
        value: the largest relative difference of a token.
        tokens: global positions of the tokens that differ, of all rows; empty if it has no tokens.
        pattern: these positions in words.
        causes: what usually causes it, the likeliest first.
    """

    module: str
    module_class: str
    tensor: str
    value: float
    tokens: tuple[int, ...]
    pattern: str
    causes: tuple[str, ...]

    def __str__(self) -> str:
        joint = "in" if self.tensor.startswith("input") else "of"
        module = f"{self.module} ({self.module_class})"
        lines = [f"first difference: {self.tensor} {joint} {module}, relative {self.value:.1e}"]
        if self.pattern:
            lines.append(f"  tokens: {self.pattern}")
        lines += [f"  {'usual cause' if n == 0 else 'or'}: {cause}" for n, cause in enumerate(self.causes)]
        return "\n".join(lines)


@dataclass(frozen=True)
class ModelVerification:
    """The verdict on one model and one or more batches.

    Attributes:
        verdict: "exact", "different", "refused" (ring_hf would not train this) or "failed" (a pass raised an error).
        message: of a refusal or an error; else empty.
        setup: what was compared, by name.
        differences: the largest ones of all batches.
        first_difference: the origin of the first batch that differs.
        refusals: messages of the rules that refuse the model, if the comparison ran in spite of them.
    """

    verdict: str
    message: str = ""
    setup: Mapping[str, str] = dataclasses.field(default_factory=dict)
    differences: tuple[WorstDifference, ...] = ()
    first_difference: FirstDifference | None = None
    refusals: tuple[str, ...] = ()

    @property
    def is_exact(self) -> bool:
        return self.verdict == "exact"

    def report(self) -> str:
        """Return the report, a few lines of text."""
        lines = [f"{name}: {value}" for name, value in self.setup.items()]
        lines += [f"refused in training: {refusal}" for refusal in self.refusals]
        if self.differences:
            cells = [["", "worst difference", "tolerance", ""]]
            for each in self.differences:
                is_compared = each.value == each.value or not each.detail.startswith("not compared")
                numbers = [f"{each.value:.1e}", f"{each.tolerance:.0e}"] if is_compared else ["", ""]
                cells.append([each.quantity, *numbers, each.detail])
            lines += ["", markdown_table(cells, align="lrrl"), ""]
        if self.first_difference is not None:
            lines.append(str(self.first_difference))
        lines.append(f"verdict: {self.verdict}{': ' * bool(self.message)}{self.message}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, from which `from_json` makes an equal object."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ModelVerification":
        first = values["first_difference"]
        if first is not None:
            first = FirstDifference(**{**first, "tokens": tuple(first["tokens"]), "causes": tuple(first["causes"])})
        differences = tuple(WorstDifference(**each) for each in values["differences"])
        refusals = tuple(values["refusals"])
        return cls(**{**values, "differences": differences, "first_difference": first, "refusals": refusals})


def combine(results: list[ModelVerification]) -> ModelVerification:
    """Return one result of several batches: the first that is not exact, with the largest differences of all."""
    worst = next((result for result in results if not result.is_exact), results[-1])
    by_quantity: dict[str, WorstDifference] = {}
    for each in (difference for result in results for difference in result.differences):
        present = by_quantity.get(each.quantity)
        if present is None or not each.value <= present.value:
            by_quantity[each.quantity] = each
    setup = {**worst.setup, "batches": str(len(results))} if len(results) > 1 else worst.setup
    return dataclasses.replace(worst, setup=setup, differences=tuple(by_quantity.values()))
