"""What to change, and why: a table of rules, each a function of the facts that returns advice or None."""

from collections.abc import Callable
from dataclasses import dataclass

from ..text import format_bytes, format_duration
from .facts import AlgorithmEstimate, Diagnosis
from .machine import numbers

_EXPOSED = 0.1  # share of a step's attention that may wait for keys and values before that is worth a word
_FASTER = 0.95  # another algorithm must be predicted at most this long against the ring
_FULL = 0.9  # of a device's memory, that weights and what trains them may take
_LONG = 8192  # tokens from which the eager reference kernel is no choice


@dataclass(frozen=True)
class Advice:
    """Something to do, and the reason; `refuses`: training would not start, or not be right, without it."""

    action: str
    reason: str
    refuses: bool = False


Rule = Callable[[Diagnosis], Advice | None]


def _versions(facts: Diagnosis) -> Advice | None:
    wrong = [one for one in facts.packages if one.required and not one.fits]
    if not wrong:
        return None
    asked = " ".join(f"'{one.name}{one.needs}'" for one in wrong)
    have = ", ".join(f"{one.name} {one.found or 'is missing'}" for one in wrong)
    only_python = [one.name for one in wrong] == ["python"]
    action = f"use Python {wrong[0].needs}" if only_python else f"pip install {asked}"
    return Advice(action, f"{have}; ring_hf needs what Transformers 5 and its attention interface need", True)


def _untested(facts: Diagnosis) -> Advice | None:
    newer = [
        one for one in facts.packages if one.tested and one.found and numbers(one.found)[:2] > numbers(one.tested)[:2]
    ]
    if not newer:
        return None
    pins = " ".join(f"{one.name}=={one.tested}" for one in newer)
    have = ", ".join(f"{one.name} {one.found}" for one in newer)
    return Advice(f"if anything fails, pip install {pins}", f"{have} is newer than what the tests ran with")


def _model(facts: Diagnosis) -> Advice | None:
    return (
        facts.refused and Advice("use another model, or change what the message names", facts.refused, True)
    ) or None


def _no_kernel(facts: Diagnosis) -> Advice | None:
    for one in facts.layers:
        if one.kernel is None:
            why = "; ".join(f"{name}: {reason}" for name, reason in one.kernels.items())
            return Advice("use another dtype or device", f"no kernel fits {one.describe()} ({why})", True)
    return None


def _links(facts: Diagnosis) -> Advice | None:
    if facts.links.error is None:
        return None
    return Advice("repair what the measurement ran into", facts.links.error, True)


def _unused_gpu(facts: Diagnosis) -> Advice | None:
    if not facts.devices.unused:
        return None
    torch = next(one for one in facts.packages if one.name == "torch")
    return Advice(
        "install a CUDA build of PyTorch that fits the driver",
        f"an NVIDIA driver is here, but torch {torch.found} ({torch.notes}) finds no GPU",
    )


def _flash_attn(facts: Diagnosis) -> Advice | None:
    if facts.devices.kind != "cuda" or not facts.layers:
        return None
    without = [one for one in facts.layers if not (one.kernel or "").startswith("flash_attn")]
    if not without or any(one.name.startswith("flash-attn") and one.found for one in facts.packages):
        return None
    capped = [one for one in without if one.softcap]
    why = f"{without[0].kernel} is used, which is PyTorch's; flash-attn runs packed documents in one call"
    if capped:
        why = f"{capped[0].kernel} is used, as no kernel of PyTorch knows soft-capping ({capped[0].softcap:g})"
    return Advice("pip install flash-attn --no-build-isolation", why)


def _unfit_flash_attn(facts: Diagnosis) -> Advice | None:
    """Installed, and still not used."""
    if facts.devices.kind != "cuda":
        return None
    for package in facts.packages:
        if not package.name.startswith("flash-attn") or package.found is None:
            continue
        kernel = {"flash-attn": "flash_attn_2"}.get(package.name, package.name.replace("-", "_"))
        for one in facts.layers:
            reason = one.kernels.get(kernel)
            if reason and not (one.kernel or "").startswith("flash_attn"):
                return Advice(f"install another version of {package.name}, or leave it", f"it is not used: {reason}")
    return None


def _reference(facts: Diagnosis) -> Advice | None:
    slow = [one for one in facts.layers if one.kernel == "reference"]
    if not slow or facts.question.sequence < _LONG:
        return None
    other = "" if facts.question.dtype == "bfloat16" else ", or bfloat16"
    return Advice(
        "find a faster kernel for these layers: a GPU with flash-attn" + other,
        f"{slow[0].describe()} would run on the eager reference, far too slow for "
        f"{facts.question.sequence:,} tokens: no other kernel fits (see above)",
    )


def _peers(facts: Diagnosis) -> Advice | None:
    if facts.devices.peers is not False:
        return None
    return Advice(
        "look at the topology (nvidia-smi topo -m), at ACS and IOMMU settings",
        "not every GPU reaches every other one directly, so keys and values go through host memory",
    )


def _variables(facts: Diagnosis) -> Advice | None:
    slow = {"CUDA_LAUNCH_BLOCKING": "nothing overlaps", "NCCL_P2P_DISABLE": "GPUs exchange through host memory"}
    slow |= {"NCCL_SHM_DISABLE": "GPUs of a node exchange over sockets", "NCCL_IB_DISABLE": "nodes exchange over TCP"}
    found = {name: why for name, why in slow.items() if facts.environment.get(name, "0") not in ("", "0")}
    if not found:
        return None
    reason = "; ".join(f"{name}={facts.environment[name]}: {why}" for name, why in found.items())
    return Advice(f"unset {' '.join(found)}, unless it works around something", reason)


def _threads(facts: Diagnosis) -> Advice | None:
    threads, ranks = facts.environment.get("OMP_NUM_THREADS", ""), min(facts.question.ranks, facts.links.processes)
    if facts.devices.kind != "cpu" or not threads.isdigit() or int(threads) * ranks <= facts.devices.cores:
        return None
    return Advice(
        f"set OMP_NUM_THREADS={max(1, facts.devices.cores // ranks)}",
        f"{ranks} ranks of {threads} threads share {facts.devices.cores} cores",
    )


def _division(facts: Diagnosis) -> Advice | None:
    """Launched with a number of processes that these ranks do not divide."""
    world, ranks = facts.environment.get("WORLD_SIZE", ""), facts.question.ranks
    if not world.isdigit() or int(world) % ranks == 0:
        return None
    below = ranks * (int(world) // ranks)
    fitting = f"{below} or {below + ranks}" if below else f"{ranks}"
    return Advice(
        f"start {fitting} processes, or set context_parallel_size to a divisor of {world}",
        f"context_parallel_size={ranks} does not divide {world} processes",
        True,
    )


def _weights(facts: Diagnosis) -> Advice | None:
    """Whole weights on every rank do not fit."""
    fitting = [one for one in facts.engines if one.missing is None and one.held < _FULL * facts.devices.memory]
    whole = next((one for one in facts.engines if one.name == "DDP"), None)
    if facts.devices.kind != "cuda" or whole is None or whole in fitting:
        return None
    reason = (
        f"DDP holds {format_bytes(whole.held)} of weights, gradients and AdamW on a rank, of "
        f"{format_bytes(facts.devices.memory)}"
    )
    if not fitting:
        return Advice("take more ranks, adapters, or ring-hf plan --fit for states in host memory", reason)
    best = min(fitting, key=lambda one: one.held)
    file = "zero3_8gpu.yaml" if best.name.startswith("DeepSpeed") else "fsdp2_8gpu.yaml"
    return Advice(
        f"start with configs/accelerate/{file}",
        f"{reason}; {best.name} holds {format_bytes(best.held)} (activations come on top)",
    )


def _exposed(facts: Diagnosis) -> Advice | None:
    overlap, question = facts.overlap, facts.question
    if overlap is None or overlap.best.exposed <= _EXPOSED:
        return None
    share = f"{overlap.best.exposed:.0%} of a step's attention waits for messages ({overlap.best.name}, the fastest)"
    least = max(overlap.least_forward or 0, overlap.least_backward or 0)
    if least <= overlap.tokens:
        return Advice("use fewer ranks or longer sequences", f"{share}: latency and uneven steps, not bandwidth")
    fewer = question.sequence // least
    return Advice(
        f"use sequences of at least {least * question.ranks:,} tokens on {question.ranks} ranks"
        + (f", or {fewer} ranks for {question.sequence:,}" if fewer > 1 else ", or faster links"),
        f"{share}; a ring needs {least:,} tokens on a rank to hide its messages here, and gets {overlap.tokens:,}",
    )


def _other(facts: Diagnosis) -> AlgorithmEstimate | None:
    """An algorithm that is worth naming, beside what transport="auto" finds by itself."""
    overlap = facts.overlap
    if overlap is None or overlap.best is overlap.ring or overlap.best.seconds > _FASTER * overlap.ring.seconds:
        return None
    return overlap.best


_SETTINGS = {
    "direct": 'leave transport="auto" (or set "direct")',
    "allgather": 'leave transport="auto" (or set "allgather")',
    "ulysses": 'load the model with attn_implementation="ulysses"',
}


def _algorithm(facts: Diagnosis) -> Advice | None:
    best = _other(facts)
    if best is None or facts.overlap is None:
        return None
    action = _SETTINGS.get(best.name, f'set ulysses_size={best.name.split()[-1]} (or "auto")')
    ring = facts.overlap.ring
    windows = sum(one.count for one in facts.layers if one.visible is not None)
    why = f"attention of a step is predicted to take {format_duration(best.seconds)} instead of "
    why += format_duration(ring.seconds)
    if windows and best.name == "direct":
        why += f"; {windows} of {sum(one.count for one in facts.layers)} layers see a window or chunk only"
    return Advice(action, f"{why}, {best.exposed:.0%} of it exposed instead of {ring.exposed:.0%}")


def _padding(facts: Diagnosis) -> Advice | None:
    overlap, question = facts.overlap, facts.question
    if overlap is None or overlap.tokens * question.ranks == question.sequence:
        return None
    padded = overlap.tokens * question.ranks
    return Advice(
        f"take sequences of {padded:,} tokens",
        f"{question.layout} on {question.ranks} ranks pads {question.sequence:,} to {padded:,}",
    )


def _contiguous(facts: Diagnosis) -> Advice | None:
    if facts.question.layout != "contiguous" or facts.question.ranks == 1:
        return None
    if not any(one.visible is None for one in facts.layers):
        return None
    return Advice(
        "take --layout zigzag (attn_implementation ring_zigzag)",
        f"contiguous, the last of {facts.question.ranks} ranks computes {2 - 1 / facts.question.ranks:.3g} times the "
        "mean of a causal layer, and all wait for it",
    )


RULES: tuple[Rule, ...] = (
    _versions,
    _model,
    _no_kernel,
    _links,
    _division,
    _unused_gpu,
    _flash_attn,
    _unfit_flash_attn,
    _reference,
    _peers,
    _variables,
    _threads,
    _contiguous,
    _weights,
    _exposed,
    _algorithm,
    _padding,
    _untested,
)


def advise(facts: Diagnosis) -> list[Advice]:
    """What every rule has to say, what refuses training first."""
    found = [advice for rule in RULES if (advice := rule(facts)) is not None]
    return sorted(found, key=lambda advice: not advice.refuses)
