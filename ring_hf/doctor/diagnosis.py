"""The examination: looks, measures, predicts, in this order; `diagnose` returns the facts."""

import logging
from dataclasses import replace

import torch

from ..hf.attn_names import BACKENDS, ULYSSES
from ..hf.checks.inspection import AttentionKind, inspect_model, load_config
from ..kernels import candidates
from ..planner import read_keys
from . import machine
from .engine_checks import find_engines
from .facts import AttentionGroup, Devices, Diagnosis, Links, Query
from .measurement import measure
from .overlap_estimate import predict
from .rank_launch import Job, RankTimeout, run_here, run_ranks, under_launcher

logger = logging.getLogger("ring_hf")
_MESSAGES = (1, 2**16, 2**20, 2**24)  # bytes
_MOST_MESSAGE = {"cpu": 2**24, "cuda": 2**28}
_SHORT = {"cpu": 512, "cuda": 4096}  # tokens
_PROCESSES_ON_A_CPU = 2


def diagnose(question: Query, seconds: float = 120.0, repeats: int = 5) -> Diagnosis | None:
    """Everything about a question; None on all ranks of a launcher but the first.

    Args:
        question: with `ranks=0`, as many as there are processes to measure with.
        seconds: after which ranks that do not answer are given up.
        repeats: timed exchanges per message size.

    Raises:
        ValueError: if there is no such model or layout.
    """
    found = machine.devices()
    environment = machine.environment()
    started = _processes(found, question.ranks, environment)
    question = replace(question, ranks=question.ranks or started)
    if question.layout not in BACKENDS.values():
        raise ValueError(f"layout={question.layout!r} is not known. Choose one of {', '.join(BACKENDS.values())}.")
    backend = next(name for name, layout in BACKENDS.items() if layout == question.layout and name != ULYSSES)
    keys, name, source = read_keys(question.model)
    model = inspect_model(name, load_config(keys, source), backend)
    layers = tuple(_layers(kind, count, question.dtype, found.kind) for kind, count in model.kinds)
    facts = Diagnosis(
        question=question,
        packages=machine.packages(),
        devices=found,
        model_type=model.model_type,
        refused=model.error,
        probed=model.is_probed,
        layers=layers,
        links=Links(started, "nccl" if found.kind == "cuda" else "gloo"),
        environment=environment,
    )
    facts = replace(facts, engines=find_engines(question, keys, found, facts.packages))
    measured = _measured(facts, _job(facts, seconds, repeats), started)
    return measured and replace(measured, overlap=predict(measured))


def _processes(devices: Devices, ranks: int, environment: dict[str, str]) -> int:
    if under_launcher():
        return int(environment["WORLD_SIZE"])
    if devices.kind == "cuda":
        return min(ranks or len(devices.names), len(devices.names))
    return min(ranks or _PROCESSES_ON_A_CPU, max(_PROCESSES_ON_A_CPU, devices.cores))


def _layers(kind: AttentionKind, count: int, dtype: str, device: str) -> AttentionGroup:
    """The kernels for layers of a kind, asked with tensors like theirs."""
    q, v = (
        torch.empty(1, heads, 1, dim, dtype=getattr(torch, dtype), device=device)
        for heads, dim in ((kind.num_heads, kind.head_dim), (kind.num_kv_heads, kind.v_head_dim))
    )
    fitting = candidates("auto", q, v, kind.softcap)
    chosen = next((name for name, reason in fitting.items() if reason is None), None)
    return AttentionGroup(count, **vars(kind), kernel=chosen, kernels=fitting)


def _job(facts: Diagnosis, seconds: float, repeats: int) -> Job:
    kind, question = facts.devices.kind, facts.question
    heads, softcap = (1, 1, 64, 64), None
    if facts.layers:  # those that see most, the largest of them
        one = max(facts.layers, key=lambda one: (one.visible is None, one.num_heads * one.head_dim))
        heads, softcap = (one.num_heads, one.num_kv_heads, one.head_dim, one.v_head_dim), one.softcap
    block = max(64, question.sequence // question.ranks)
    lengths = tuple(sorted({min(_SHORT[kind], block), block}))
    messages = tuple(sorted({*_MESSAGES, _MOST_MESSAGE[kind]}))
    return Job(kind, question.dtype, heads, softcap, lengths if facts.layers else (), messages, repeats, seconds)


def _measured(facts: Diagnosis, job: Job, processes: int) -> Diagnosis | None:
    try:
        if under_launcher():
            answers = [run_here(measure, job)]
        else:
            answers = run_ranks(measure, processes, job)
    except RankTimeout as error:
        return replace(facts, links=replace(facts.links, error=str(error)))
    if int(facts.environment.get("RANK", "0")):
        return None
    speeds, links = answers[0]
    return replace(facts, speeds=tuple(speeds), links=replace(facts.links, times=tuple(links)))
