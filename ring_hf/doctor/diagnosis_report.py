"""The facts and the advice as plain text, aligned and short enough for one screen."""

import itertools
import textwrap
from collections.abc import Sequence

from ..costmodel.devices import BACKWARD_FLOPS_RATIO
from ..geometry import auto_ulysses
from ..text import align_columns, format_bytes, format_duration
from .advice import Advice
from .facts import Diagnosis

_WIDTH = 112


def render(facts: Diagnosis, advice: Sequence[Advice]) -> str:
    """The whole report."""
    question = facts.question
    ranks = f"{question.ranks} ranks" if question.ranks > 1 else "1 rank"
    title = f"{question.model}, {question.sequence:,} tokens on {ranks}, {question.layout}, {question.dtype}"
    parts = [title, *_versions(facts), *_devices(facts), *_kernels(facts)]
    parts += [*_engines(facts), *_links(facts), *_speed(facts), *_overlap(facts), *_advice(advice)]
    return "\n".join(line.rstrip() for line in parts)


def _head(name: str, words: str = "") -> str:
    return f"\n{name:<11} {words}"


def _wrapped(words: str, indent: int) -> list[str]:
    return textwrap.wrap(words, _WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent)


def _versions(facts: Diagnosis) -> list[str]:
    rows = [["", "found", "needs", "tested", ""]]
    for one in facts.packages:
        found = one.found or ("missing" if one.required else "-")
        mark = "" if one.fits else "does not fit"
        rows.append([one.name, found, one.needs, one.tested or "", one.notes or mark])
    return [_head("versions"), *align_columns(rows)]


def _devices(facts: Diagnosis) -> list[str]:
    devices = facts.devices
    names = ", ".join(f"{devices.names.count(name)} x {name}" for name in dict.fromkeys(devices.names))
    words = [names if devices.kind == "cuda" else f"{devices.cores} CPU cores, {devices.names[0]}"]
    words.append(f"{format_bytes(devices.memory)} of memory")
    words += [f"compute capability {'.'.join(map(str, devices.capability))}"] if devices.capability else []
    if devices.peers is not None:
        words.append("every GPU reaches every other one" if devices.peers else "some GPUs do not reach each other")
    variables = " ".join(f"{name}={value}" for name, value in facts.environment.items())
    return [_head("device", ", ".join(words)), *([f"  {variables}"] if variables else [])]


def _kernels(facts: Diagnosis) -> list[str]:
    words = "no attention layers found" if not facts.layers else "layers as the configuration names them"
    lines = [_head("kernels", "" if facts.probed and facts.layers else words)]
    for _, group in itertools.groupby(facts.layers, lambda one: (one.kernel, tuple(one.kernels.items()))):
        alike = list(group)
        for one in alike:
            count = "1 layer" if one.count == 1 else f"{one.count} layers"
            lines.append(f"  {facts.model_type}, {count}: {one.describe()}")
        rows = []
        for name, reason in alike[0].kernels.items():
            verdict = "used" if name == alike[0].kernel else "fits, slower" if reason is None else "no"
            rows.append(["", name, verdict, reason or ""])
        lines += align_columns(rows)
    ranks = facts.question.ranks
    if facts.layers and ranks > 1:
        even = min(auto_ulysses(one.num_heads, one.num_kv_heads, ranks, ranks) for one in facts.layers)
        lines.append(f"  heads divide evenly among {even} of {ranks} ranks (Ulysses)")
    return lines


def _engines(facts: Diagnosis) -> list[str]:
    if not facts.engines:
        return []
    rows = [
        [one.name, format_bytes(one.held), f"no: {one.missing}" if one.missing else "runs here"]
        for one in facts.engines
    ]
    words = f"weights, gradients and fp32 AdamW on a rank of {facts.question.ranks}"
    return [_head("engines", words), *align_columns(rows)]


def _links(facts: Diagnosis) -> list[str]:
    links = facts.links
    if links.error is not None:
        return [_head("links", f"{links.processes} processes over {links.backend}: failed"), *_wrapped(links.error, 2)]
    if not links.times:
        return [_head("links", "one process: nothing to measure")]
    words = f"{links.processes} processes over {links.backend}, each to its neighbour at once: "
    words += f"{format_bytes(links.bandwidth)}/s, latency {format_duration(links.latency)}"
    sizes = "   ".join(f"{format_bytes(size)} in {format_duration(seconds)}" for size, seconds in links.times)
    return [_head("links", words), f"  {sizes}"]


def _speed(facts: Diagnosis) -> list[str]:
    if not facts.speeds:
        return []
    rows = [["tokens", "forward", "", "backward", ""]]
    for one in facts.speeds:
        forward, backward = one.flops / one.forward, BACKWARD_FLOPS_RATIO * one.flops / one.backward
        rates = [_rate(forward), _rate(backward)]
        rows.append(
            [f"{one.tokens:,}", format_duration(one.forward), rates[0], format_duration(one.backward), rates[1]]
        )
    return [_head("attention", "one causal layer on one device"), *align_columns(rows)]


def _rate(flops: float) -> str:
    return f"{flops / 1e12:.0f} TFLOP/s" if flops >= 1e13 else f"{flops / 1e9:.3g} GFLOP/s"


def _overlap(facts: Diagnosis) -> list[str]:
    overlap = facts.overlap
    if overlap is None:
        return []
    lines = [
        _head("overlap", f"predicted for all layers of a step, {overlap.tokens:,} tokens on a rank; {overlap.links}")
    ]
    rows = [["", "forward", "exposed", "backward", "exposed", ""]]
    for way in overlap.ways:
        cells = [format_duration(way.forward), f"{way.exposed_forward / way.forward:.0%}"]
        cells += [format_duration(way.backward), f"{way.exposed_backward / way.backward:.0%}"]
        rows.append([way.name, *cells, "fastest" if way is overlap.best else ""])
    lines += align_columns(rows)
    if overlap.least_forward is not None:
        lines.append(
            f"  a ring hides its messages from {overlap.least_forward:,} tokens on a rank forward, "
            f"{overlap.least_backward:,} backward"
        )
    return lines


def _advice(advice: Sequence[Advice]) -> list[str]:
    if not advice:
        return [_head("advice", "nothing to change")]
    lines = [_head("advice")]
    for number, one in enumerate(advice, 1):
        mark = "must: " if one.refuses else ""
        lines += textwrap.wrap(f"{number}. {mark}{one.action}", _WIDTH, initial_indent="  ", subsequent_indent="     ")
        lines += _wrapped(one.reason, 5)
    return lines
