"""Tables, numbers and plots of `evaluate.py`."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from evaluation_arguments import EvaluationArguments

from ring_hf.evaluation import format_positions, plot_perplexity
from ring_hf.evaluation.grid_charts import plot_grids
from ring_hf.evaluation.perplexity_report import perplexity_rows, plot_positions
from ring_hf.evaluation.retrieval_grid import GridResult, format_scores, scores_by_length
from ring_hf.evaluation.short_context import ShortContextCheck, check_short_context, warnings_of, with_short_context
from ring_hf.evaluation.sliding_perplexity import PerplexityResult
from ring_hf.text import markdown_table


@dataclass
class Measurements:
    """Results of all models by name.

    Attributes:
        short_length: tokens of context of the short-context check; 0: none.
    """

    short_length: int
    retrieval: dict[str, GridResult] = field(default_factory=dict)
    perplexity: dict[str, PerplexityResult] = field(default_factory=dict)


def write_reports(args: EvaluationArguments, measurements: Measurements) -> None:
    """Print the tables and warnings; write them, the numbers and the plots to output_dir."""
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    checks: dict[str, ShortContextCheck] = {}
    warnings: list[str] = []
    if measurements.short_length:
        reference = args.reference or next(iter(measurements.perplexity))
        margin = args.short_context_margin
        checks = check_short_context(measurements.perplexity, measurements.short_length, reference, margin)
        warnings = [f"Warning: {sentence}" for sentence in warnings_of(checks, reference, margin)]
    numbers = {"short_context": {name: asdict(check) for name, check in checks.items()}, "warnings": warnings}
    if measurements.retrieval:
        _write_retrieval(args, folder, measurements.retrieval, checks, numbers)
    if measurements.perplexity:
        _write_perplexity(args, folder, measurements, checks, numbers)
    for sentence in warnings:
        print(f"\n{sentence}")


def _write_retrieval(
    args: EvaluationArguments,
    folder: Path,
    results: dict[str, GridResult],
    checks: dict[str, ShortContextCheck],
    numbers: dict[str, Any],
) -> None:
    table = markdown_table(with_short_context(format_scores(results, sorted(args.lengths)), checks, 1))
    scores = {name: scores_by_length(result) for name, result in results.items()}
    _write(folder / "retrieval", {"scores": scores, "rounds": args.rounds, **numbers}, [
        "Score in percent by tokens of the prompt.", table, *numbers["warnings"],
    ])  # fmt: skip
    plot_grids(results, folder / "retrieval.png")
    print(f"\n{table}\n\nheat maps: {folder / 'retrieval.png'}")


def _write_perplexity(
    args: EvaluationArguments,
    folder: Path,
    measurements: Measurements,
    checks: dict[str, ShortContextCheck],
    numbers: dict[str, Any],
) -> None:
    results = measurements.perplexity
    lengths = sorted(args.lengths) if "perplexity" in args.tasks else []
    by_length = {name: result.all_lengths(lengths) for name, result in results.items()}
    table = markdown_table(with_short_context(perplexity_rows(by_length), checks, 0))
    texts, plots = [table], []
    if lengths:
        plots.append(folder / "perplexity.png")
        plot_perplexity(by_length, plots[-1], "Perplexity by context length")
    positions = {}
    if "perplexity_by_position" in args.tasks:
        positions = {name: result.at_length(max(args.lengths)) for name, result in results.items()}
        texts.append(format_positions({name: [result] for name, result in positions.items()}))
        plots.append(folder / "perplexity_by_position.png")
        plot_positions(positions, plots[-1], f"Loss by position, {max(args.lengths):,} tokens")
    of_models = {
        name: {"lengths": [row.to_dict() for row in result.all_lengths()], "excerpts": result.num_excerpts}
        for name, result in results.items()
    }
    _write(folder / "perplexity", {"results": of_models, **numbers}, [*texts, *numbers["warnings"]])
    if plots or not measurements.retrieval:  # else the column of the other table says it all
        print("\n" + "\n\n".join(texts))
    if plots:
        print(f"\nplots: {', '.join(map(str, plots))}")


def _write(path: Path, numbers: dict[str, Any], texts: list[str]) -> None:
    path.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n\n".join(texts) + "\n")
