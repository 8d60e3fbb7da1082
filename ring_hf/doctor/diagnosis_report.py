"""The report and the advice as plain text, aligned and short enough for one screen."""

import itertools
import textwrap
from collections.abc import Sequence

from ..costmodel.devices import BACKWARD_FLOPS_RATIO
from ..geometry import auto_ulysses
from ..text import align_columns, format_bytes, format_duration
from .advice import Advice
from .machine_report import MachineReport

_WIDTH = 112


def render(report: MachineReport, advice: Sequence[Advice]) -> str:
    """Return the whole report as text."""
    query = report.query
    ranks = f"{query.num_ranks} ranks" if query.num_ranks > 1 else "1 rank"
    title = f"{query.model}, {query.seq_length:,} tokens on {ranks}, {query.layout}, {query.dtype}"
    lines = [title, *_versions(report), *_devices(report), *_kernels(report), *_engines(report), *_links(report)]
    lines += [*_attention_speed(report), *_overlap(report), *_advice(advice)]
    return "\n".join(line.rstrip() for line in lines)


def _heading(name: str, text: str = "") -> str:
    return f"\n{name:<11} {text}"


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent)


def _versions(report: MachineReport) -> list[str]:
    rows = [["", "installed", "supported", "tested", ""]]
    for package in report.packages:
        version = package.version or ("missing" if package.is_required else "-")
        notes = package.notes or ("" if package.is_supported else "not supported")
        rows.append([package.name, version, package.version_range, package.tested_version or "", notes])
    return [_heading("versions"), *align_columns(rows)]


def _devices(report: MachineReport) -> list[str]:
    devices = report.devices
    names = ", ".join(f"{devices.names.count(name)} x {name}" for name in dict.fromkeys(devices.names))
    parts = [names if devices.kind == "cuda" else f"{devices.num_cores} CPU cores, {devices.names[0]}"]
    parts.append(f"{format_bytes(devices.memory)} of memory")
    if devices.capability:
        parts.append(f"compute capability {'.'.join(map(str, devices.capability))}")
    if devices.has_peer_access is not None:
        all_peers, no_peers = "every GPU reaches every other one", "some GPUs do not reach each other"
        parts.append(all_peers if devices.has_peer_access else no_peers)
    lines = [_heading("device", ", ".join(parts))]
    if report.environment:
        lines.append("  " + " ".join(f"{name}={value}" for name, value in report.environment.items()))
    return lines


def _kernels(report: MachineReport) -> list[str]:
    groups = report.attention_groups
    note = "layers as the configuration names them" if groups else "the model has no attention layers"
    lines = [_heading("kernels", "" if report.probed and groups else note)]
    for _, same_kernels in itertools.groupby(groups, lambda group: (group.kernel, tuple(group.rejections.items()))):
        alike = list(same_kernels)
        for group in alike:
            count = "1 layer" if group.count == 1 else f"{group.count} layers"
            lines.append(f"  {report.model_type}, {count}: {group.describe()}")
        rows = []
        for name, reason in alike[0].rejections.items():
            verdict = "used" if name == alike[0].kernel else "fits, slower" if reason is None else "no"
            rows.append(["", name, verdict, reason or ""])
        lines += align_columns(rows)
    num_ranks = report.query.num_ranks
    if groups and num_ranks > 1:
        even = min(auto_ulysses(group.num_heads, group.num_kv_heads, num_ranks, num_ranks) for group in groups)
        lines.append(f"  heads divide evenly among {even} of {num_ranks} ranks (Ulysses)")
    return lines


def _engines(report: MachineReport) -> list[str]:
    if not report.engines:
        return []
    rows = []
    for engine in report.engines:
        verdict = f"no: {engine.unavailable_reason}" if engine.unavailable_reason else "runs here"
        rows.append([engine.name, format_bytes(engine.state_bytes), verdict])
    text = f"weights, gradients and fp32 AdamW states on each of {report.query.num_ranks} ranks"
    return [_heading("engines", text), *align_columns(rows)]


def _links(report: MachineReport) -> list[str]:
    links = report.links
    processes = f"{links.num_processes} processes over {links.backend}"
    if links.error is not None:
        return [_heading("links", f"{processes}: failed"), *_wrapped(links.error, 2)]
    if not links.times:
        return [_heading("links", "one process: nothing to measure")]
    rates = f"{format_bytes(links.bandwidth)}/s, latency {format_duration(links.latency)}"
    sizes = "   ".join(f"{format_bytes(size)} in {format_duration(seconds)}" for size, seconds in links.times)
    return [_heading("links", f"{processes}, all sending to a neighbour at the same time: {rates}"), f"  {sizes}"]


def _attention_speed(report: MachineReport) -> list[str]:
    if not report.timings:
        return []
    rows = [["tokens", "forward", "", "backward", ""]]
    for timing in report.timings:
        forward, backward = timing.flops / timing.forward, BACKWARD_FLOPS_RATIO * timing.flops / timing.backward
        cells = [format_duration(timing.forward), _rate(forward), format_duration(timing.backward), _rate(backward)]
        rows.append([f"{timing.tokens:,}", *cells])
    return [_heading("attention", "one causal layer on one device"), *align_columns(rows)]


def _rate(flops: float) -> str:
    return f"{flops / 1e12:.0f} TFLOP/s" if flops >= 1e13 else f"{flops / 1e9:.3g} GFLOP/s"


def _overlap(report: MachineReport) -> list[str]:
    overlap = report.overlap
    if overlap is None:
        return []
    text = f"predicted for all layers of a step, {overlap.tokens:,} tokens per rank; {overlap.links_source}"
    rows = [["", "forward", "exposed", "backward", "exposed", ""]]
    for algorithm in overlap.algorithms:
        cells = [format_duration(algorithm.forward), f"{algorithm.exposed_forward / algorithm.forward:.0%}"]
        cells += [format_duration(algorithm.backward), f"{algorithm.exposed_backward / algorithm.backward:.0%}"]
        rows.append([algorithm.name, *cells, "fastest" if algorithm is overlap.fastest else ""])
    lines = [_heading("overlap", text), *align_columns(rows)]
    if overlap.min_tokens_forward is not None:
        lines.append(
            f"  a ring hides its messages from {overlap.min_tokens_forward:,} tokens per rank on in the forward, "
            f"{overlap.min_tokens_backward:,} in the backward"
        )
    return lines


def _advice(advice: Sequence[Advice]) -> list[str]:
    if not advice:
        return [_heading("advice", "nothing to change")]
    lines = [_heading("advice")]
    for number, item in enumerate(advice, 1):
        action = f"{number}. {'must: ' if item.blocks_training else ''}{item.action}"
        lines += textwrap.wrap(action, _WIDTH, initial_indent="  ", subsequent_indent="     ")
        lines += _wrapped(item.reason, 5)
    return lines
