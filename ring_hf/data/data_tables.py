"""A data report as text: Markdown tables that are also aligned in a terminal."""

from ..text import format_tokens, markdown_table
from .data_report import BALANCE_SEQUENCES, DataReport, LengthBucket


def format_report(report: DataReport) -> str:
    """Return the report as Markdown tables, which are aligned in a terminal, too."""
    return "\n\n".join(
        block
        for block in (
            _format_sources(report),
            _format_overlong(report),
            _format_histogram(report),
            _format_sequences(report),
            _format_balance(report),
        )
        if block
    )


def _format_sources(report: DataReport) -> str:
    rows = [["source", "format", "documents", "tokens", "longest", "in an epoch", "trained on", "epochs", "share"]]
    for source in report.sources:
        asked = "" if source.asked_share is None else f" (asked {_percent(source.asked_share)})"
        numbers = (source.documents, source.tokens, source.longest, source.epoch_tokens, source.trained_tokens)
        rows.append(
            [
                source.name,
                source.format,
                *(f"{number:,}" for number in numbers),
                f"{source.epochs:.2f}",
                _percent(source.share) + asked,
            ]
        )
    note = "\nOnly the first documents of each source were read: numbers are of this sample." * report.is_sample
    return markdown_table(rows, align="llr") + note


def _format_overlong(report: DataReport) -> str:
    rows = [["source", "overlong", "longest span", "whole", "shortened", "dropped", "tokens kept", "too short"]]
    for source in report.sources:
        for choice, outcome in source.outcomes.items():
            share = outcome.kept_tokens / source.tokens
            rows.append(
                [
                    source.name,
                    choice + " (chosen)" * (choice == source.overlong),
                    f"{source.span_length:,}",
                    *(f"{number:,}" for number in (outcome.whole, outcome.shortened, outcome.dropped)),
                    f"{outcome.kept_tokens:,} ({_percent(share)})",
                    f"{source.short_documents:,}",
                ]
            )
    return markdown_table(rows, align="llr")


def _format_histogram(report: DataReport) -> str:
    rows = [["tokens, from", *(f"{source.name}: documents, tokens" for source in report.sources)]]
    buckets = [{bucket.least: bucket for bucket in source.histogram} for source in report.sources]
    for least in sorted({least for column in buckets for least in column}):
        cells = []
        for source, column in zip(report.sources, buckets, strict=True):
            bucket = column.get(least, LengthBucket(least, 0, 0))
            cells.append(
                f"{bucket.documents:,}, {_percent(bucket.tokens / source.tokens)}" if bucket.documents else ""
            )
        rows.append([format_tokens(least), *cells])
    return markdown_table(rows, align="r")


def _format_sequences(report: DataReport) -> str:
    mask = "attention across documents" if report.attend_across_documents else "documents masked"
    lines = [
        f"{report.sequences:,} sequences of at most {report.max_length:,} tokens ({report.packing}, {mask}): "
        f"{report.tokens:,} tokens in {report.spans:,} spans, {_percent(report.padding)} padding, "
        f"{report.targets:,} targets ({_percent(report.targets / report.tokens)} of the tokens).",
        f"Sequences in a step: {report.sequences_per_step:,}. Steps that read the mixture once: {report.steps:,}.",
    ]
    if report.passes is not None:
        lines.append(f"max_steps={report.max_steps:,} reads the mixture {report.passes:.3g} times.")
    return "\n".join(lines)


def _format_balance(report: DataReport) -> str:
    if not report.balance:
        return ""
    rows = [["layout", "busiest / mean rank, mean", "worst sequence"]]
    rows += [[row.layout, f"{row.mean:.3f}", f"{row.worst:.3f}"] for row in report.balance]
    count = min(report.sequences, BALANCE_SEQUENCES)
    title = f"Work over {report.context_parallel_size} ranks, {count} sequences:"
    return f"{title}\n\n{markdown_table(rows, align='lr')}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
