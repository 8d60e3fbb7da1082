"""Tables and the picture of a run of stages."""

from pathlib import Path
from typing import Any

from model_card import read_perplexity
from run_log import LOG, read_rows
from run_plots import plot_stages
from stage_files import end_reason, taken_steps
from stages import Stage

from ring_hf.text import format_tokens, markdown_table

PICTURE = "stages.png"


def format_plan(stages: list[Stage]) -> str:
    """Return a table of what the stages will do."""
    rows = [["stage", "length", "RoPE", "tokens per step", "steps", "tokens", "processes", "learning rate"]]
    for stage in stages:
        values = stage.values
        rate = f"{float(values.get('learning_rate', 5e-5)):.3g} {values.get('lr_scheduler_type', 'linear')}"
        sequences = stage.batch.num_tokens // stage.batch.max_length
        rows.append(
            [
                f"{stage.index} {stage.name}",
                format_tokens(stage.batch.max_length, exact=True),
                describe_rope(stage.rope),
                f"{stage.batch.num_tokens:,} ({sequences} x {stage.batch.max_length:,})",
                f"{stage.num_steps:,}",
                f"{stage.num_tokens:,}",
                f"{stage.launch.num_processes} {stage.launch.engine}",
                rate,
            ]
        )
    return markdown_table(rows, align="lrlrrrll")


def describe_rope(rope: dict[str, Any] | None) -> str:
    """Return RoPE in a few characters: its base, and its type and factor if it is scaled."""
    if rope is None:
        return "as before"
    if any(isinstance(value, dict) for value in rope.values()):
        return "; ".join(f"{name}: {describe_rope(value)}" for name, value in rope.items() if value)
    kind = rope.get("rope_type", "default")
    scaled = "" if kind == "default" else f", {kind} x {rope.get('factor', 1):g}"
    return f"{rope['rope_theta']:.4g}{scaled}"


def stage_seconds(stage: Stage) -> float:
    """Return the seconds that a stage trained, without starts and evaluations, by the rates in its log."""
    seconds = previous = 0.0
    for row in read_rows(stage.folder / LOG):
        if "tokens_per_second" in row:
            seconds += (row["tokens"] - previous) / row["tokens_per_second"]
            previous = row["tokens"]
    return seconds


def format_report(stages: list[Stage], output_dir: Path) -> str:
    """Return the tables of finished stages: what each did, and perplexity by length before and after each."""
    rows = [["stage", "length", "RoPE", "steps", "tokens", "time", "tokens/s", "final loss", "ended by"]]
    for stage in stages:
        losses = [row["loss"] for row in read_rows(stage.folder / LOG) if "loss" in row]
        steps, seconds = taken_steps(stage), stage_seconds(stage)
        tokens = steps * stage.batch.num_tokens
        rows.append(
            [
                f"{stage.index} {stage.name}",
                format_tokens(stage.batch.max_length, exact=True),
                describe_rope(stage.rope),
                f"{steps:,}",
                f"{tokens:,}",
                format_hours(seconds),
                f"{tokens / seconds:,.0f}" if seconds else "-",
                f"{losses[-1]:.4f}" if losses else "-",
                end_reason(stage) or "budget",
            ]
        )
    tables = [markdown_table(rows, align="lrlrrrrrl")]
    measured = perplexities(stages, output_dir)
    if measured:
        lengths = sorted({row["length"] for results in measured.values() for row in results})
        rows = [["held-out perplexity", *(format_tokens(length, exact=True) for length in lengths)]]
        for name, results in measured.items():
            by_length = {row["length"]: f"{row['perplexity']:.3f}" for row in results}
            rows.append([name, *(by_length.get(length, "-") for length in lengths)])
        tables.append(markdown_table(rows, align="l" + "r" * len(lengths)))
    return "\n\n".join(tables)


def perplexities(stages: list[Stage], output_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the measurements by name, `before` first; without those that were not made."""
    folders = {"before": output_dir / "stage-00-base"} | {f"after {stage.name}": stage.folder for stage in stages}
    return {name: rows for name, folder in folders.items() if (rows := read_perplexity(folder))}


def draw_report(stages: list[Stage], output_dir: Path) -> Path:
    """Draw the losses of all stages and the perplexities; return the file."""
    path = output_dir / PICTURE
    logs = [{"name": stage.name, "rows": read_rows(stage.folder / LOG)} for stage in stages]
    plot_stages(logs, perplexities(stages, output_dir), path)
    return path


def format_hours(seconds: float) -> str:
    """Return a duration as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
