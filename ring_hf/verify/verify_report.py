"""The results of `ring-hf verify` as Markdown: a verdict and a table per section."""

from collections.abc import Sequence
from typing import Any

from ring_hf.text import markdown_table

from .exactness import NAMES


def markdown(results: dict[str, Any]) -> str:
    """Return a document with the finished sections of results.json."""
    about = results["about"]
    parts = [f"# GPU check, {about['device']}, {about['date']}", "", f"`{about['command']}`", ""]
    parts += [", ".join(f"{name} {version}" for name, version in about["versions"].items()), ""]
    for name, section in results["sections"].items():
        verdict = "ok" if section["ok"] else "FAILED"
        verdict += "" if section.get("finished", True) else ", not finished"
        parts += [f"## {name}: {verdict}", "", *_SECTIONS[name](section), ""]
    return "\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    return markdown_table([head, *rows], align="l" * left + "r", padded=False).splitlines()


def _exactness(section: dict[str, Any]) -> list[str]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in section["rows"]:
        groups.setdefault((row["kernel"], row["dtype"]), []).append(row)
    rows = []
    for (kernel, dtype), each in groups.items():
        exact = sum(row["exact"] for row in each)
        finished = [row for row in each if row["errors"]]
        worst = [f"{max(row['errors'][name] for row in finished):.1e}" if finished else "" for name in NAMES]
        ratios = [row["ratio"] for row in each]
        ratio = "too large" if None in ratios else f"{max(ratios):.2f}"
        rows.append([kernel, dtype, f"{exact} of {len(each)}", *worst, ratio])
    head = ["kernel", "dtype", "exact", *NAMES, "worst error / bar"]
    lines = ["Relative RMS error against fp64, the worst of all problems.", "", *_table(head, rows, 2)]
    failed = [row for row in section["rows"] if not row["exact"]]
    if failed:
        lines += ["", "Not exact:", ""]
        lines += [f"- {row['kernel']}, {row['dtype']}, {row['problem']}: {_errors(row)}" for row in failed]
    if section["left_out"]:
        lines += ["", "Not tried:", ""]
        by_reason: dict[str, list[str]] = {}
        for entry, count in section["left_out"].items():
            kernel, reason = entry.split(": ", 1)
            by_reason.setdefault(f"{reason} ({count} problem{'s' * (count > 1)})", []).append(kernel)
        lines += [f"- {reason}: {'; '.join(kernels)}" for reason, kernels in by_reason.items()]
    return lines


def _errors(row: dict[str, Any]) -> str:
    if row["failure"]:
        return row["failure"]
    plain = row["one_process"]
    pairs = [
        f"{name} {error:.1e}" + (f" (one process {plain[name]:.1e})" if name in plain else "")
        for name, error in row["errors"].items()
    ]
    return ", ".join(pairs)


def _trainer(section: dict[str, Any]) -> list[str]:
    rows = []
    for row in section["rows"]:
        allowed = row["allowed"]
        differences = [f"{row[name]:.1e} (bar {allowed[name]:.1e})" for name in ("loss", "grad_norm")]
        rows.append([row["run"], *differences, "same" if row["same"] else "differs"])
    text = f"{section['steps']} steps of a tiny Llama; the largest relative difference from one process with `sdpa`."
    return [text, "", *_table(["run", "loss", "grad norm", ""], rows)]


def _benchmark(section: dict[str, Any]) -> list[str]:
    head = ["tokens", "heads", "dtype", "variant", "forward", "TFLOP/s", "efficiency", "overhead"]
    head += ["forward + backward", "TFLOP/s", "efficiency", "overhead"]
    rows = []
    for row in section["rows"]:
        cells = [f"{row['tokens']:,}", f"{row['heads']}/{row['kv_heads']} x {row['head_dim']}", row["dtype"]]
        cells.append(row["variant"] + (f", {row['ranks']} ranks" if row["ranks"] > 1 else ""))
        for key in ("forward", "both"):
            cells += [f"{1e3 * row[key]:.3g} ms", f"{row[f'tflops_{key}']:.3g}", f"{row[f'efficiency_{key}']:.2f}"]
            cells += [f"{row[f'overhead_{key}']:.2f}"]
        rows.append(cells)
    text = (
        f"Medians of {section['repeats']} interleaved runs; of a ring, the slowest rank with all blocks resident (no "
        "exchange). FLOPs are causal: 2 s^2 H D forward, 2.5 times that backward. Efficiency: the fastest single "
        "device / (ranks x the slowest rank); overhead: all ranks together / the fastest single device."
    )
    return [text, "", *_table(head, rows, 4), *([""] * bool(section["left_out"])), *section["left_out"]]


def _steps(section: dict[str, Any]) -> list[str]:
    rows, lines = section["rows"], []
    training_runs = {name: row for name, row in rows.items() if row["kind"] == "steps"}
    if training_runs:
        head = ["run", "settings", "kernel", "step", "predicted", "ratio", "tokens/s", "MFU"]
        head += ["peak", "predicted", "ratio"]
        cells = [[name, row["setting"], row["kernel"], *_cells(row)] for name, row in training_runs.items()]
        lines += [
            f"Steps of {section['model']}{', made tiny,' * section['tiny']} with random weights, the median of those "
            f"after the first; predicted by `ring-hf plan` for {section['device']}. MFU: causal FLOPs of the model, "
            "nothing recomputed, over the dense peak in bf16. One rank's share is without the exchange and its "
            "buffers.",
            "",
            *_table(head, cells, 3),
        ]
    for name, row in rows.items():
        if row["kind"] == "attention":
            passes = [
                f"{key} {1e3 * row[key]['seconds']:.3g} ms ({row[key]['tflops']:.3g} TFLOP/s; predicted "
                f"{1e3 * row[key]['predicted']:.3g} ms, ratio {row[key]['ratio']:.2f})"
                for key in ("forward", "backward")
            ]
            lines += ["", f"{name}, {row['kernel']}: {', '.join(passes)}."]
    if section["agreement"]:
        cells = [
            [row["run"], f"{row['tokens']:,}", row["against"]]
            + [f"{row[key]:.1e} (bar {row['allowed'][key]:.1e})" for key in ("loss", "grad_norm")]
            + ["same" if row["same"] else "differs"]
            for row in section["agreement"]
        ]
        text = (
            "The largest relative difference of a step; the bar is twice that of `sdpa` in bf16 from `sdpa` in fp32."
        )
        lines += ["", text, "", *_table(["run", "tokens", "against", "loss", "grad norm", ""], cells, 3)]
    failed = [f"- {name}: {row['outcome']}" for name, row in rows.items() if row["kind"] == "failure"]
    left_out = [f"- {name}: {reason}" for name, reason in section["left_out"].items()]
    for title, entries in (("Failed:", failed), ("Left out:", left_out)):
        lines += ["", title, "", *entries] if entries else []
    return lines


def _cells(row: dict[str, Any]) -> list[str]:
    """Return seconds, rates and memory of a run, measured beside predicted."""
    predicted, gib = row["predicted"], 2**30
    seconds, memory = f"{predicted['seconds']:.3g} s", f"{predicted['memory'] / gib:.1f} GiB"
    if row["outcome"] != "ran":
        return [row["outcome"], seconds, "", "", "", "", memory, ""]
    ratio = {key: f"{value:.2f}" for key, value in row["ratio"].items()}
    rates = [f"{row['tokens_per_second']:,.0f}", f"{100 * row['mfu']:.1f} %"]
    peak = f"{row['memory'] / gib:.1f} GiB"
    return [f"{row['seconds']:.3g} s", seconds, ratio["seconds"], *rates, peak, memory, ratio["memory"]]


_SECTIONS = {"exactness": _exactness, "trainer": _trainer, "benchmark": _benchmark, "steps": _steps}
