"""The cheapest memory options with which a job fits: which are needed, what each saves, and what it costs.

`OPTIONS` is in the order of what they cost: first what costs next to no time, then traffic for sharded weights, then
rounded optimizer states, transfers to host memory, attention computed twice, and the optimizer on the CPU. Of all
combinations that fit, the one is taken whose most costly option is the cheapest, then the second most costly, and so
on. If none fits, the number of devices is doubled.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ..costmodel.devices import GIB, HOST_MEMORY
from ..text import format_tokens, markdown_table, wrap_prose
from .memory_estimate import Memory, memory_of
from .model_config import read_model
from .optimizers import DEFAULT, EIGHT_BIT
from .step_times import times_of
from .training_job import Job

MOST_DEVICES = 1024
COLUMNS = (
    "GiB are those of a device, allowance included; s is a step of one sequence that all devices share. Where an "
    "engine is not named by `fsdp`, `adam` or `weights`, it is DDP, or one process. `takes 4`: fewer than 4 are not "
    "enough, tried in powers of two."
)


@dataclass(frozen=True)
class Option:
    """One memory option.

    Attributes:
        name: in words.
        code: in tables.
        changes: settings of a job.
        offload: what it puts into host memory.
        needs, excludes: codes of options without, and with which it makes no sense.
    """

    name: str
    code: str
    changes: tuple[tuple[str, object], ...] = ()
    offload: str = ""
    needs: str = ""
    excludes: tuple[str, ...] = ()


OPTIONS = (
    Option("head and loss in blocks", "loss", (("loss_block", 2048),)),
    Option("layers recomputed, attention saved", "save", (("checkpoint", "save-attention"),)),
    Option("feed-forward layers in blocks", "ffn", (("ffn_block", 4096),)),
    Option("weights, gradients, states sharded (FSDP2)", "fsdp", (("zero", 3),)),
    Option("8-bit optimizer states", "8bit", (("optimizer", EIGHT_BIT),)),
    Option("layer inputs in host memory", "layers", offload="layers", needs="save"),
    Option("saved attention in host memory", "attention", offload="attention", needs="save"),
    Option("attention recomputed, too", "recompute", (("checkpoint", "full"),), needs="save", excludes=("attention",)),
    Option(
        "optimizer on the host (DeepSpeed)", "adam", (("zero", 3),), offload="optimizer", excludes=("fsdp", "8bit")
    ),
    Option("weights there, too (FSDP2)", "weights", offload="weights", needs="adam"),
)
START = {"checkpoint": "none", "ffn_block": 0, "loss_block": 0, "zero": 0, "optimizer": DEFAULT}


@dataclass(frozen=True)
class Step:
    """A job with the options up to this one; `option` is None before the first."""

    option: Option | None
    job: Job
    memory: Memory
    seconds: float


@dataclass(frozen=True)
class Selection:
    """What was chosen: one option after the other, on as many devices as it takes.

    Attributes:
        asked: devices that were asked for.
        closest: if these are too few, the bytes by which the best combination exceeds one of them.
    """

    steps: tuple[Step, ...]
    asked: int
    closest: float = 0.0

    @property
    def job(self) -> Job:
        return self.steps[-1].job

    @property
    def codes(self) -> tuple[str, ...]:
        return tuple(step.option.code for step in self.steps if step.option)


def fits(job: Job, memory: Memory) -> bool:
    """Return whether a rank's memory fits its device, and those of a node its host memory."""
    on_node = memory.host * min(job.devices, job.per_node)
    return memory.total <= job.device_facts.memory and on_node <= HOST_MEMORY


def combinations(job: Job) -> Iterator[tuple[Option, ...]]:
    """All combinations that make sense, the cheapest first."""
    for number in range(2 ** len(OPTIONS)):
        chosen = tuple(option for place, option in enumerate(OPTIONS) if number >> place & 1)
        codes = {option.code for option in chosen}
        needed = all(not option.needs or option.needs in codes for option in chosen)
        apart = codes.isdisjoint(code for option in chosen for code in option.excludes)
        if needed and apart and not (job.devices == 1 and "fsdp" in codes):
            yield chosen


def with_options(job: Job, chosen: tuple[Option, ...]) -> Job:
    """Return the job with these options and no others."""
    changes = dict(START)
    for option in chosen:
        changes |= dict(option.changes)
    return job.but(**changes, offload=tuple(option.offload for option in chosen if option.offload))


def select_options(job: Job) -> Selection:
    """Choose the options of a job, and more devices if none of them are enough.

    Raises:
        ValueError: if it does not fit on `MOST_DEVICES`.
    """
    together, closest = job.cp == job.devices, 0.0
    devices = job.devices
    while devices <= MOST_DEVICES:
        larger = job.but(devices=devices, cp=devices if together else job.cp)
        least = float("inf")
        for chosen in combinations(larger):
            candidate = with_options(larger, chosen)
            memory = memory_of(candidate)
            if fits(candidate, memory):
                return Selection(tuple(_steps(larger, chosen)), job.devices, closest)
            least = min(least, memory.total - job.device_facts.memory)
        closest = least if devices == job.devices else closest
        devices *= 2
    raise ValueError(
        f"{job.model.name} at {job.length:,} tokens does not fit on {MOST_DEVICES:,} x {job.device_facts.name} with "
        "any memory option. Choose a shorter --seq, fewer --rows, a larger --device, or adapters (--lora)."
    )


def _steps(job: Job, chosen: tuple[Option, ...]) -> Iterator[Step]:
    for count in range(len(chosen) + 1):
        changed = with_options(job, chosen[:count])
        option = chosen[count - 1] if count else None
        yield Step(option, changed, memory_of(changed), times_of(changed).step)


def selection_text(selection: Selection) -> str:
    """Return a table of what each option saves and costs, and which were not needed."""
    steps, job = selection.steps, selection.job
    rows = [["memory options that fit", "GiB a device", "saves", "seconds a step", "costs", "GiB of a host"]]
    for before, step in zip((None, *steps), steps, strict=False):
        on_node = step.memory.host * min(job.devices, job.per_node) / GIB
        row = [step.option.name if step.option else "none", f"{step.memory.total / GIB:,.1f}"]
        row += [f"{(before.memory.total - step.memory.total) / GIB:,.1f}" if before else ""]
        row += [f"{step.seconds:,.1f}", f"{step.seconds - before.seconds:+,.1f}" if before else ""]
        rows.append([*row, f"{on_node:,.0f}"])
    unneeded = [option.name for option in OPTIONS if option.code not in selection.codes]
    lines = [markdown_table(rows), wrap_prose(f"not needed: {'; '.join(unneeded)}")]
    if job.devices > selection.asked:
        more = (
            f"{selection.closest / GIB:,.1f} GiB too much" if selection.closest > 0 else "more host memory than it has"
        )
        few = f"On {selection.asked} x {job.device_facts.name}, every combination of options takes {more}"
        lines.insert(0, wrap_prose(f"{few}; {job.devices} are enough:"))
    return "\n".join(lines)


def selection_cell(selection: Selection) -> str:
    """Return a selection in few words: options, GiB of a device, seconds of a step, or how many devices it takes."""
    if selection.job.devices > selection.asked:
        return f"takes {selection.job.devices}"
    last = selection.steps[-1]
    seconds = f"{last.seconds:,.0f}" if last.seconds >= 100 else f"{last.seconds:.3g}"
    return f"{' '.join(selection.codes) or 'none'}: {last.memory.total / GIB:.0f} GiB, {seconds} s"


TABLE_MODELS = ("Qwen3-0.6B", "Llama-3.1-8B", "Qwen3-32B", "Qwen3-30B-A3B")
TABLE_LENGTHS = (2**15, 2**17, 2**20)
TABLE_DEVICES = (1, 8, 32)


def selection_table() -> str:
    """Return for some models and lengths the cheapest options on 1, 8 and 32 H100."""
    parts = []
    for name in TABLE_MODELS:
        model = read_model(name)
        rows = [[name, *(f"{devices} x H100" for devices in TABLE_DEVICES)]]
        for length in TABLE_LENGTHS:
            jobs = (Job(model, length, devices=devices) for devices in TABLE_DEVICES)
            rows.append([format_tokens(length), *(selection_cell(select_options(job)) for job in jobs)])
        parts.append(markdown_table(rows))
    codes = "; ".join(f"`{option.code}` {option.name}" for option in OPTIONS)
    return "\n\n".join((*parts, wrap_prose(f"{codes}."), wrap_prose(COLUMNS)))
