"""Whether a model predicts short text as well as before: the check beside every evaluation of a long context.

Training at a long context may cost quality at short ones, which neither retrieval nor perplexity at the long length
shows. Every model is compared with a reference (the model before), on the same text at one short length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .sliding_perplexity import PerplexityResult

SHORTEST, LONGEST = 512, 2048  # tokens, of the automatic length


@dataclass(frozen=True)
class ShortContextCheck:
    """Perplexity of one model at the short length.

    Attributes:
        length: tokens of context.
        perplexity: of this model.
        change: relative to the reference; None for the reference itself, and if its text has other tokens.
        is_worse: whether the change exceeds the margin.
    """

    length: int
    perplexity: float
    change: float | None
    is_worse: bool

    def __str__(self) -> str:
        if self.change is None:
            return f"{self.perplexity:.2f}"
        return f"{self.perplexity:.2f} ({100 * self.change:+.1f} %{', worse' if self.is_worse else ''})"


def automatic_length(original_length: int | None) -> int:
    """Return the short length for a model that was trained at `original_length` tokens: that, within 512 to 2,048."""
    return min(max(original_length or SHORTEST, SHORTEST), LONGEST)


def check_short_context(
    results: Mapping[str, PerplexityResult], length: int, reference: str, margin: float
) -> dict[str, ShortContextCheck]:
    """Compare all models with the reference.

    Args:
        results: by name of the model, measured at `length` among others.
        length: tokens of context.
        reference: name of the model that is compared with.
        margin: by which perplexity may rise, relative to the reference.

    Raises:
        ValueError: if the reference was not measured.
    """
    if reference not in results:
        raise ValueError(f"reference={reference!r} is none of the models ({', '.join(results)}).")
    base = results[reference]
    before = base.at_length(length).perplexity
    checks = {}
    for name, result in results.items():
        perplexity = result.at_length(length).perplexity
        comparable = name != reference and result.text == base.text
        change = perplexity / before - 1 if comparable else None
        checks[name] = ShortContextCheck(length, perplexity, change, change is not None and change > margin)
    return checks


def warnings_of(checks: Mapping[str, ShortContextCheck], reference: str, margin: float) -> list[str]:
    """Return a sentence for each model that predicts short text worse, or cannot be compared."""
    sentences = []
    for name, check in checks.items():
        if check.is_worse:
            assert check.change is not None
            sentences.append(
                f"{name} predicts short text worse than {reference}: perplexity at {check.length:,} tokens is "
                f"{check.perplexity:.2f}, {100 * check.change:.1f} % higher, and the margin is {100 * margin:g} %."
            )
        elif check.change is None and name != reference:
            sentences.append(
                f"{name} has other tokens than {reference} in the same text, so that their perplexities cannot be "
                "compared."
            )
    return sentences


def with_short_context(
    table: Sequence[Sequence[str]], checks: Mapping[str, ShortContextCheck], model_column: int
) -> list[list[str]]:
    """Return a table with one more column: perplexity at the short length and its change, of the model of each row.

    Args:
        table: a header and rows, for `text.markdown_table`.
        checks: by name of the model; without any, the table is returned as it is.
        model_column: number of the column with the names.
    """
    if not checks:
        return [list(row) for row in table]
    length = next(iter(checks.values())).length
    header, *rows = table
    return [[*header, f"short context ({length:,})"], *([*row, str(checks[row[model_column]])] for row in rows)]
