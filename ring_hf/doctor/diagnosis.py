"""The diagnosis: inspects the machine and the model, measures the ranks, predicts the overlap, in this order."""

from dataclasses import replace

import torch

from ..hf.attn_names import BACKENDS, ULYSSES
from ..hf.checks.inspection import AttentionKind, inspect_model, load_config
from ..kernels import candidates
from ..planner import read_config
from . import machine
from .engine_checks import find_engines
from .machine_report import AttentionGroup, Devices, LinkTimings, MachineReport, Query
from .measurement import measure
from .overlap_estimate import predict_overlap
from .rank_launch import RankJob, RankTimeout, is_under_launcher, launch_ranks, run_launched_rank

_MESSAGE_SIZES = (1, 2**16, 2**20, 2**24)  # bytes
_LARGEST_MESSAGE = {"cpu": 2**24, "cuda": 2**28}  # bytes
_SHORT_LENGTH = {"cpu": 512, "cuda": 4096}  # tokens
_CPU_PROCESSES = 2


def diagnose(query: Query, timeout: float = 120.0, repeats: int = 5) -> MachineReport | None:
    """Inspect and measure this machine for a query; return None on all ranks of a launcher but the first.

    Args:
        query: `num_ranks=0` means as many as there are processes to measure with.
        timeout: seconds after which ranks that do not answer are given up.
        repeats: timed exchanges per message size.

    Raises:
        ValueError: if the model or the layout does not exist.
    """
    devices = machine.find_devices()
    environment = machine.read_environment()
    num_processes = _num_processes(devices, query.num_ranks, environment)
    query = replace(query, num_ranks=query.num_ranks or num_processes)
    if query.layout not in BACKENDS.values():
        raise ValueError(f"layout={query.layout!r} is not known. Choose one of {', '.join(BACKENDS.values())}.")
    backend = next(name for name, layout in BACKENDS.items() if layout == query.layout and name != ULYSSES)
    keys, name, source = read_config(query.model)
    model = inspect_model(name, load_config(keys, source), backend)
    packages = machine.list_packages()
    report = MachineReport(
        query=query,
        packages=packages,
        devices=devices,
        model_type=model.model_type,
        refusal=model.error,
        probed=model.is_probed,
        attention_groups=tuple(
            _attention_group(kind, count, query.dtype, devices.kind) for kind, count in model.kinds
        ),
        links=LinkTimings(num_processes, "nccl" if devices.kind == "cuda" else "gloo"),
        engines=find_engines(query, keys, devices, packages),
        environment=environment,
    )
    measured = _add_measurements(report, _rank_job(report, timeout, repeats), num_processes)
    return measured and replace(measured, overlap=predict_overlap(measured))


def _num_processes(devices: Devices, num_ranks: int, environment: dict[str, str]) -> int:
    if is_under_launcher():
        return int(environment["WORLD_SIZE"])
    if devices.kind == "cuda":
        return min(num_ranks or len(devices.names), len(devices.names))
    return min(num_ranks or _CPU_PROCESSES, max(_CPU_PROCESSES, devices.num_cores))


def _attention_group(kind: AttentionKind, count: int, dtype: str, device: str) -> AttentionGroup:
    """Ask every kernel about tensors like those of these layers."""
    options = {"dtype": getattr(torch, dtype), "device": device}
    q = torch.empty(1, kind.num_heads, 1, kind.head_dim, **options)
    v = torch.empty(1, kind.num_kv_heads, 1, kind.v_head_dim, **options)
    rejections = candidates("auto", q, v, kind.softcap)
    kernel = next((name for name, reason in rejections.items() if reason is None), None)
    return AttentionGroup(count, **vars(kind), kernel=kernel, rejections=rejections)


def _rank_job(report: MachineReport, timeout: float, repeats: int) -> RankJob:
    """Time the attention of the layers with the largest heads, of those that see most keys."""
    kind, query = report.devices.kind, report.query
    num_heads, num_kv_heads, head_dim, v_head_dim, softcap = 1, 1, 64, 64, None
    lengths: tuple[int, ...] = ()
    if report.attention_groups:
        group = max(report.attention_groups, key=lambda g: (g.max_visible_keys is None, g.num_heads * g.head_dim))
        num_heads, num_kv_heads = group.num_heads, group.num_kv_heads
        head_dim, v_head_dim, softcap = group.head_dim, group.v_head_dim, group.softcap
        tokens = max(64, query.seq_length // query.num_ranks)
        lengths = tuple(sorted({min(_SHORT_LENGTH[kind], tokens), tokens}))
    return RankJob(
        device=kind,
        dtype=query.dtype,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
        softcap=softcap,
        lengths=lengths,
        message_sizes=tuple(sorted({*_MESSAGE_SIZES, _LARGEST_MESSAGE[kind]})),
        repeats=repeats,
        timeout=timeout,
    )


def _add_measurements(report: MachineReport, job: RankJob, num_processes: int) -> MachineReport | None:
    try:
        if is_under_launcher():
            results = [run_launched_rank(measure, job)]
        else:
            results = launch_ranks(measure, num_processes, job)
    except RankTimeout as error:
        return replace(report, links=replace(report.links, error=str(error)))
    if int(report.environment.get("RANK", "0")):
        return None
    timings, link_times = results[0]
    return replace(report, timings=tuple(timings), links=replace(report.links, times=tuple(link_times)))
