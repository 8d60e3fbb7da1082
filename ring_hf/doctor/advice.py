"""What to change, and why: a table of rules, each a pure function of a report that returns advice or None."""

from collections.abc import Callable
from dataclasses import dataclass

from ..text import format_bytes, format_duration
from .machine import parse_version
from .machine_report import AlgorithmEstimate, MachineReport

_MAX_EXPOSED = 0.1  # share of a step's attention that may wait for keys and values before there is advice
_MAX_TIME_SHARE = 0.95  # another algorithm is advised if it takes at most this share of the ring's time
_MAX_STATES = 0.9  # share of a device's memory that weights, gradients and optimizer states may take
_LONG_SEQUENCE = 8192  # tokens from which the eager reference kernel is too slow


@dataclass(frozen=True)
class Advice:
    """An action and its reason.

    Attributes:
        blocks_training: without the action, training would not start or would compute wrong results.
    """

    action: str
    reason: str
    blocks_training: bool = False


Rule = Callable[[MachineReport], Advice | None]


def _check_versions(report: MachineReport) -> Advice | None:
    unsupported = [package for package in report.packages if package.is_required and not package.is_supported]
    if not unsupported:
        return None
    requirements = " ".join(f"'{package.name}{package.version_range}'" for package in unsupported)
    versions = ", ".join(f"{package.name} {package.version or 'is missing'}" for package in unsupported)
    only_python = [package.name for package in unsupported] == ["python"]
    action = f"use Python {unsupported[0].version_range}" if only_python else f"pip install {requirements}"
    return Advice(action, f"{versions}; ring_hf needs the attention interface of Transformers 5", True)


def _check_untested_versions(report: MachineReport) -> Advice | None:
    newer = [
        package
        for package in report.packages
        if package.tested_version
        and package.version
        and parse_version(package.version)[:2] > parse_version(package.tested_version)[:2]
    ]
    if not newer:
        return None
    pins = " ".join(f"{package.name}=={package.tested_version}" for package in newer)
    versions = ", ".join(f"{package.name} {package.version}" for package in newer)
    return Advice(f"if anything fails, pip install {pins}", f"{versions} is newer than the version that was tested")


def _check_model(report: MachineReport) -> Advice | None:
    if not report.refusal:
        return None
    return Advice("use another model, or change the setting that the message names", report.refusal, True)


def _check_kernels(report: MachineReport) -> Advice | None:
    for group in report.attention_groups:
        if group.kernel is None:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in group.rejections.items())
            return Advice("use another dtype or device", f"no kernel supports {group.describe()} ({reasons})", True)
    return None


def _check_links(report: MachineReport) -> Advice | None:
    if report.links.error is None:
        return None
    return Advice("fix the error that stopped the measurement", report.links.error, True)


def _check_unused_gpu(report: MachineReport) -> Advice | None:
    if not report.devices.has_unused_gpu:
        return None
    torch = next(package for package in report.packages if package.name == "torch")
    return Advice(
        "install a CUDA build of PyTorch that fits the driver",
        f"an NVIDIA driver is installed, but torch {torch.version} ({torch.notes}) finds no GPU",
    )


def _uses_flash_attn(kernel: str | None) -> bool:
    return kernel is not None and kernel.startswith("flash_attn")


def _check_flash_attn(report: MachineReport) -> Advice | None:
    if report.devices.kind != "cuda" or not report.attention_groups:
        return None
    others = [group for group in report.attention_groups if not _uses_flash_attn(group.kernel)]
    if not others or any(package.name.startswith("flash-attn") and package.version for package in report.packages):
        return None
    capped = [group for group in others if group.softcap]
    reason = f"{others[0].kernel} is used; flash-attn runs packed documents in one call"
    if capped:
        reason = f"{capped[0].kernel} is used, as no kernel of PyTorch has soft-capping ({capped[0].softcap:g})"
    return Advice("pip install flash-attn --no-build-isolation", reason)


def _check_unused_flash_attn(report: MachineReport) -> Advice | None:
    """Report a flash-attn that is installed but rejects the layers."""
    if report.devices.kind != "cuda":
        return None
    for package in report.packages:
        if not package.name.startswith("flash-attn") or package.version is None:
            continue
        kernel = {"flash-attn": "flash_attn_2"}.get(package.name, package.name.replace("-", "_"))
        for group in report.attention_groups:
            reason = group.rejections.get(kernel)
            if reason and not _uses_flash_attn(group.kernel):
                return Advice(f"install another version of {package.name}, or ignore it", f"it is not used: {reason}")
    return None


def _check_reference_kernel(report: MachineReport) -> Advice | None:
    slow = [group for group in report.attention_groups if group.kernel == "reference"]
    if not slow or report.query.seq_length < _LONG_SEQUENCE:
        return None
    other_dtype = "" if report.query.dtype == "bfloat16" else ", or bfloat16"
    return Advice(
        "find a faster kernel for these layers: a GPU with flash-attn" + other_dtype,
        f"{slow[0].describe()} would run on the eager reference, far too slow for "
        f"{report.query.seq_length:,} tokens: no other kernel fits (see above)",
    )


def _check_peers(report: MachineReport) -> Advice | None:
    if report.devices.has_peer_access is not False:
        return None
    return Advice(
        "check the topology (nvidia-smi topo -m), and the ACS and IOMMU settings",
        "not every GPU reaches every other one directly, so keys and values go through host memory",
    )


def _check_variables(report: MachineReport) -> Advice | None:
    effects = {
        "CUDA_LAUNCH_BLOCKING": "nothing overlaps",
        "NCCL_P2P_DISABLE": "GPUs exchange through host memory",
        "NCCL_SHM_DISABLE": "GPUs of a node exchange over sockets",
        "NCCL_IB_DISABLE": "nodes exchange over TCP",
    }
    active = [name for name in effects if report.environment.get(name, "0") not in ("", "0")]
    if not active:
        return None
    reason = "; ".join(f"{name}={report.environment[name]}: {effects[name]}" for name in active)
    return Advice(f"unset {' '.join(active)}, unless it works around a known problem", reason)


def _check_threads(report: MachineReport) -> Advice | None:
    num_threads = report.environment.get("OMP_NUM_THREADS", "")
    num_ranks, num_cores = min(report.query.num_ranks, report.links.num_processes), report.devices.num_cores
    if report.devices.kind != "cpu" or not num_threads.isdigit() or int(num_threads) * num_ranks <= num_cores:
        return None
    return Advice(
        f"set OMP_NUM_THREADS={max(1, num_cores // num_ranks)}",
        f"{num_ranks} ranks of {num_threads} threads share {num_cores} cores",
    )


def _check_world_size(report: MachineReport) -> Advice | None:
    """Report a launcher whose number of processes is not a multiple of the ranks."""
    world_size, num_ranks = report.environment.get("WORLD_SIZE", ""), report.query.num_ranks
    if not world_size.isdigit() or int(world_size) % num_ranks == 0:
        return None
    below = num_ranks * (int(world_size) // num_ranks)
    valid = f"{below} or {below + num_ranks}" if below else f"{num_ranks}"
    return Advice(
        f"start {valid} processes, or set context_parallel_size to a divisor of {world_size}",
        f"context_parallel_size={num_ranks} does not divide {world_size} processes",
        True,
    )


def _check_states(report: MachineReport) -> Advice | None:
    """Report if a rank has no memory for whole weights, gradients and optimizer states."""
    memory = report.devices.memory
    fitting = [
        engine
        for engine in report.engines
        if engine.unavailable_reason is None and engine.state_bytes < _MAX_STATES * memory
    ]
    ddp = next((engine for engine in report.engines if engine.name == "DDP"), None)
    if report.devices.kind != "cuda" or ddp is None or ddp in fitting:
        return None
    ddp_bytes = format_bytes(ddp.state_bytes)
    reason = f"DDP holds {ddp_bytes} of weights, gradients and AdamW on a rank, of {format_bytes(memory)}"
    if not fitting:
        return Advice("use more ranks or adapters, or see ring-hf plan --fit for states in host memory", reason)
    smallest = min(fitting, key=lambda engine: engine.state_bytes)
    file = "zero3_8gpu.yaml" if smallest.name.startswith("DeepSpeed") else "fsdp2_8gpu.yaml"
    return Advice(
        f"start with configs/accelerate/{file}",
        f"{reason}; {smallest.name} holds {format_bytes(smallest.state_bytes)} (without activations)",
    )


def _check_exposed_communication(report: MachineReport) -> Advice | None:
    overlap, query = report.overlap, report.query
    if overlap is None or overlap.fastest.exposed <= _MAX_EXPOSED:
        return None
    fastest = overlap.fastest
    share = f"{fastest.exposed:.0%} of a step's attention waits for messages ({fastest.name}, the fastest)"
    min_tokens = max(overlap.min_tokens_forward or 0, overlap.min_tokens_backward or 0)
    if min_tokens <= overlap.tokens:
        return Advice("use fewer ranks or longer sequences", f"{share}: latency and uneven steps, not bandwidth")
    fewer_ranks = query.seq_length // min_tokens
    return Advice(
        f"use sequences of at least {min_tokens * query.num_ranks:,} tokens on {query.num_ranks} ranks"
        + (f", or {fewer_ranks} ranks for {query.seq_length:,}" if fewer_ranks > 1 else ", or faster links"),
        f"{share}; a ring needs {min_tokens:,} tokens on a rank to hide its messages here, and has {overlap.tokens:,}",
    )


def _faster_algorithm(report: MachineReport) -> AlgorithmEstimate | None:
    overlap = report.overlap
    if overlap is None or overlap.fastest is overlap.ring:
        return None
    return overlap.fastest if overlap.fastest.seconds <= _MAX_TIME_SHARE * overlap.ring.seconds else None


_ALGORITHM_SETTINGS = {
    "direct": 'leave transport="auto" (or set "direct")',
    "allgather": 'leave transport="auto" (or set "allgather")',
    "ulysses": 'load the model with attn_implementation="ulysses"',
}


def _check_algorithm(report: MachineReport) -> Advice | None:
    faster = _faster_algorithm(report)
    if faster is None or report.overlap is None:
        return None
    action = _ALGORITHM_SETTINGS.get(faster.name, f'set ulysses_size={faster.name.split()[-1]} (or "auto")')
    ring, groups = report.overlap.ring, report.attention_groups
    num_layers = sum(group.count for group in groups)
    num_local = sum(group.count for group in groups if group.max_visible_keys is not None)
    seconds = f"{format_duration(faster.seconds)} instead of {format_duration(ring.seconds)}"
    reason = f"attention of a step is predicted to take {seconds}"
    if num_local and faster.name == "direct":
        reason += f"; {num_local} of {num_layers} layers see a window or chunk only"
    return Advice(action, f"{reason}, {faster.exposed:.0%} of it exposed instead of {ring.exposed:.0%}")


def _check_padding(report: MachineReport) -> Advice | None:
    overlap, query = report.overlap, report.query
    if overlap is None or overlap.tokens * query.num_ranks == query.seq_length:
        return None
    padded_length = overlap.tokens * query.num_ranks
    return Advice(
        f"use sequences of {padded_length:,} tokens",
        f"{query.layout} on {query.num_ranks} ranks pads {query.seq_length:,} to {padded_length:,}",
    )


def _check_contiguous(report: MachineReport) -> Advice | None:
    num_ranks = report.query.num_ranks
    if report.query.layout != "contiguous" or num_ranks == 1:
        return None
    if not any(group.max_visible_keys is None for group in report.attention_groups):
        return None
    return Advice(
        "use --layout zigzag (attn_implementation ring_zigzag)",
        f"with contiguous shards, the last of {num_ranks} ranks computes {2 - 1 / num_ranks:.3g} times the mean of a "
        "causal layer, and all ranks wait for it",
    )


RULES: tuple[Rule, ...] = (
    _check_versions,
    _check_model,
    _check_kernels,
    _check_links,
    _check_world_size,
    _check_unused_gpu,
    _check_flash_attn,
    _check_unused_flash_attn,
    _check_reference_kernel,
    _check_peers,
    _check_variables,
    _check_threads,
    _check_contiguous,
    _check_states,
    _check_exposed_communication,
    _check_algorithm,
    _check_padding,
    _check_untested_versions,
)


def advise(report: MachineReport) -> list[Advice]:
    """Return the advice of all rules, first what blocks training."""
    advice = [item for rule in RULES if (item := rule(report)) is not None]
    return sorted(advice, key=lambda item: not item.blocks_training)
