"""Scores of synthetic tasks over a grid of lengths and depths, kept in a file so that an interrupted run continues.

Every line of the file is one example: its cell, the generated text and the score. A run with the same settings reads
what is there and computes the rest; a run with other settings is refused.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .haystack import Filler
from .record_file import append_record, begin_file, read_records
from .retrieval_tasks import RETRIEVAL_TASKS, make_example

Generate = Callable[[str, int], str]  # (prompt, most new tokens) -> the generated text


@dataclass(frozen=True)
class Cell:
    """One example of a grid: `length` tokens, the fact at `depth` from 0 to 1, one of several rounds."""

    task: str
    length: int
    depth: float
    round: int


@dataclass(frozen=True)
class GridSpec:
    """The examples to measure.

    Attributes:
        tasks: names of `RETRIEVAL_TASKS`.
        lengths: tokens of the prompts; the new tokens come on top.
        num_depths: depths from 0 to 1, at equal distances.
        rounds: examples for each length and depth.
        seed: of all examples.

    Raises:
        ValueError: if a task is unknown or a number is below 1.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    num_depths: int = 10
    rounds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in RETRIEVAL_TASKS]
        if unknown or not self.tasks:
            raise ValueError(f"tasks={list(self.tasks)}: choose one or more of {', '.join(RETRIEVAL_TASKS)}.")
        if min(self.num_depths, self.rounds, *self.lengths, *([] if self.lengths else [0])) < 1:
            raise ValueError(
                f"lengths={list(self.lengths)}, num_depths={self.num_depths}, rounds={self.rounds}: each must be at "
                "least 1, and there must be a length."
            )

    def depths(self, task: str) -> tuple[float, ...]:
        if not RETRIEVAL_TASKS[task].has_depth or self.num_depths == 1:
            return (0.5,)
        return tuple(round(n / (self.num_depths - 1), 4) for n in range(self.num_depths))

    def cells(self) -> Iterator[Cell]:
        """Yield all examples, short ones first, so that a first impression takes little time."""
        for length in sorted(self.lengths):
            for task in self.tasks:
                for depth in self.depths(task):
                    for number in range(self.rounds):
                        yield Cell(task, length, depth, number)


@dataclass
class GridResult:
    """Scores of one model.

    Attributes:
        spec: the grid.
        origin: what else decides about the scores.
        scores: by cell; cells that have not run are missing.
    """

    spec: GridSpec
    origin: dict[str, Any] = field(default_factory=dict)
    scores: dict[Cell, float] = field(default_factory=dict)

    def mean(self, task: str, length: int, depth: float | None = None) -> float | None:
        """Return the mean score of a task at a length (and depth), or None if nothing has run there."""
        scores = [
            score
            for cell, score in self.scores.items()
            if cell.task == task and cell.length == length and depth in (None, cell.depth)
        ]
        return sum(scores) / len(scores) if scores else None


def read_grid(path: Path, spec: GridSpec, origin: Mapping[str, Any]) -> GridResult:
    """Return the scores that a file holds; none if there is no file. A last line that was cut off is ignored.

    Args:
        path: of the file that `run_grid` writes.
        spec: the grid.
        origin: what else decides about the scores (the model, the text, the dtype), as JSON knows it.

    Raises:
        ValueError: if the file is of another grid or origin.
    """
    result = GridResult(spec, dict(origin))
    for record in read_records(path, _header(result)):
        result.scores[Cell(**record["cell"])] = record["score"]
    return result


def run_grid(
    spec: GridSpec,
    generate: Generate,
    filler: Filler,
    path: Path,
    *,
    done: GridResult,
    writes: bool = True,
    report_progress: Callable[[int, int], None] = lambda done, total: None,
) -> GridResult:
    """Generate the answers of all cells that have no score, and append them to the file.

    Args:
        spec: the grid.
        generate: returns the text that a model generates after a prompt. If ranks share a sequence, all call it.
        filler: text of the prompts.
        path: of the file.
        done: what `read_grid` returned, the same on every rank.
        writes: whether this process writes the file; one does.
        report_progress: called with the numbers of finished and of all cells.

    Raises:
        ValueError: if a length is too short for a task.
    """
    result = GridResult(spec, done.origin, dict(done.scores))
    cells = list(spec.cells())
    if writes:
        begin_file(path, _header(result), len(result.scores))
    for cell in cells:
        if cell in result.scores:
            continue
        example = make_example(cell.task, cell.length, cell.depth, cell.round, spec.seed, filler)
        text = generate(example.prompt, example.max_new_tokens)
        result.scores[cell] = example.score(text)
        if writes:
            record = {"cell": asdict(cell), "score": result.scores[cell], "text": text, "answers": example.answers}
            append_record(path, record)
        report_progress(len(result.scores), len(cells))
    return result


def _header(result: GridResult) -> dict[str, Any]:
    return {"grid": asdict(result.spec), "origin": result.origin}


def scores_by_length(result: GridResult) -> dict[str, dict[int, float]]:
    """Return the mean score of each task at each length that has run."""
    table: dict[str, dict[int, float]] = defaultdict(dict)
    for task in result.spec.tasks:
        for length in sorted(result.spec.lengths):
            mean = result.mean(task, length)
            if mean is not None:
                table[task][length] = mean
    return dict(table)


def format_scores(results: dict[str, GridResult], lengths: Sequence[int]) -> list[list[str]]:
    """Return rows of task, model and the score in percent at each length, for `text.markdown_table`."""
    rows = [["task", "model", *(f"{length:,}" for length in lengths)]]
    tasks = dict.fromkeys(task for result in results.values() for task in result.spec.tasks)
    for task in tasks:
        for name, result in results.items():
            means = [result.mean(task, length) for length in lengths]
            rows.append([task, name, *("" if mean is None else f"{100 * mean:.0f}" for mean in means)])
    return rows
